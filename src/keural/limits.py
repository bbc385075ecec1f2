"""How large a number may be that a person gives: in a recipe, on a command line, in a model's record.

Beyond these bounds libraries below crash or loop instead of refusing. They are far above everything that makes sense.
"""

LARGEST = 10**9
"""Upper bound of every whole number that has no other."""
LARGEST_FLOAT = 1e38
"""Upper bound of every other number: float32 knows hardly larger ones."""
LARGEST_SIZE = 10**15
"""Of a number of records, tokens or bytes of data."""
LARGEST_SEED = 2**63 - 1
LARGEST_TEMPERATURE = 100.0
SMALLEST_PENALTY, LARGEST_PENALTY = 0.01, 100.0
LARGEST_ANSWER = 1_000_000
"""Tokens of an answer."""
LONGEST_SECONDS = 10**10
"""Three hundred years."""
EVERY_MACHINES_THREADS = 64
"""So many threads may be asked for on the smallest machine; a hundred thousand crash the libraries below."""
MOST_SLOTS = 4096
"""Answers of a network at once."""
