"""The device mesh: `data` replicates the state, `fsdp` cuts state and batch, `model` cuts heads, MLP and vocabulary.

GSPMD does the rest: what older texts call pjit is today's `jax.jit` with shardings over this mesh.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")  # the axes a batch dimension is cut over


def mesh_shape(count: int, data: int = 1, fsdp: int = -1, model: int = 1) -> tuple[int, int, int]:
    """The sizes of (data, fsdp, model) for `count` devices; one of them may be -1 and is filled in.

    Raises:
      ValueError: a size is 0 or below -1, more than one is -1, or the sizes do not multiply to `count`.
    """
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    for name, size in sizes.items():
        if size == 0 or size < -1:
            raise ValueError(f"mesh.{name} is {size}; give a positive size, or -1 to fill it")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh: {' and '.join(free)} are both -1; only one axis can be filled")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    text = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if count % fixed or (not free and fixed != count):
        relation = "divide" if free else "multiply to"
        raise ValueError(
            f"mesh ({text}) does not {relation} the {count} devices at hand: "
            f"the given sizes multiply to {fixed}; change mesh.data, mesh.fsdp or mesh.model"
        )
    filled = count // fixed
    return tuple(filled if size == -1 else size for size in sizes.values())


def make_mesh(
    data: int = 1, fsdp: int = -1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes ('data', 'fsdp', 'model') over `devices` (default: all devices of all hosts).

    On TPU the devices are ordered along the chips' physical links, so that `model`, the axis with
    the most traffic, gets neighbours. Raises ValueError as `mesh_shape` does.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(len(devices), data, fsdp, model)
    if devices[0].platform == "tpu" and len(devices) > 1:
        # Slices of one topology only; some shapes cut a physical axis in two, which is allowed here.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        grid = np.array(devices, dtype=object).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(model: int = 1) -> Mesh:
    """A mesh (data = the rest, 1, model) over this host's own devices: its engine never talks to another host."""
    return make_mesh(data=-1, fsdp=1, model=model, devices=jax.local_devices())


def batch_shards(mesh: Mesh) -> int:
    """Over how many shards a batch dimension is cut: data * fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def platform_of(mesh: Mesh) -> str:
    """'cpu', 'gpu' or 'tpu': of the mesh's devices, which under AOT are not those of this process."""
    return mesh.devices.flat[0].platform
