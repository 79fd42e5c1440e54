"""Compiles a config's real programs for a named TPU without one, and says whether they fit.

    python -m smallmath_jax.parallel.compile --config=configs/grpo.py:3b --topology=v5e-16

The numbers are the TPU compiler's own buffer assignment: what a chip's memory will hold. Nothing here
says how fast a program runs. Exit code 1: something does not fit. Needs the `libtpu` package.
"""

import argparse
import ast
import dataclasses
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from smallmath_jax.parallel import topologies
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.topologies import Topology

GIB = 2**30
# Resolved by name when the command runs: this room does not import those that know the programs.
PROGRAMS = "smallmath_jax.tasks.programs:programs"
# XLA cuts a gather of weights over 16 or more shards into a loop of small steps ("windowed einsum") when the operand
# is larger than this; the limit turns that off (docs/tpu.md, "Windowed einsum").
NO_WINDOW = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled unit of a run: a function, and abstract arguments that carry their shardings."""

    name: str
    mesh: Mesh  # of the machine's compile-only devices: all chips, or one host's
    function: Callable[
        ..., Any
    ]  # plain or jitted; a jitted one keeps its own donation and shardings
    arguments: tuple[Any, ...]  # trees of jax.ShapeDtypeStruct with a sharding
    donate: tuple[int, ...] = ()
    out_shardings: Any = None  # None: the compiler's choice
    # GiB a chip that other things hold while this runs, by name (a rollout copy, a KV cache)
    resident: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Report:
    """Memory of one program on one chip, in GiB. `total` is peak + resident; `fits` compares it to `hbm`."""

    program: str
    topology: str
    mesh: str
    arguments: float
    temporaries: float
    outputs: float
    aliased: float  # outputs that reuse donated arguments
    peak: float
    resident: float
    total: float
    hbm: float
    fits: bool
    compile_s: float
    error: str = ""


def abstract(tree: Any, shardings: Any) -> Any:
    """`tree` of arrays or ShapeDtypeStruct, as ShapeDtypeStruct with shardings: what a Program takes."""
    make = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(make, tree, shardings)


def gib_per_chip(tree: Any) -> float:
    """GiB that one chip holds of a tree of arrays or ShapeDtypeStruct with shardings."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        total += int(np.prod(shape, dtype=np.int64)) * leaf.dtype.itemsize
    return total / GIB


def compile_program(
    program: Program, machine: Topology, options: Mapping[str, str] | None = None
) -> Report:
    """Compiles for the program's (absent) devices. A program too large gives a Report with fits=False.

    Raises whatever tracing raises, and compiler errors other than memory.
    """
    settings = {} if program.out_shardings is None else {"out_shardings": program.out_shardings}
    function = program.function
    if not hasattr(function, "lower"):
        # unused arguments stay: they lie in memory all the same
        function = jax.jit(function, donate_argnums=program.donate, keep_unused=True, **settings)
    started = time.monotonic()
    lowered = function.lower(*program.arguments)
    common = {
        "program": program.name,
        "topology": machine.name,
        "mesh": "x".join(str(size) for size in program.mesh.shape.values()),
        "resident": sum(program.resident.values()),
        "hbm": machine.hbm_gib,
    }
    try:
        compiled = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        return _too_large(error, common, gib_per_chip(program.arguments), started)
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes / GIB,
        "temporaries": memory.temp_size_in_bytes / GIB,
        "outputs": memory.output_size_in_bytes / GIB,
        "aliased": memory.alias_size_in_bytes / GIB,
    }
    needed = sizes["arguments"] + sizes["temporaries"] + sizes["outputs"] - sizes["aliased"]
    peak = max(memory.peak_memory_in_bytes / GIB, needed)
    total = peak + common["resident"]
    return Report(
        **common,
        **sizes,
        peak=peak,
        total=total,
        fits=total <= machine.hbm_gib,
        compile_s=time.monotonic() - started,
    )


def _too_large(
    error: Exception, common: Mapping[str, Any], arguments: float, started: float
) -> Report:
    """The report of a program the compiler refused for memory; anything else is raised again."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text or "hbm" not in text.lower():
        raise error
    used = re.search(r"\(([\d.]+)([MGT])\) exceeds|Used ([\d.]+)([MGT]) of", text)
    peak = float("inf")
    if used:
        number, unit = used[1] or used[3], used[2] or used[4]
        peak = float(number) * {"M": 1 / 1024, "G": 1.0, "T": 1024.0}[unit]
    return Report(
        **common,
        arguments=arguments,
        temporaries=peak - arguments,
        outputs=0.0,
        aliased=0.0,
        peak=peak,
        total=peak + common["resident"],
        fits=False,
        compile_s=time.monotonic() - started,
        error=text.split("\n")[0][:300],
    )


def table(reports: list[Report]) -> str:
    """The reports as a Markdown table, GiB a chip."""
    lines = [
        "| program | machine | data x fsdp x model | arguments | temporaries | peak | resident beside it "
        "| total | usable | fits | compile s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in reports:
        lines.append(
            f"| {row.program} | {row.topology} | {row.mesh} | {row.arguments:.2f} | {row.temporaries:.2f} "
            f"| {row.peak:.2f} | {row.resident:.2f} | {row.total:.2f} | {row.hbm:.2f} "
            f"| {'yes' if row.fits else 'NO'} | {row.compile_s:.0f} |"
        )
    return "\n".join(lines)


def load(name: str) -> Callable[..., Any]:
    """The function that "module:function" names. Raises ValueError saying what is missing."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--programs={name}: {error}; give MODULE:FUNCTION") from error


def load_config(text: str, changes: list[str]) -> Any:
    """The ml_collections config of FILE[:MODE], with changes as run.py takes them: --config.FIELD=VALUE."""
    path, _, mode = text.partition(":")
    spec = importlib.util.spec_from_file_location("chosen_config", path)
    if spec is None or not os.path.exists(path):
        raise ValueError(f"--config={text}: no file {path}; run from the project's folder")
    sys.path.insert(0, os.getcwd())  # configs import each other as `configs.NAME`
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(mode or None)
    for change in changes:
        name, _, value = change.removeprefix("--config.").partition("=")
        if not change.startswith("--config.") or not value:
            raise ValueError(f"unexpected {change!r}; fields are changed by --config.FIELD=VALUE")
        config = _changed(config, name, _literal(value))
    return config


def _changed(config: Any, name: str, value: Any) -> Any:
    """The config with one field replaced. Raises ValueError when it has no such field or it has another type."""
    part = config
    *parents, last = name.split(".")
    try:
        for parent in parents:
            part = part[parent]
        if last not in part:
            raise KeyError(last)
        part[last] = value
    except (KeyError, TypeError) as error:
        raise ValueError(f"--config.{name}={value}: {error}; see the config's file") from error
    return config


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main(words: list[str] | None = None) -> int:
    """The command. Prints the table; returns 1 when a program does not fit, 2 for bad words."""
    parser = argparse.ArgumentParser(prog="smallmath_jax.parallel.compile", description=__doc__)
    parser.add_argument("--config", required=True, help="configs/TASK.py[:MODE]")
    parser.add_argument("--topology", required=True, help=", ".join(topologies.TOPOLOGIES))
    parser.add_argument("--only", default="", help="regex of program names")
    parser.add_argument("--window", action="store_true", help="leave XLA's windowed einsum on")
    parser.add_argument("--json", default="", help="also write the reports to this file")
    parser.add_argument("--programs", default=PROGRAMS, help="MODULE:FUNCTION that lists them")
    arguments, rest = parser.parse_known_args(words)
    jax.config.update("jax_platforms", "cpu")  # nothing here may take a chip
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # without a chip entries cannot be read
    try:
        machine = topologies.topology(arguments.topology)
        config = load_config(arguments.config, rest)
        sizes = config.mesh
        mesh = make_mesh(sizes.data, sizes.fsdp, sizes.model, topologies.devices(machine.name))
        programs = load(arguments.programs)(config, mesh, machine)
    except ValueError as error:
        print(f"compile: {error}", file=sys.stderr)
        return 2
    reports = []
    for program in programs:
        if re.search(arguments.only, program.name):
            options = None if arguments.window else NO_WINDOW
            reports.append(compile_program(program, machine, options))
            print(f"compiled {program.name} in {reports[-1].compile_s:.0f} s", file=sys.stderr)
            if reports[-1].error:
                print(reports[-1].error, file=sys.stderr)
    print(table(reports))
    for program in programs:
        for what, size in program.resident.items():
            print(f"resident beside {program.name}: {what}, {size:.2f} GiB a chip")
    if arguments.json:
        rows = [dataclasses.asdict(row) for row in reports]
        with open(arguments.json, "w") as file:
            json.dump({"jax": jax.__version__, "reports": rows}, file, indent=1)
    return 0 if reports and all(row.fits for row in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
