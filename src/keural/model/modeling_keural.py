"""The Keural network: a decoder of pre-norm blocks, grouped-query attention and a top-k mixture of SwiGLU experts, tied head.

In: token ids (or embeddings), optionally positions, a mask and a cache. Out: hidden states (`KeuralMoEModel`) or logits
and losses (`KeuralMoECausalLM`). The same code trains, generates, and runs in engines that read transformers models; the
comments say where such a reader prescribes the form. The file needs only torch, transformers and the configuration beside
it: it is copied next to exported weights and loaded with ``trust_remote_code=True``.

Letters in shapes: B rows, T positions, N = B·T tokens, V vocabulary, H hidden size, D head width, E experts of width I,
K of them per token.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_keural import KeuralConfig

MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}

# On disk every expert is three plain matrices, which quantizers and serving engines expect; in memory they are fused.
# transformers applies the list when loading and its inverse when saving, for custom models only if it is registered.
register_checkpoint_conversion_mapping(
    "keural",
    [
        WeightConverter(
            source_patterns=["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns="mlp.experts.*.down_proj.weight",
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ],
    overwrite=True,
)


class KeuralRMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, computed in float32 (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise ``[..., H]``; the result has the input's dtype times the weight's."""
        dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(dtype)

    def extra_repr(self) -> str:
        """Shape and epsilon, for printing the model."""
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class KeuralRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), half-split layout, computed in float32."""

    inv_freq: torch.Tensor
    original_inv_freq: torch.Tensor

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__()
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        inverse_frequencies, self.attention_scaling = self._compute()
        self.register_buffer("inv_freq", inverse_frequencies, persistent=False)
        self.register_buffer("original_inv_freq", inverse_frequencies.clone(), persistent=False)

    def _compute(self) -> tuple[torch.Tensor, float]:
        """Inverse frequencies ``[D / 2]`` in float32 and the scale of the cosines for the configured rope type."""
        compute = ROPE_INIT_FUNCTIONS.get(self.rope_type, self.compute_default_rope_parameters)
        return compute(self.config)

    @staticmethod
    def compute_default_rope_parameters(config: KeuralConfig, **kwargs: Any) -> tuple[torch.Tensor, float]:
        """theta^(-2i/D) for i in 0 .. D/2 - 1, and no scaling of the cosines."""
        assert config.head_dim is not None  # filled in by the configuration
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / config.rope_parameters["rope_theta"] ** exponent, 1.0

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "KeuralRotaryEmbedding":
        """Move with the model but stay in float32: bfloat16 frequencies are off by many radians at late positions."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            inverse_frequencies = self._compute()[0].to(self.inv_freq.device)
            self.inv_freq, self.original_inv_freq = inverse_frequencies, inverse_frequencies.clone()
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines ``[B, T, D]`` of ``position_ids`` ``[B, T]`` in the dtype of ``x``."""
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cosines.to(x.dtype), sines.to(x.dtype)


def rotate(states: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Turn heads ``[B, heads, T, D]``: dimension i pairs with i + D/2, angles ``[B, T, D]``."""
    first, second = states.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return states * cosines.unsqueeze(1) + turned * sines.unsqueeze(1)


def eager_attention_forward(
    module: "KeuralAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: query ``[B, heads, T, D]``, key and value ``[B, kv heads, S, D]``, mask added to the scores.

    Returns the output ``[B, T, heads, D]`` and the weights ``[B, heads, T, S]``. Query head h reads key-value head h // groups.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class KeuralAttention(nn.Module):
    """Causal grouped-query attention with rotary positions; sliding or full by the layer's entry in ``layer_types``."""

    def __init__(self, config: KeuralConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # filled in by the configuration
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim: int = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.layer_type = config.layer_types[layer_idx]
        self.sliding_window = config.sliding_window if self.layer_type == "sliding_attention" else None
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within ``[B, T, H]`` (and the cache); returns the output ``[B, T, H]`` and the weights where computed."""
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query_states = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        key_states = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)

        cosines, sines = position_embeddings
        query_states = rotate(query_states, cosines, sines)
        key_states = rotate(key_states, cosines, sines)
        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attention_interface: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attention_output, attention_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        attention_output = attention_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attention_output), attention_weights


class KeuralTopKRouter(nn.Module):
    """Linear router: softmax over all experts in float32, the K largest, renormalised to sum to one."""

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route tokens ``[N, H]``; returns logits ``[N, E]`` in the model's dtype, weights and expert indices ``[N, K]``."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        router_logits = F.linear(hidden_states, self.weight)
        probabilities = F.softmax(router_logits, dim=-1, dtype=torch.float32)
        top_k_weights, top_k_index = torch.topk(probabilities, self.top_k, dim=-1)
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights.to(hidden_states.dtype), top_k_index


@use_experts_implementation
class KeuralExperts(nn.Module):
    """E SwiGLU networks (Shazeer 2020, eq. 6) in two tensors.

    ``gate_up_proj`` is ``[E, 2I, H]``, gate rows first, ``down_proj`` ``[E, H, I]``. The forward below is the ``eager``
    implementation; transformers exchanges it by ``config._experts_implementation``.
    """

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__()
        self.num_experts = config.num_local_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Mix the chosen experts of tokens ``[N, H]`` by indices and weights ``[N, K]``; returns ``[N, H]``.

        Assignments are sorted by expert once, then each expert works on a contiguous slice. Gathering with index_select
        and scattering with index_add_ keeps forward and backward bit-reproducible on a CPU, which indexing does not.
        An index of E or more marks an expert of another process: it adds nothing here. A single token needs no sorting;
        with gradients it takes the long way too, where every expert has one, if only of zeros.
        """
        if hidden_states.shape[0] == 1 and not torch.is_grad_enabled():
            return self._mix_one(hidden_states, top_k_index[0].tolist(), top_k_weights[0])
        expert_of_assignment, order = top_k_index.reshape(-1).sort(stable=True)
        token_of_assignment = order // top_k_index.shape[-1]
        sizes = torch.bincount(expert_of_assignment, minlength=self.num_experts).tolist()[: self.num_experts]
        local = sum(sizes)
        slices = hidden_states.index_select(0, token_of_assignment[:local]).split(sizes)
        outputs = [
            self._expert(states, gate_up, down)
            for states, gate_up, down in zip(slices, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        ]
        weights = top_k_weights.reshape(-1).index_select(0, order[:local])
        weighted = torch.cat(outputs) * weights.unsqueeze(-1)
        return torch.zeros_like(hidden_states).index_add_(0, token_of_assignment[:local], weighted.to(hidden_states.dtype))

    def _mix_one(self, hidden_states: torch.Tensor, experts: list[int], weights: torch.Tensor) -> torch.Tensor:
        """The experts of one token ``[1, H]`` in the order of their weights ``[K]``: what decoding does at each step."""
        mixed = torch.zeros_like(hidden_states)
        for expert, weight in zip(experts, weights, strict=True):
            if expert < self.num_experts:
                output = self._expert(hidden_states, self.gate_up_proj[expert], self.down_proj[expert])
                mixed = mixed + (output * weight).to(hidden_states.dtype)
        return mixed

    def _expert(self, states: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """One expert on its tokens ``[n, H]``."""
        gate, up = F.linear(states, gate_up).chunk(2, dim=-1)
        return F.linear(self.act_fn(gate) * up, down)


class KeuralSparseMoeBlock(nn.Module):
    """Router and experts. One tensor out and no other child with weights, so that engines can replace the block as a whole."""

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__()
        self.gate = KeuralTopKRouter(config)
        self.experts = KeuralExperts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """``[B, T, H]`` to ``[B, T, H]``."""
        shape = hidden_states.shape
        hidden_states = hidden_states.reshape(-1, shape[-1])
        _, top_k_weights, top_k_index = self.gate(hidden_states)
        hidden_states = self.experts(hidden_states, top_k_index, top_k_weights)
        return hidden_states.reshape(shape)


class KeuralDecoderLayer(GradientCheckpointingLayer):
    """One block: x + attention(norm(x)), then x + experts(norm(x))."""

    def __init__(self, config: KeuralConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = KeuralAttention(config, layer_idx)
        self.mlp = KeuralSparseMoeBlock(config)
        self.input_layernorm = KeuralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = KeuralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """``[B, T, H]`` to ``[B, T, H]``."""
        attention_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        hidden_states = hidden_states + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class KeuralPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every Keural model: capabilities, sharding hints and initialisation."""

    config_class = KeuralConfig
    config: KeuralConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["KeuralDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "router_logits": OutputRecorder(KeuralTopKRouter, index=0),
        "hidden_states": KeuralDecoderLayer,
        "attentions": KeuralAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every matrix from N(0, initializer_range²) with no scaling by depth; norms are one, rotary buffers computed."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, KeuralTopKRouter):
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, KeuralExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)


class KeuralMoEModel(KeuralPreTrainedModel):
    """The decoder without its head: token ids to normalised hidden states."""

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__(config)
        # No padding_idx: the published model trains every row of the tied embedding alike.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([KeuralDecoderLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = KeuralRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = KeuralRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: tokens ``[B, T]``; or give ``inputs_embeds`` ``[B, T, H]`` instead.
            attention_mask: ``[B, S]`` with 0 on padding, S counting the cached tokens too; or a dict with one mask per
                layer type, already in the form of the attention implementation.
            position_ids: ``[B, T]``, by default counted on from the cache. Without mask and cache, a position that does
                not follow its left neighbour starts a new document: documents packed in a row do not see each other.
            past_key_values: cache to read and extend.
            inputs_embeds: embeddings in place of ``input_ids``.
            use_cache: return a cache; makes one when none is given, bounded on sliding layers.
            kwargs: ``output_router_logits=True`` adds ``router_logits``, one ``[N, E]`` per layer; ``output_hidden_states``
                and ``output_attentions`` as usual; the rest goes to the attention function.

        Returns:
            ``last_hidden_state`` ``[B, T, H]`` after the final norm, ``past_key_values``, and what was asked to be recorded.

        Raises:
            ValueError: when not exactly one of ``input_ids`` and ``inputs_embeds`` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        masks = self._masks(inputs_embeds, attention_mask, past_key_values, position_ids)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer_type, layer in zip(self.config.layer_types, self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )

    def _masks(
        self, inputs_embeds: torch.Tensor, attention_mask: Any, past_key_values: Cache | None, position_ids: torch.Tensor
    ) -> dict[str, Any]:
        """The mask of each layer type in use, made once per forward; a prepared dict passes through."""
        if isinstance(attention_mask, dict):
            return attention_mask
        return {
            layer_type: make(
                config=self.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            for layer_type, make in MASKS.items()
            if layer_type in self.config.layer_types
        }


def router_losses(
    router_logits: tuple[torch.Tensor, ...], top_k: int, counted: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Balance and z-loss of one forward, each the mean over the layers of its per-layer value, in float32.

    Per layer, over the counted tokens: the balance loss is E · Σ_e P_e · f_e with P_e the mean router probability of expert e
    and f_e its share of the N·K assignments, so that Σ f_e = 1 and a balanced layer scores 1 (Fedus et al. 2021, eq. 4-6; the
    gradient flows through P only). The z-loss is the mean of logsumexp(logits)² (Zoph et al. 2022, eq. 5).

    Args:
        router_logits: one ``[N, E]`` per layer.
        top_k: experts per token.
        counted: ``[N]``, nonzero on the tokens that count; None counts all.

    Returns:
        The two scalars, without coefficients.
    """
    if counted is None:
        counted = torch.ones(router_logits[0].shape[0], device=router_logits[0].device)
    share = (counted != 0).to(torch.float32)
    share = share / share.sum().clamp(min=1.0)
    balance, z = [], []
    for layer_logits in router_logits:
        logits = layer_logits.to(device=share.device, dtype=torch.float32)
        probabilities = logits.softmax(dim=-1)
        chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(top_k, dim=-1).indices, 1.0 / top_k)
        balance.append(logits.shape[-1] * ((share @ probabilities) * (share @ chosen)).sum())
        z.append(share @ logits.logsumexp(dim=-1).square())
    return torch.stack(balance).mean(), torch.stack(z).mean()


class KeuralMoECausalLM(KeuralPreTrainedModel, GenerationMixin):
    """The language model: decoder and a head that is the embedding (``tie_word_embeddings``); logits are not scaled."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    _pp_plan: ClassVar[dict[str, Any]] = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}

    def __init__(self, config: KeuralConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class name, and misses ours
        self.model = KeuralMoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run the model; the arguments of `KeuralMoEModel.forward` and:

        Args:
            labels: ``[B, T]``, unshifted as everywhere in transformers: the logits of position t are scored against
                ``labels[:, t + 1]``, entries of -100 are left out, and ``loss`` is the mean over the others (or their sum over
                ``num_items_in_batch``). In packed rows, label the first token of each document -100.
            output_router_logits: return the routers' logits and ``aux_loss``; by default as the config says.
            logits_to_keep: compute logits of the last so many positions only (0: of all), or of the positions given.

        Returns:
            ``logits`` ``[B, T', V]``; ``loss`` when there are labels; with router logits also ``aux_loss`` =
            ``router_aux_loss_coef`` · balance + ``router_z_loss_coef`` · z of `router_losses`, coefficients included, over the
            tokens that a 2-D ``attention_mask`` does not mark as padding (without one over all), already added to ``loss``.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            length = outputs.last_hidden_state.shape[1]
            aux_loss = self._aux_loss(outputs.router_logits, attention_mask, length)
            loss = None if loss is None else loss + aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _aux_loss(self, router_logits: tuple[torch.Tensor, ...], attention_mask: Any, length: int) -> torch.Tensor:
        """Weighted sum of the router losses over the non-padding tokens of the ``length`` current positions."""
        counted = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            counted = attention_mask[:, -length:].reshape(-1).to(router_logits[0].device)
        balance, z = router_losses(router_logits, self.config.num_experts_per_tok, counted)
        return self.config.router_aux_loss_coef * balance + self.config.router_z_loss_coef * z


__all__ = ["KeuralMoECausalLM", "KeuralMoEModel", "KeuralPreTrainedModel", "router_losses"]
