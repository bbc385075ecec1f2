"""The published network written anew from its description, with its names, and the files that foreign checkpoints come in."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.helpers.shapes import SMALL

Tensors = dict[str, Tensor]

SHAPE = SMALL | {
    "vocab_size": 402,
    "num_hidden_layers": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 160,
    "sliding_window": 8,
    "rope_theta": 500000.0,
}
"""A `model_config` as the published training script saves it, in miniature."""


class Attention(nn.Module):
    def __init__(self, c: dict[str, float]):
        super().__init__()
        self.c = c
        width = int(c["head_dim"])
        self.q_proj = nn.Linear(int(c["hidden_size"]), int(c["num_attention_heads"]) * width, bias=False)
        self.k_proj = nn.Linear(int(c["hidden_size"]), int(c["num_key_value_heads"]) * width, bias=False)
        self.v_proj = nn.Linear(int(c["hidden_size"]), int(c["num_key_value_heads"]) * width, bias=False)
        self.o_proj = nn.Linear(int(c["num_attention_heads"]) * width, int(c["hidden_size"]), bias=False)

    def turn(self, heads: Tensor) -> Tensor:
        half = int(self.c["head_dim"]) // 2
        frequencies = torch.tensor([self.c["rope_theta"] ** (-i / half) for i in range(half)])
        angles = torch.arange(len(heads)).float()[:, None, None] * frequencies
        first, second = heads[..., :half], heads[..., half:]
        return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1)

    def forward(self, x: Tensor, slides: bool) -> Tensor:
        length, width = len(x), int(self.c["head_dim"])
        q, k, v = (p(x).view(length, -1, width) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(q), self.turn(k)
        group = q.shape[1] // k.shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        blocked = (distance < 0) | (distance > self.c["sliding_window"] if slides else torch.zeros_like(distance).bool())
        heads = []
        for head in range(q.shape[1]):
            scores = q[:, head] @ k[:, head // group].T / math.sqrt(width)
            heads.append(scores.masked_fill(blocked, -math.inf).softmax(-1) @ v[:, head // group])
        mixed: Tensor = self.o_proj(torch.cat(heads, dim=-1))
        return mixed


class Expert(nn.Module):
    def __init__(self, c: dict[str, float]):
        super().__init__()
        self.gate_proj = nn.Linear(int(c["hidden_size"]), int(c["intermediate_size"]), bias=False)
        self.up_proj = nn.Linear(int(c["hidden_size"]), int(c["intermediate_size"]), bias=False)
        self.down_proj = nn.Linear(int(c["intermediate_size"]), int(c["hidden_size"]), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        y: Tensor = self.down_proj(gate * torch.sigmoid(gate) * self.up_proj(x))
        return y


class Experts(nn.Module):
    def __init__(self, c: dict[str, float]):
        super().__init__()
        self.chosen = int(c["num_experts_per_tok"])
        self.gate = nn.Linear(int(c["hidden_size"]), int(c["num_local_experts"]), bias=False)
        self.experts = nn.ModuleList(Expert(c) for _ in range(int(c["num_local_experts"])))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x:
            probabilities = self.gate(token).softmax(-1)
            best = probabilities.argsort(descending=True)[: self.chosen]
            rows.append(sum(probabilities[e] / probabilities[best].sum() * self.experts[e](token) for e in best.tolist()))
        return torch.stack(rows)


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight


class Block(nn.Module):
    def __init__(self, c: dict[str, float]):
        super().__init__()
        self.attn_norm, self.attn = Norm(int(c["hidden_size"])), Attention(c)
        self.moe_norm, self.moe = Norm(int(c["hidden_size"])), Experts(c)

    def forward(self, x: Tensor, slides: bool) -> Tensor:
        x = x + self.attn(self.attn_norm(x), slides=slides)
        y: Tensor = x + self.moe(self.moe_norm(x))
        return y


class PublishedModel(nn.Module):
    """Ids `[T]` to logits `[T, V]`."""

    def __init__(self, c: dict[str, float]):
        super().__init__()
        self.embed_tokens = nn.Embedding(int(c["vocab_size"]), int(c["hidden_size"]))
        self.layers = nn.ModuleList(Block(c) for _ in range(int(c["num_hidden_layers"])))
        self.norm = Norm(int(c["hidden_size"]))
        for name, parameter in self.named_parameters():
            if "norm" not in name:
                nn.init.normal_(parameter, std=0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        for index, block in enumerate(self.layers):
            x = block(x, slides=index % 2 == 0)
        logits: Tensor = self.norm(x) @ self.embed_tokens.weight.T
        return logits


def training_checkpoint(state_dict: Tensors, config: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the published training script saves, optimizer included."""
    moments = {name: {"exp_avg": torch.zeros_like(tensor), "step": torch.tensor(7.0)} for name, tensor in state_dict.items()}
    return {
        "step": 29112,
        "epoch": 2,
        "tokens_processed": 7_631_536_128,
        "model": state_dict,
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "params": list(state_dict)}]},
        "model_config": config or SHAPE,
        "train_config": {"data_dir": "data/binary", "learning_rate": 3e-4},
    }


def as_safetensors(directory: Path, state_dict: Tensors, config: dict[str, Any] | None = None, shards: int = 1) -> Path:
    """A directory of safetensors, in shards with an index."""
    directory.mkdir(parents=True)
    names = list(state_dict)
    places: dict[str, str] = {}
    for shard in range(shards):
        part = names[shard::shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: state_dict[name] for name in part}, directory / file)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def our_names(state_dict: Tensors) -> Tensors:
    """The tensors under the names of this package's directories, written out here once more."""
    pairs = (
        ("attn_norm", "input_layernorm"), ("moe_norm", "post_attention_layernorm"), (".attn.", ".self_attn."), (".moe.", ".mlp."),
    )  # fmt: skip
    renamed = {}
    for name, tensor in state_dict.items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[f"model.{name}"] = tensor
    return renamed
