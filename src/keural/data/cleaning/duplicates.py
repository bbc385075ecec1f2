"""Near-duplicates across all sources: datatrove's MinHash in four steps, with what this corpus needs besides.

5-grams of words, 14 buckets of 8 hashes of 64 bits, as FineWeb: a pair of Jaccard similarity s is found with probability
1 - (1 - s^8)^14, 0.92 at 0.8 and 0.5 at 0.72. Of each group the first document in the order of the recipe stays. A text of fewer
than five words counts as one shingle, so that copies of it are found, too.
"""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupSignature, minhash
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import simplify_text

minhash.tqdm = partial(minhash.tqdm, disable=True)  # a progress bar in the middle of a command's own output
CONFIG = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64))
_BLOCK = 8192
"""Shingles that are hashed at a time: 112 hashes of each shingle of a book would not fit into memory."""


class Signatures(MinhashDedupSignature):
    """The first step, for texts of any length."""

    def get_shingles(self, text: str) -> Any:
        """Hashes of 5-grams ``[n, 1]``; of the whole text where it has none."""
        shingles = super().get_shingles(text)
        if shingles.size:
            return shingles
        return np.array([[self._hash_func(simplify_text(text, self.config.norm_config) or text)]], dtype=np.uint64)

    def get_signature(self, shingles: Any) -> list[list[int]]:
        """The least hashes, bucket by bucket: those of blocks first, then of these."""
        starts = range(0, len(shingles), _BLOCK)
        least = np.array([np.concatenate(super(Signatures, self).get_signature(shingles[at : at + _BLOCK])) for at in starts])
        return [bucket.tolist() for bucket in np.split(least.min(axis=0), self.config.num_buckets)]


class KeepFirst(PipelineStep):
    """After the clusters: lists all documents of each group but the first as those to remove.

    datatrove keeps whichever its union-find made the root. Files are numbered, and documents within them, in the order of reading.
    """

    type = "DEDUP"
    name = "keep first"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Rewrite the lists."""
        members: list[tuple[int, int, int]] = []  # group, file, document
        for file in self._folder.glob("*.clusters"):
            pairs = np.fromfile(file, dtype="<u4").reshape(-1, 2)
            members += [(group, int(file.stem), document) for document, group in pairs.tolist()]
        remove: dict[int, list[int]] = {number: [] for _, number, _ in members}
        for before, (group, number, document) in pairwise(sorted(members)):
            if before[0] == group:
                remove[number].append(document)
        for number, documents in remove.items():
            np.array(sorted(documents), dtype="<u4").tofile(self._folder / f"{number:06d}.remove")


def clusters(pairs: Path, remove: Path) -> list[PipelineStep]:
    """The third step; one task."""
    return [MinhashDedupCluster(str(pairs), str(remove), config=CONFIG, save_cluster_id=True), KeepFirst(remove)]
