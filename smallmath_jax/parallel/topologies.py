"""TPU machines by name, as compile targets: no TPU is needed, libtpu's compiler runs on any x86 Linux machine.

Names follow Google Cloud: v4-N and v5p-N count cores (two a chip, which act as one device), v5e-N and v6e-N
count chips. HBM is what a program may use, measured by compiling until it no longer fits, not the data sheet's.
"""

import dataclasses
import difflib
import os
from typing import Any


@dataclasses.dataclass(frozen=True)
class Topology:
    """One machine. `hbm_gib` is usable memory a chip, in GiB."""

    name: str
    layout: str  # libtpu's name of the chips' grid
    chips: int
    hbm_gib: float
    megacore: bool  # two cores a chip, seen as one device
    wrap: bool = False  # the grid's ends are joined (full cubes of 4 x 4 x 4)
    host_bounds: tuple[int, int, int] = (2, 2, 1)  # chips of one host

    @property
    def chips_per_host(self) -> int:
        x, y, z = self.host_bounds
        return min(self.chips, x * y * z)


def _grid(kind: str, layout: str, hbm: float, sizes: dict[int, str], cores: int) -> list[Topology]:
    rows = []
    for count, shape in sizes.items():
        chips = count // cores
        cube = cores == 2 and all(int(side) % 4 == 0 for side in shape.split("x"))
        bounds = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}.get(shape, (2, 2, 1))
        rows.append(
            Topology(f"{kind}-{count}", f"{layout}:{shape}", chips, hbm, cores == 2, cube, bounds)
        )
    return rows


_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
}
_PLANES = {
    1: "1x1",
    4: "2x2",
    8: "2x4",
    16: "4x4",
    32: "4x8",
    64: "8x8",
    128: "8x16",
    256: "16x16",
}

TOPOLOGIES = {
    row.name: row
    for row in (
        *_grid("v4", "v4", 30.75, _CUBES, 2),
        *_grid("v5p", "v5", 95.73, _CUBES, 2),
        *_grid("v5e", "v5e", 15.75, _PLANES, 1),
        *_grid("v6e", "v6e", 31.24, _PLANES, 1),
    )
}

# libtpu asks the machine for these; without them it waits for a metadata server, and complains at length.
_QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def topology(name: str) -> Topology:
    """The machine of that name. Raises ValueError with the nearest names."""
    if name not in TOPOLOGIES:
        near = difflib.get_close_matches(name, TOPOLOGIES, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ValueError(f"unknown topology {name!r}; {hint}Known: {', '.join(TOPOLOGIES)}")
    return TOPOLOGIES[name]


def host_of(name: str) -> str:
    """The name of a machine with the chips of one host of machine `name`.

    The compiler refuses collectives over a part of a larger machine, so a host's own programs are compiled for this.
    """
    machine = topology(name)
    if machine.chips == machine.chips_per_host:
        return name
    kind = name.partition("-")[0]
    return f"{kind}-{machine.chips_per_host * (2 if machine.megacore else 1)}"


def devices(name: str) -> list[Any]:
    """Compile-only devices of a machine: a Mesh can be made of them, no array can be put on them.

    Raises:
      ValueError: an unknown name. RuntimeError: libtpu is not installed.
    """
    from jax.experimental import topologies

    machine = topology(name)
    for variable, value in _QUIET.items():
        os.environ.setdefault(variable, value)
    settings = {
        "chip_config_name": "megacore" if machine.megacore else "default",
        "chips_per_host_bounds": machine.host_bounds,
        "num_slices": 1,
    }
    if machine.megacore:
        settings["wrap"] = (machine.wrap,) * 3
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=machine.layout, **settings
        )
    except (RuntimeError, ImportError) as error:
        raise RuntimeError(
            f"cannot describe {name} ({error}); compiling for TPU needs libtpu: pip install libtpu==0.0.52"
        ) from error
    return list(found.devices)
