"""Tokenizers: training, loading, conversion to `tokenizer.json`, ChatML rendering with loss masks, and a report on texts."""

from keural.tokenizer.chatml import Rendered, render, render_prompt
from keural.tokenizer.load import KeuralTokenizer
from keural.tokenizer.message import ROLES, Message, ParsedAnswer, ToolCall, parse_answer, with_calls, with_tools
from keural.tokenizer.report import format_report, tokenizer_report
from keural.tokenizer.stream import StreamDecoder
from keural.tokenizer.train import train_tokenizer

__all__ = [
    "ROLES",
    "KeuralTokenizer",
    "Message",
    "ParsedAnswer",
    "Rendered",
    "StreamDecoder",
    "ToolCall",
    "format_report",
    "parse_answer",
    "render",
    "render_prompt",
    "tokenizer_report",
    "train_tokenizer",
    "with_calls",
    "with_tools",
]
