"""Between files and device buffers, one block of one leaf at a time: what bounds the host memory of import and export.

jax.make_array_from_callback would hold every local shard of a leaf on the host at once. Here a block is read once,
cut for each device and written into its buffer in place, then freed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
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


def fill(shape: tuple[int, ...], sharding: Sharding, dtype: np.dtype, source: Source) -> jax.Array:
    """One leaf on its devices, `sharding` and `dtype` as given. On many hosts each reads what its own devices hold.

    All devices advance together: block after block of their part of the first axis is read, sent and written into the
    buffers in place. A leaf of one block is sent as it is.
    """
    rows = sharding.shard_shape(shape)[0]
    parts = shape[0] // rows
    row_bytes = math.prod(shape[1:]) * source.stored[0].dtype.itemsize
    step = min(rows, max(1, BLOCK_BYTES // (row_bytes * parts)))
    if source.kind != "same" and not source.stacked:
        step = rows  # the first axis is the file's second: no gain from cutting it
    if step == rows:
        return _send(shape, sharding, dtype, source, 0, rows, False)
    turned = source.kind == "matrix"
    write = _writer(sharding, len(shape), turned)
    buffer = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()
    for first in range(0, rows, step):
        last = min(first + step, rows)
        block = _send(shape, sharding, dtype, source, first, last, turned)
        buffer = write(buffer, block, np.int32(first))
        buffer.block_until_ready()  # then the host copy can go before the next is read
    return buffer


@functools.cache
def _writer(sharding: Sharding, ndim: int, turned: bool) -> Callable[..., jax.Array]:
    """(buffer, block, start) -> buffer: the block written in place, on every device at the same row of its part."""

    def write(buffer: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
        dtype = buffer.dtype
        # as integers: a copy and nothing else, where a CPU would widen bf16 to compute with it
        bits = jnp.uint16 if dtype.itemsize == 2 else jnp.uint32
        buffer, block = (jax.lax.bitcast_convert_type(x, bits) for x in (buffer, block))
        if turned:
            block = block.swapaxes(1, 2)
        buffer = jax.lax.dynamic_update_slice_in_dim(buffer, block, start, 0)
        return jax.lax.bitcast_convert_type(buffer, dtype)

    if isinstance(sharding, NamedSharding):
        whole, part = sharding, _block_sharding(sharding, ndim, turned)
        specs = (whole.spec, part.spec, PartitionSpec())
        write = jax.shard_map(
            write, mesh=sharding.mesh, in_specs=specs, out_specs=whole.spec, check_vma=False
        )
    return jax.jit(write, donate_argnums=0)


def _block_sharding(sharding: Sharding, ndim: int, turned: bool) -> Sharding:
    if not isinstance(sharding, NamedSharding) or not turned:
        return sharding
    first, second, third = (*sharding.spec, *(None,) * (ndim - len(sharding.spec)))
    return NamedSharding(sharding.mesh, PartitionSpec(first, third, second))


def _send(
    shape: tuple[int, ...],
    sharding: Sharding,
    dtype: np.dtype,
    source: Source,
    first: int,
    last: int,
    turned: bool,
) -> jax.Array:
    """Rows first:last of every device's part of a leaf, put together: [parts * (last - first), *shape[1:]].

    `turned` leaves the last two axes as they are in the file: the device turns them, numpy is slow at it.
    """
    boxes: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # replicas share a box
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        box = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        boxes.setdefault(box, []).append(device)
    spans = [
        (min(box[axis][0] for box in boxes), max(box[axis][1] for box in boxes))
        for axis in range(len(shape))
    ]
    pieces: dict[jax.Device, jax.Array] = {}
    for start in sorted({box[0][0] for box in boxes}):
        block = _read(source, shape, start + first, start + last, spans)
        for box in (box for box in boxes if box[0][0] == start):
            inner = [slice(a - s, b - s) for (a, b), (s, _) in zip(box[1:], spans[1:], strict=True)]
            cut = block[(slice(None), *inner)]
            cut = (cut.swapaxes(1, 2) if turned else cut).astype(dtype, order="C")
            for device in boxes[box]:  # a copy: buffers that may be donated own their memory
                pieces[device] = jax.device_put(cut, device, may_alias=False)
    ordered = [pieces[device] for device in sharding.addressable_devices_indices_map(shape)]
    count = (last - first) * (shape[0] // sharding.shard_shape(shape)[0])
    size = (count, *shape[1:]) if not turned else (count, shape[2], shape[1])
    place = _block_sharding(sharding, len(shape), turned)
    return jax.make_array_from_single_device_arrays(size, place, ordered)


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
    inner = layers[0].shape[1:]
    block = np.empty((len(layers), high - low, *inner), layers[0].dtype)
    for stored, rows in zip(layers, block, strict=True):
        tensors.read_rows(stored, low, high, into=rows)
    if source.kind != "same":
        block = block.reshape(len(layers), high - low, -1).swapaxes(1, 2)  # to [in, out], a view
    if not source.stacked:
        return block[0, first:last]
    return block if source.kind == "same" else block[:, slice(*spans[1])]


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
    if leaf.nbytes <= _SMALL_BYTES:
        return np.asarray(leaf)[first : first + count]
    if leaf.sharding.shard_shape(leaf.shape)[0] == leaf.shape[0]:
        return np.asarray(_rows(leaf, np.int32(first), count))
    # cut along the axis we slice: device by device, because a sliced program would gather all of it
    result = np.empty((count, *leaf.shape[1:]), leaf.dtype)
    for shard in leaf.addressable_shards:
        start, stop, _ = shard.index[0].indices(leaf.shape[0])
        low, high = max(start, first), min(stop, first + count)
        if shard.replica_id == 0 and low < high:
            part = _rows(shard.data, np.int32(low - start), high - low)
            result[(slice(low - first, high - first), *shard.index[1:])] = part
    return result
