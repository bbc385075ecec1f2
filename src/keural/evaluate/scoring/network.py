"""A network that answers requests: the log-probability of tokens after others.

In: groups of requests, each group of one item. Out: batch by batch the answers of the groups that are finished. Contexts are
computed once and their keys and values serve all that follows (`keural.evaluate.scoring.rows`); logits exist only where a token is
predicted, a piece at a time; log-probabilities are computed in float32 whatever the weights are, and added in float64.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from keural.errors import UserError
from keural.evaluate.scoring.rows import Edge, Row, batches, rows_of
from keural.evaluate.tasks.items import Likelihood, LogProb
from keural.model import KeuralConfig, KeuralMoECausalLM
from keural.tokenizer import KeuralTokenizer
from keural.train.losses import LOGITS_PER_CHUNK

TOKENS_ON_CPU, TOKENS_ON_DEVICE = 4096, 32_768
"""Tokens of a batch."""


class Network:
    """A model that is asked, with its tokenizer."""

    def __init__(self, model: KeuralMoECausalLM, tokenizer: KeuralTokenizer) -> None:
        """`model` in evaluation mode, where it will run."""
        self.model, self.tokenizer = model, tokenizer
        self.context_length: int = model.config.max_position_embeddings
        if model.config._attn_implementation != "sdpa":
            model.set_attn_implementation("sdpa")  # takes the masks that are made here
        if model.device.type == "cpu":
            model.set_experts_implementation("eager")  # the model's own loop, which reads the chosen experts only
        self.tokens = TOKENS_ON_CPU if model.device.type == "cpu" else TOKENS_ON_DEVICE

    def likelihoods(self, groups: Sequence[Sequence[Likelihood]]) -> Iterator[list[tuple[int, list[LogProb]]]]:
        """The answers to groups of requests, a list for each batch: the group's number and the answers in the requests' order.

        Groups that are the same are computed once. Raises `UserError` for a text that the context does not hold, and where the
        network's logits are not finite.
        """
        longest = max((request.length for group in groups for request in group), default=0)
        if longest > self.context_length:
            raise UserError(f"a text of {longest:,} tokens exceeds the model's context of {self.context_length:,}; shorten it")
        same: dict[tuple[Likelihood, ...], list[int]] = defaultdict(list)
        for number, group in enumerate(groups):
            same[tuple(group)].append(number)
        distinct, numbers = list(same), list(same.values())
        rows = list(rows_of(distinct, attention_cost(self.model.config)))
        for batch in batches(rows, self.tokens):
            found = self._batch(batch, distinct)
            yield [(number, answers) for group, answers in found.items() for number in numbers[group]]

    @torch.inference_mode()
    def _batch(self, rows: Sequence[Row], groups: Sequence[Sequence[Likelihood]]) -> dict[int, list[LogProb]]:
        device = self.model.device
        longest = len(rows[0].ids)
        padded = [row.ids + [self.tokenizer.pad_id] * (longest - len(row.ids)) for row in rows]
        depths = torch.tensor([row.depths + [0] * (longest - len(row.ids)) for row in rows], device=device)
        ends = torch.tensor([[*row.ends(), *range(len(row.ids) + 1, longest + 1)] for row in rows], device=device)
        hidden = self.model.model(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=tree_masks(ends, depths, self.model.config),
            position_ids=depths,
            use_cache=False,
        ).last_hidden_state
        edges = [(number * longest + edge.parent, edge) for number, row in enumerate(rows) for edge in row.edges]
        logprobs, greedy = self._predicted(hidden.flatten(0, 1), [place for place, _ in edges], [edge.label for _, edge in edges])
        return _gathered([edge for _, edge in edges], logprobs, greedy, groups)

    def _predicted(self, hidden: Tensor, parents: list[int], labels: list[int]) -> tuple[list[float], list[bool]]:
        """The log-probability of each label after its parent, and whether it is the most probable token there.

        A row of logits is computed once for all labels that are predicted from it.
        """
        weight = self.model.get_output_embeddings().weight
        places, which = torch.tensor(parents, device=hidden.device).unique(return_inverse=True)
        wanted = torch.tensor(labels, device=hidden.device)
        order = which.argsort(stable=True)
        found = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        best = torch.empty(len(labels), dtype=torch.bool, device=hidden.device)
        chunk = max(1, LOGITS_PER_CHUNK // weight.shape[0])
        bounds = torch.searchsorted(which[order], torch.arange(0, len(places) + chunk, chunk, device=hidden.device)).tolist()
        for number, start in enumerate(range(0, len(places), chunk)):
            logits = torch.nn.functional.linear(hidden[places[start : start + chunk]], weight).float()
            mine = order[bounds[number] : bounds[number + 1]]
            rows = which[mine] - start
            found[mine] = logits[rows, wanted[mine]] - logits.logsumexp(-1)[rows]
            best[mine] = logits.argmax(-1)[rows] == wanted[mine]
        return found.tolist(), best.tolist()


def attention_cost(config: KeuralConfig) -> float:
    """What attending to one more token costs, relative to all else that a layer does for a token; in products of matrices."""
    assert config.head_dim is not None
    heads = config.num_attention_heads * config.head_dim
    projections = 2 * config.hidden_size * (heads + config.num_key_value_heads * config.head_dim)
    experts = 3 * config.num_experts_per_tok * config.hidden_size * config.intermediate_size
    return 2 * heads / (projections + experts)


def tree_masks(ends: Tensor, depths: Tensor, config: KeuralConfig) -> dict[str, Tensor]:
    """For each type of layer who sees whom, ``[B, 1, T, T]`` bool: a token its ancestors and itself, within the window.

    `ends` and `depths` are ``[B, T]``; what fills a row up has itself alone.
    """
    places = torch.arange(ends.shape[1], device=ends.device)
    seen = (places[None, None, :] <= places[None, :, None]) & (ends[:, None, :] > places[None, :, None])
    masks = {"full_attention": seen[:, None]}
    if config.sliding_window is not None:
        near = depths[:, :, None] - depths[:, None, :] < config.sliding_window
        masks["sliding_attention"] = (seen & near)[:, None]
    return {kind: masks[kind] for kind in dict.fromkeys(config.layer_types)}


def _gathered(
    edges: Sequence[Edge], logprobs: Sequence[float], greedy: Sequence[bool], groups: Sequence[Sequence[Likelihood]]
) -> dict[int, list[LogProb]]:
    """The answers of each group from those of its tokens."""
    totals: dict[int, list[list[Any]]] = {}
    for edge, logprob, is_best in zip(edges, logprobs, greedy, strict=True):
        group = totals.setdefault(edge.group, [[0.0, True] for _ in groups[edge.group]])
        group[edge.request][0] += logprob
        group[edge.request][1] &= is_best
    found = {number: [LogProb(total, best) for total, best in group] for number, group in totals.items()}
    if any(answer.total != answer.total or answer.total == -float("inf") for answers in found.values() for answer in answers):
        raise UserError("the model's logits are not finite: its weights are damaged, or its precision is too small for them")
    return found
