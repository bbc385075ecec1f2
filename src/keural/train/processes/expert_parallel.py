"""Experts that are divided among neighbouring ranks: which ranks have the same ones, and which have the others.

In: the ranks and how many share a copy of the weights. Out: the two meshes of the experts' tensors; layers whose experts are this
rank's alone.
"""

from typing import Any, NamedTuple

from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from keural.lora.layers import bare
from keural.model import KeuralMoECausalLM
from keural.train.processes.ranks import Ranks

NAME = "expert"
"""Of the dimension of a mesh along which ranks have other experts."""


class ExpertMesh(NamedTuple):
    """`among`: the neighbours that have all experts together. `of_each`: the ranks that have the same experts, in two dimensions
    where there are copies of the weights.
    """

    among: DeviceMesh
    of_each: DeviceMesh


def expert_mesh(ranks: Ranks, shards: int, expert_parallel: int) -> ExpertMesh:
    """The ranks in order, `shards` of which share a copy, `expert_parallel` neighbours of these the experts of a layer."""
    shape, names = (shards // expert_parallel, expert_parallel), ("width", NAME)
    if shards == ranks.world:
        mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=names)
        return ExpertMesh(mesh[NAME], mesh["width"])
    mesh = init_device_mesh(ranks.device.type, (ranks.world // shards, *shape), mesh_dim_names=("copy", *names))
    return ExpertMesh(mesh[NAME], mesh["copy", "width"])


def divide_experts(experts: nn.Module, among: DeviceMesh) -> None:
    """Leave a layer's experts with those of this rank; names and shapes stay those of all."""
    for name, parameter in list(experts.named_parameters(recurse=False)):
        own = distribute_tensor(parameter.detach(), among, [Shard(0)], src_data_rank=None)
        experts.register_parameter(name, nn.Parameter(own, requires_grad=parameter.requires_grad))


def expert_group(model: KeuralMoECausalLM) -> ProcessGroup | None:
    """The ranks that have all experts of a layer together; None where each has all of them."""
    layer: Any = model.model.layers[0]
    tensor = bare(layer.mlp.experts).gate_up_proj
    if not isinstance(tensor, DTensor) or NAME not in (tensor.device_mesh.mesh_dim_names or ()):
        return None
    return tensor.device_mesh.get_group(NAME)
