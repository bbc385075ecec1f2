"""How the model card samples: the defaults of every chat, in the one place that recipes, engines and help texts take them from."""

from typing import NamedTuple


class SamplingDefaults(NamedTuple):
    """How answers are sampled where nothing else is said; what each means is said in `keural.serve.engines.sampling_params`."""

    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.1
    max_new_tokens: int = 256


CARD = SamplingDefaults()
