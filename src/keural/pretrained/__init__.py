"""Model directories: weights, configuration, tokenizer and lineage, in the form that transformers loads."""

from keural.pretrained.directory import (
    load_model,
    load_tokenizer,
    model_directory,
    read_lineage,
    save_model_directory,
)

__all__ = [
    "load_model",
    "load_tokenizer",
    "model_directory",
    "read_lineage",
    "save_model_directory",
]
