"""AdamW over weights that are kept in two parts: bfloat16, which the network computes with, and a 16-bit remainder.

In: parameters with gradients. Out: changed parameters. A bfloat16 weight and its int16 remainder together are a float32 master
weight, bit for bit, so steps of any size count (at learning rate 2e-7 bfloat16 weights, and a 24-bit master too, lose most of
them). Moments are 8-bit, with a scale for each block of 256. 8.03 bytes per parameter with a bfloat16 gradient, of which
remainder, moments and scales (4.03) may lie in pinned host memory. Parameters in float32
(norms, routers) have the same moments and no remainder.

Sharded parameters have their state beside each part, in tensors that are sharded as they are: a block lies within a row (it is
shorter than 256 where that does not divide a row), so no part cuts one, and any number of processes has the same codes.

An 8-bit moment is a power of a number between 0 and 1, times the block's largest value: m = sign(c) (c/127)^2 and v = (c/255)^4,
so that small values beside a large one stay apart from zero; a second moment that is not zero is never stored as zero, which would
make the next step as large as epsilon allows.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from keural.errors import UserError
from keural.train.optimization.half_moments import flat, part
from keural.train.processes.modes import SCALE_BLOCK, scale_block

BLOCK = SCALE_BLOCK
CHUNK = 2**26
"""Parameters whose state lies together: 256 MiB of it. A power of two, because pinned memory is given in such sizes."""


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 tensor as bfloat16 and int16 remainder. Halves go up in the integer sense, so that the remainder fits 16 bits."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """The float32 tensor that `split` took apart."""
    return ((weight.view(torch.int16).to(torch.int32) << 16) + remainder.to(torch.int32)).view(torch.float32)


def halve(parameter: nn.Parameter, device: torch.device, exact: bool) -> Tensor:
    """Move a float32 parameter to `device`, in bfloat16 if `exact`; returns its float32 values for `SplitAdamW`."""
    master = parameter.data
    parameter.data = (split(master)[0] if exact else master.clone()).to(device)
    return master


def wide_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm of all gradients together, a scalar on the device; summed in float32."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    found: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return found


@dataclass(frozen=True)
class Rates:
    """What a step multiplies with: decay 1 - lr * weight_decay, lr / (1 - beta1^t), sqrt(1 - beta2^t), and the settings."""

    decay: float
    step_size: float
    root_correction: float
    beta1: float
    beta2: float
    eps: float


@dataclass
class ChunkState:
    """What a chunk of a parameter needs besides its weights: `remainder` (None for float32 parameters), the codes of both moments,
    and a scale of each per block.
    """

    remainder: Tensor | None
    moment: Tensor
    square: Tensor
    moment_scale: Tensor
    square_scale: Tensor
    block: int = BLOCK

    def named(self) -> list[tuple[str, Tensor]]:
        """All of them, with what they are."""
        rest = [(kind, getattr(self, kind)) for kind in ("moment", "square", "moment_scale", "square_scale")]
        return rest if self.remainder is None else [("remainder", self.remainder), *rest]

    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [tensor for _, tensor in self.named()]


def new_state(number: int, exact: bool, device: torch.device, pinned: bool = False, block: int = BLOCK) -> ChunkState:
    """Zeros for `number` parameters, with a remainder if `exact`, and scales of blocks of `block`."""

    def zeros(size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device, pin_memory=pinned)

    blocks = -(-number // block)
    return ChunkState(
        zeros(number, torch.int16) if exact else None,
        zeros(number, torch.int8),
        zeros(number, torch.uint8),
        zeros(blocks, torch.float32),
        zeros(blocks, torch.float32),
        block,
    )


def blocks_of(row: Tensor, block: int) -> Tensor:
    """A flat tensor as ``[blocks, block]`` in float32, zeros at the end."""
    return nn.functional.pad(row.float(), (0, -len(row) % block)).view(-1, block)


def encode(values: Tensor, signed: bool, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes ``[n]`` (int8 if `signed`, else uint8) and scales ``[blocks]`` of float32 values ``[n]``."""
    blocks = blocks_of(values, block)
    scales = blocks.abs().amax(1)
    share = (blocks.abs() / scales.clamp(min=1e-38)[:, None]).sqrt()
    if signed:
        codes = (share * 127 + 0.5).floor() * blocks.sign()
        return codes.to(torch.int8).view(-1)[: len(values)], scales
    codes = (share.sqrt() * 255 + 0.5).floor()
    codes = torch.where((blocks > 0) & (codes < 1), 1.0, codes)
    return codes.to(torch.uint8).view(-1)[: len(values)], scales


def decode(codes: Tensor, scales: Tensor, block: int = BLOCK) -> Tensor:
    """The values that `encode` stored, nearly."""
    blocks = blocks_of(codes, block)
    if codes.dtype == torch.int8:
        share = blocks / 127
        values = share * share.abs() * scales[:, None]
    else:
        share = (blocks / 255).square()
        values = share * share * scales[:, None]
    return values.view(-1)[: len(codes)]


def adamw(master: Tensor, gradient: Tensor, moment: Tensor, square: Tensor, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """Master weights and moments after a step of AdamW (Loshchilov and Hutter 2019), all float32."""
    moment = moment * rates.beta1 + gradient * (1 - rates.beta1)
    square = square * rates.beta2 + gradient * gradient * (1 - rates.beta2)
    master = master * rates.decay
    master = master - rates.step_size * moment / (square.sqrt() / rates.root_correction + rates.eps)
    return master, moment, square


def plain_update(weight: Tensor, gradient: Tensor, state: ChunkState, rates: Rates, factor: Tensor, skip: Tensor) -> None:
    """One step on a chunk, in place: the twin of the kernel.

    Args:
        weight: flat, bfloat16 with a remainder or float32.
        gradient: flat, any float dtype.
        state: of the chunk, on the same device.
        rates: of the step.
        factor: scalar that the gradient is multiplied with (clipping).
        skip: scalar; when not zero nothing changes.
    """
    master = weight if state.remainder is None else join(weight, state.remainder)
    block = state.block
    moment, square = decode(state.moment, state.moment_scale, block), decode(state.square, state.square_scale, block)
    master, moment, square = adamw(master, gradient.float() * factor, moment, square, rates)
    new: list[Tensor] = [*encode(moment, True, block), *encode(square, False, block)]
    stored: list[Tensor] = [state.moment, state.moment_scale, state.square, state.square_scale]
    if state.remainder is None:
        new, stored = [*new, master], [*stored, weight]
    else:
        new, stored = [*new, *split(master)], [*stored, weight, state.remainder]
    for old, value in zip(stored, new, strict=True):
        old.copy_(torch.where(skip == 0, value, old))


def update(weight: Tensor, gradient: Tensor, state: ChunkState, rates: Rates, factor: Tensor, skip: Tensor) -> None:
    """`plain_update`, by the kernel where there is an accelerator."""
    if not weight.is_cuda:
        plain_update(weight, gradient, state, rates, factor, skip)
        return
    from keural.train.network.kernels import split_adamw

    split_adamw(
        weight, state.remainder, gradient, state.moment, state.square, state.moment_scale, state.square_scale, factor, skip,
        state.block, rates.decay, rates.step_size, rates.root_correction, rates.beta1, rates.beta2, rates.eps,
    )  # fmt: skip


@dataclass
class Chunk:
    """A piece of this rank's part of a parameter: its parameter, where it begins, its state, and whether it decays."""

    parameter: nn.Parameter
    start: int
    number: int
    state: ChunkState
    decayed: bool

    @property
    def weight(self) -> Tensor:
        """The piece, flat, in the parameter's memory."""
        return flat(self.parameter)[self.start : self.start + self.number]

    @property
    def gradient(self) -> Tensor:
        """The piece's gradient, flat."""
        assert self.parameter.grad is not None
        return flat(self.parameter.grad)[self.start : self.start + self.number]


class SplitAdamW:
    """AdamW whose state is split into chunks; with `host` the state lies in pinned host memory and visits the device in each step.

    `masters` gives float32 values to start from, one after another in the order of the parameters, so that none is kept longer than
    needed; without it the bfloat16 weights are the masters. Of sharded parameters, masters and state are this rank's parts.
    `block_of` says how many weights of a parameter share a scale.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        host: bool = False,
        masters: Iterable[Tensor] | None = None,
        is_decayed: Callable[[Tensor], bool] = lambda parameter: parameter.ndim >= 2,
        block_of: Callable[[Tensor], int] = lambda parameter: scale_block(parameter.shape),
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.betas, self.eps, self.weight_decay, self.host, self.steps = betas, eps, weight_decay, host, 0
        self.chunks: list[Chunk] = []
        self._whole: dict[nn.Parameter, ChunkState] = {}
        self._block_of = block_of
        given = iter(masters) if masters is not None else None
        for parameter in self.parameters:
            master = next(given) if given is not None else None  # it may be what makes the parameter bfloat16
            chunks = list(self._chunks(parameter, is_decayed(parameter)))
            self.chunks += chunks
            if master is not None:
                _set_master(chunks, master)

    def _chunks(self, parameter: nn.Parameter, decayed: bool) -> Iterator[Chunk]:
        local, block = part(parameter), self._block_of(parameter)
        assert local.is_contiguous(), "a parameter must lie in one piece"
        if local.shape[-1] % block:
            raise UserError(
                f"train.precision split cannot divide rows of {parameter.shape[-1]} weights into parts of {local.shape[-1]}: "
                f"blocks of {block} share a scale; start fewer processes, or set train.precision to fp32-bf16m"
            )
        exact, number = parameter.dtype == torch.bfloat16, local.numel()
        if not self.host:
            self._whole[parameter] = new_state(number, exact, local.device, block=block)
        for start in range(0, number, CHUNK):
            size = min(CHUNK, number - start)
            if self.host:
                state = new_state(size, exact, torch.device("cpu"), parameter.is_cuda, block)
            else:
                state = _piece(self._whole[parameter], start, size)
            yield Chunk(parameter, start, size, state, decayed)

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The float32 master of a parameter, on its device; sharded as it is."""
        local = part(parameter)
        found = torch.empty(local.shape, dtype=torch.float32, device=local.device)
        for chunk in self.chunks:
            if chunk.parameter is parameter:
                remainder = chunk.state.remainder
                values = chunk.weight if remainder is None else join(chunk.weight, remainder.to(local.device))
                found.view(-1)[chunk.start : chunk.start + chunk.number] = values
        return _sharded_as(parameter, found)

    def restore_masters(self, policy: nn.Module) -> None:
        """Make every parameter of `policy` its float32 master again; parts of sharded ones pass through the host. The optimizer
        cannot be used afterwards.
        """
        kept: dict[nn.Parameter, Tensor] = {}
        for parameter in self.parameters:
            parameter.grad = None
            if isinstance(parameter, DTensor):  # whose type only the module may change
                kept[parameter] = part(self.master(parameter)).cpu()
            else:
                parameter.data = self.master(parameter)
        self.chunks, self._whole = [], {}
        policy.float()
        for parameter, master in kept.items():
            part(parameter).copy_(master)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, or set them to zero."""
        for parameter in self.parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def forget(self) -> None:
        """Set all moments to zero, and the number of steps taken."""
        self.steps = 0
        for chunk in self.chunks:
            for tensor in (chunk.state.moment, chunk.state.square, chunk.state.moment_scale, chunk.state.square_scale):
                tensor.zero_()

    def state_tensors(self, names: Mapping[nn.Parameter, str]) -> dict[str, Tensor]:
        """All state by name, sharing memory: `<kind>.<parameter's name>`, sharded as the parameter is, the kinds being the tensors
        of `ChunkState`; with `host` `<kind>.<parameter's name>.<number of the chunk in it>`.
        """
        found = {}
        for parameter, state in self._whole.items():
            shape = part(parameter).shape
            for kind, tensor in state.named():
                last = shape[-1] // (state.block if kind.endswith("_scale") else 1)
                found[f"{kind}.{names[parameter]}"] = _sharded_as(parameter, tensor.view(*shape[:-1], last))
        if self.host:
            for chunk in self.chunks:
                for kind, tensor in chunk.state.named():
                    found[f"{kind}.{names[chunk.parameter]}.{chunk.start // CHUNK}"] = tensor
        return found

    def step(self, lr: float, clip_norm: float = math.inf, norm: Tensor | None = None) -> Tensor:
        """Do one step at learning rate `lr`; returns the gradient norm (`norm` where it is known already), on the device.

        Gradients longer than `clip_norm` are shortened to it. When the norm is not finite nothing changes, neither weights nor
        moments. Nothing is read back from the device.
        """
        self.steps += 1
        norm = wide_norm(p.grad for p in self.parameters if p.grad is not None) if norm is None else norm
        factor, skip = (clip_norm / (norm + 1e-6)).clamp(max=1.0), (~norm.isfinite()).to(torch.int32)
        run = self._step_on_host if self.host and norm.is_cuda else self._step_in_place
        run(lr, factor, skip)
        return norm

    def rates(self, lr: float, decayed: bool) -> Rates:
        """The factors of the current step."""
        (beta1, beta2), t = self.betas, self.steps
        decay = 1 - lr * self.weight_decay if decayed else 1.0
        return Rates(decay, lr / (1 - beta1**t), math.sqrt(1 - beta2**t), beta1, beta2, self.eps)

    def _step_in_place(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        for chunk in self.chunks:
            if chunk.parameter.grad is not None:
                update(chunk.weight, chunk.gradient, chunk.state, self.rates(lr, chunk.decayed), factor, skip)

    def _step_on_host(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Three chunks are under way at a time: one coming, one being worked on, one going back."""
        device: Any = factor.device
        coming, going, here = torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.current_stream(device)
        chunks = [chunk for chunk in self.chunks if chunk.parameter.grad is not None]
        largest = max(chunk.number for chunk in chunks)
        finest = min(chunk.state.block for chunk in chunks)
        staging = [new_state(largest, True, device, block=finest) for _ in range(3)]
        coming.wait_stream(here)
        free: list[torch.cuda.Event | None] = [None] * len(staging)
        for index, chunk in enumerate(chunks):
            slot = index % len(staging)
            state = _piece(staging[slot], 0, chunk.number, like=chunk.state)
            with torch.cuda.stream(coming):
                if (event := free[slot]) is not None:
                    coming.wait_event(event)
                _copy(chunk.state, state)
                arrived = coming.record_event()
            here.wait_event(arrived)
            update(chunk.weight, chunk.gradient, state, self.rates(lr, chunk.decayed), factor, skip)
            done = here.record_event()
            with torch.cuda.stream(going):
                going.wait_event(done)
                _copy(state, chunk.state)
                free[slot] = going.record_event()
        here.wait_stream(going)


def _set_master(chunks: Sequence[Chunk], master: Tensor) -> None:
    """Write a parameter's float32 values into its chunks."""
    for chunk in chunks:
        piece = master.reshape(-1)[chunk.start : chunk.start + chunk.number].to(chunk.weight.device)
        if chunk.state.remainder is None:
            chunk.weight.copy_(piece)
        else:
            weight, remainder = split(piece.float())
            chunk.weight.copy_(weight)
            chunk.state.remainder.copy_(remainder)


def _piece(whole: ChunkState, start: int, number: int, like: ChunkState | None = None) -> ChunkState:
    """`number` weights of a state from `start` on, sharing its memory; with blocks as `like` has them, and no remainder if it has
    none.
    """
    like = like or whole
    block = like.block
    here, scales = slice(start, start + number), slice(start // block, -(-(start + number) // block))
    remainder = None if like.remainder is None or whole.remainder is None else whole.remainder[here]
    return ChunkState(
        remainder, whole.moment[here], whole.square[here], whole.moment_scale[scales], whole.square_scale[scales], block
    )


def _sharded_as(parameter: Tensor, local: Tensor) -> Tensor:
    """A rank's part as a tensor that is divided as `parameter` is; its last dimension may be another."""
    if not isinstance(parameter, DTensor):
        return local
    cut = sum(placement.is_shard(parameter.ndim - 1) for placement in parameter.placements)
    last = local.shape[-1] if not cut else local.shape[-1] * parameter.shape[-1] // part(parameter).shape[-1]
    shape = torch.Size([*parameter.shape[:-1], last])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride)


def _copy(source: ChunkState, target: ChunkState) -> None:
    for a, b in zip(source.tensors(), target.tensors(), strict=True):
        b.copy_(a, non_blocking=True)
