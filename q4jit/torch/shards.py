"""The part of a weight that one of several processes holds.

    axis "N"   a range of columns, which are rows of the GGUF tensor
    axis "K"   a range of blocks of every column

Lengths are divided as `Shard` of `torch.distributed.tensor` divides them, so that parts of weights
fit parts of activations: every process has ⌈length / processes⌉, the last one may have less.
"""

from typing import Final, Literal

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from q4jit.errors import ArgumentError, expected
from q4jit.torch.weight import Weight

Axis = Literal["K", "N"]
_SHOWN_COUNTS: Final = 8
_SMALL_BLOCK: Final = 32  # elements: of formats that are not k-quants


def part(length: int, processes: int, rank: int) -> range:
    """Return what one of several processes has of a length."""
    step = -(-length // processes)
    return range(min(rank * step, length), min((rank + 1) * step, length))


def check_divides(weight: Weight, axis: Axis, processes: int, where: str, instead: str) -> None:
    """Raise ArgumentError unless each process gets whole blocks, or at least one column.

    where: the module. instead: a cure beside another number of processes.
    """
    each = f"on each of {processes} processes"
    if axis == "N":
        if not _divides(weight.N, 1, processes):
            cure = f"use fewer processes{instead}"
            raise ArgumentError(
                expected(f"a column {each}", f"N = {weight.N}", where=where, cure=cure)
            )
        return
    block = weight.stored.block_format.block_elements
    if _divides(weight.K, block, processes):
        return
    count = weight.K // block
    fitting = [n for n in range(1, count + 1) if _divides(weight.K, block, n)]
    cure = f"use {_listed(fitting)}{instead}"
    if block > _SMALL_BLOCK and _divides(weight.K, _SMALL_BLOCK, processes):
        cure += f", or a format with blocks of {_SMALL_BLOCK} elements"
    blocks = f"{count} block{'s' * (count > 1)} of {block}"
    got = f"K = {weight.K}, which is {blocks} elements in {weight.format}"
    raise ArgumentError(expected(f"whole blocks of K {each}", got, where=where, cure=cure))


def _divides(length: int, block: int, processes: int) -> bool:
    first, last = (part(length, processes, rank) for rank in (0, processes - 1))
    return len(first) % block == 0 and len(last) > 0


def _listed(counts: list[int]) -> str:
    *first, last = map(str, counts[:_SHOWN_COUNTS])
    return f"{', '.join(first)} or {last} processes" if first else f"{last} process"


def take(whole: Tensor, dim: int | None, mesh: DeviceMesh) -> Tensor:
    """Return this process's part of its own tensor along an axis; None gives all of it."""
    if dim is None:
        return whole
    own = part(whole.shape[dim], mesh.size(), mesh.get_local_rank())
    return whole.narrow(dim, own.start, len(own)).contiguous()


def own_part(whole: Tensor, dim: int | None, mesh: DeviceMesh, source: int | None) -> Tensor:
    """Return this process's part of a tensor along an axis, on the mesh's device.

    dim: None gives all of it. source: the process of the mesh whose tensor is divided, or None if
    each takes its part of its own tensor, without communication.
    """
    if source is None:
        own = take(whole, dim, mesh)
        return own if own.device.type in {mesh.device_type, "meta"} else own.to(mesh.device_type)
    placement = Replicate() if dim is None else Shard(dim)
    return distribute_tensor(whole, mesh, [placement], src_data_rank=source).to_local()


def own_weight(weight: Weight, axis: Axis, mesh: DeviceMesh, source: int | None) -> Weight:
    """Return this process's part of a weight, on the mesh's device; on "meta" if it is there.

    source: as in `own_part`.
    """
    ((key, whole),) = weight.state_dict().items()
    blocks, dim = _blocks(whole, weight, axis)
    own = own_part(blocks, dim, mesh, source)
    *experts, n, count, _ = own.shape
    shape = (*experts, count * weight.stored.block_format.block_elements, n)
    new = Weight.empty(weight.format, shape, device="meta", lookup=weight.lookup)
    if not own.is_meta:
        new.load_state_dict({key: own.flatten(-2)}, assign=True)
    return new


def own_entry(whole: Tensor, weight: Weight, axis: Axis, mesh: DeviceMesh) -> Tensor:
    """Return this process's part of the entry that a weight has in a state.

    whole: uint8 [N, column_bytes], or [E, N, column_bytes]. weight: has its format.
    """
    blocks, dim = _blocks(whole, weight, axis)
    return take(blocks, dim, mesh).flatten(-2)


def _blocks(whole: Tensor, weight: Weight, axis: Axis) -> tuple[Tensor, int]:
    """Return the blocks of an entry, uint8 [..., N, blocks, bytes], and the axis to divide."""
    blocks = whole.reshape(*whole.shape[:-1], -1, weight.stored.block_format.block_bytes)
    return blocks, blocks.dim() - (3 if axis == "N" else 2)
