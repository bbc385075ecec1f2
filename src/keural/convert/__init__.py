"""Model directories: weights, configuration, tokenizer and lineage, in the form that transformers loads."""

from keural.convert.hf import (
    grow_vocabulary,
    load_model,
    load_tokenizer,
    model_directory,
    read_lineage,
    save_model_directory,
)

__all__ = [
    "grow_vocabulary",
    "load_model",
    "load_tokenizer",
    "model_directory",
    "read_lineage",
    "save_model_directory",
]
