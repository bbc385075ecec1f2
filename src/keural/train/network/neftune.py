"""Noise on the embeddings while training: NEFTune (Jain et al. 2023, arXiv:2310.05914).

In: a step's rows and its micro-batches. Out: the micro-batches with noise. A conversation's noise follows from the seed, the step
and its number in the store alone, so it is the same however the step is cut, on any number of ranks and after a restart.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from keural.data.loading.batch import Array, Batch
from keural.files import fingerprint
from keural.train.micro_batches import MicroBatch
from keural.train.trainer import Trainer


def noised(trainer: Trainer, step: int, batch: Batch, micros: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
    """The micro-batches of `batch`, with noise where the stage has any."""
    alpha, first = trainer.stage.sft.neftune_alpha, 0
    for micro in micros:
        rows = slice(first, first + len(micro.input_ids))
        first = rows.stop
        if alpha == 0:
            yield micro
            continue
        width = trainer.policy.model.config.hidden_size
        values = embedding_noise(batch.segment_ids[rows], batch.sequence_ids[rows], width, alpha, (trainer.stream.seed, step))
        yield replace(micro, noise=values.to(micro.input_ids.device))


def embedding_noise(segments: Array, sequences: Array, width: int, alpha: float, seed: tuple[int, int]) -> Tensor:
    """Noise ``[rows, T, width]``, float32: of a document uniform in [-1, 1] times alpha / sqrt(its tokens * width), of padding 0.

    `segments` and `sequences` ``[rows, T]`` are those of a batch.
    """
    noise = torch.zeros(*segments.shape, width)
    for row, numbers in enumerate(segments):
        for number in range(1, int(numbers.max()) + 1):
            places = np.flatnonzero(numbers == number)
            sequence = int(sequences[row, places[0]])
            draw = torch.Generator().manual_seed(int(fingerprint([*seed, sequence])[:15], 16))
            uniform = torch.rand(len(places), width, generator=draw) * 2 - 1
            noise[row, places] = uniform * (alpha / math.sqrt(len(places) * width))
    return noise
