"""Cleaning of running text at corpus scale, on datatrove: language, near-duplicates, quality, personal data.

In: the sources of a stage. Out: cleaned documents on disk, one directory per source, with counts and examples of what was dropped.
`run.clean` is the way in; everything else is a part of it.
"""
