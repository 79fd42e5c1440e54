"""Between files and device buffers, one block of one leaf at a time: what bounds the host memory of import and export.

jax.make_array_from_callback would hold every local shard of a leaf on the host at once. Here a block is read once,
cut for each device and written into its buffer in place, then freed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from smallmath_jax.models import tensors
from smallmath_jax.models.weight_table import Published

BLOCK_BYTES = 32 << 20  # of file data on the host at once, or one layer where that is larger
_SMALL_BYTES = 1 << 20  # less is fetched whole: cheaper than compiling a slice


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of our leaves lies: file tensors, one a layer, and the leaf's first row in each (fused tensors)."""

    kind: str
    stacked: bool
    stored: tuple[tensors.Stored, ...]
    offset: int


@functools.partial(jax.jit, donate_argnums=0)
def _put(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(buffer, block, start, 0)


def fill(shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype, source: Source) -> jax.Array:
    """One leaf on its devices, `sharding` and `dtype` as given. On many hosts each reads what its own devices hold."""
    boxes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # replicas share a box
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    spans = [
        (min(box[axis][0] for box in boxes), max(box[axis][1] for box in boxes))
        for axis in range(len(shape))
    ]
    buffers: dict[jax.Device, jax.Array] = {}
    for first, last in _blocks(boxes, shape, source):
        block = _read(source, shape, first, last, spans)
        for box, devices in boxes.items():
            start, stop = box[0]
            if first < start or stop < last:
                continue
            inner = [slice(a - s, b - s) for (a, b), (s, _) in zip(box[1:], spans[1:], strict=True)]
            cut = block[(slice(None), *inner)].astype(dtype, order="C")
            for device in devices:
                if (first, last) == (start, stop):
                    buffers[device] = jax.device_put(cut, device)
                    continue
                if first == start:
                    size = tuple(high - low for low, high in box)
                    buffers[device] = jnp.zeros(size, dtype, device=device)
                buffers[device] = _put(buffers[device], cut, np.int32(first - start))
        jax.block_until_ready(buffers)  # so that the host copy can go before the next is read
    ordered = [buffers[device] for device in sharding.addressable_devices_indices_map(shape)]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered)


def _blocks(
    boxes: Iterable[tuple[tuple[int, int], ...]], shape: tuple[int, ...], source: Source
) -> list[tuple[int, int]]:
    """Ranges of the leaf's first axis to read one after another; none crosses a shard's border."""
    ranges = sorted({box[0] for box in boxes})
    if source.kind != "same" and not source.stacked:
        return ranges  # the first axis is the file's second: no gain from cutting it
    row_bytes = math.prod(shape[1:]) * source.stored[0].dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    return [
        (first, min(first + step, stop))
        for start, stop in ranges
        for first in range(start, stop, step)
    ]


def _read(
    source: Source, shape: tuple[int, ...], first: int, last: int, spans: list[tuple[int, int]]
) -> np.ndarray:
    """Leaf rows first:last of the first axis in file dtype, the other axes cut to `spans`."""
    if source.kind == "same" and not source.stacked:
        block = tensors.read_rows(source.stored[0], source.offset + first, source.offset + last)
        return block[(slice(None), *(slice(*span) for span in spans[1:]))]
    axis = 1 if source.kind == "same" else len(shape) - 1  # ours that is the file's first
    low, high = (source.offset + end for end in spans[axis])
    layers = source.stored[first:last] if source.stacked else source.stored
    blocks = [tensors.read_rows(stored, low, high) for stored in layers]
    if source.kind != "same":
        # [out, ...] -> [in, out], a view
        blocks = [block.reshape(high - low, -1).T for block in blocks]
    if not source.stacked:
        return blocks[0][first:last]
    block = blocks[0][None] if len(blocks) == 1 else np.stack(blocks)
    return block[:, slice(*spans[1])] if source.kind != "same" else block


def stream(entries: Mapping[str, Published], leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """The tensors' elements in file order, in pieces of about BLOCK_BYTES or one layer."""
    for entry in entries.values():
        for name in entry.row.ours:
            leaf = leaves[name]
            if entry.layer is not None:
                piece = fetch(leaf, entry.layer, 1)[0]
                yield piece.T if entry.row.kind == "matrix" else piece
            elif entry.row.kind == "same":
                row_bytes = math.prod(leaf.shape[1:]) * leaf.dtype.itemsize
                step = max(1, BLOCK_BYTES // row_bytes)
                for first in range(0, leaf.shape[0], step):
                    yield fetch(leaf, first, min(step, leaf.shape[0] - first))
            else:
                yield fetch(leaf, 0, leaf.shape[0]).T


@functools.partial(jax.jit, static_argnums=(2,))
def _rows(x: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, count, 0)


@functools.cache
def _gather(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(_rows, static_argnums=(2,), out_shardings=everywhere)


def fetch(leaf: Any, first: int, count: int) -> np.ndarray:
    """Rows first:first + count of a leaf's first axis on the host; the other hosts' parts are gathered."""
    if not isinstance(leaf, jax.Array):
        return np.asarray(leaf)[first : first + count]
    if not leaf.is_fully_addressable:
        gathered = _gather(leaf.sharding.mesh)(leaf, np.int32(first), count)
        return np.asarray(gathered.addressable_data(0))
    result = np.empty((count, *leaf.shape[1:]), leaf.dtype)
    for shard in leaf.addressable_shards:
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        low, high = max(start, first), min(stop, first + count)
        if shard.replica_id == 0 and low < high:
            if shard.data.nbytes <= _SMALL_BYTES:
                part = np.asarray(shard.data)[low - start : high - start]
            else:
                part = _rows(shard.data, np.int32(low - start), high - low)
            result[(slice(low - first, high - first), *shard.index[1:])] = part
    return result
