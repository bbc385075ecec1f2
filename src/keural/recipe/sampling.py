"""How the model card samples: the defaults of every chat, in one place."""

from typing import NamedTuple


class SamplingDefaults(NamedTuple):
    """How answers are sampled where nothing else is said; see `keural.serve.engines.sampling.SamplingParams`."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 256


CARD = SamplingDefaults()
