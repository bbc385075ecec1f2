"""Model directories: weights, configuration, tokenizer and lineage, in the form that transformers loads."""

from keural.pretrained.directory import model_directory, save_model_directory
from keural.pretrained.stored_model import load_model, load_tokenizer, open_model, open_network, read_lineage

__all__ = [
    "load_model",
    "load_tokenizer",
    "model_directory",
    "open_model",
    "open_network",
    "read_lineage",
    "save_model_directory",
]
