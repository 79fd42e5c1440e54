"""Compiling for an absent TPU: the machines' names, what a report says, the command's exit codes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from configs import ppm as ppm_config
from smallmath_jax.parallel import compile as aot
from smallmath_jax.parallel import topologies
from smallmath_jax.parallel.compile import Program, compile_program
from smallmath_jax.parallel.mesh import make_mesh, platform_of
from smallmath_jax.tasks import programs, training
from smallmath_jax.tasks.export import export_policy
from smallmath_jax.tasks.policy import load_policy

GIB = 2**30


def machine_and_mesh(name, model=1):
    machine = topologies.topology(name)
    return machine, make_mesh(model=model, devices=topologies.devices(name))


def matrix(mesh, *shape, spec=("fsdp", None), dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def small_programs(config, mesh, machine):
    """What --programs names in the tests below: one program that fits, one that does not, by config."""
    rows = config.rows
    x = matrix(mesh, rows, 2**20)
    return [Program("double", mesh, lambda x: x * 2, (x,), resident={"a cache": 1.5})]


@pytest.mark.parametrize(
    "name, chips, hosts",
    [("v4-8", 4, 1), ("v4-32", 16, 4), ("v4-128", 64, 16), ("v5p-16", 8, 2), ("v6e-4", 4, 1)]
    + [("v5e-1", 1, 1), ("v5e-8", 8, 1), ("v5e-16", 16, 4), ("v5e-256", 256, 64)],
)
def test_a_machine_has_its_published_chips(name, chips, hosts):
    machine = topologies.topology(name)
    devices = topologies.devices(name)
    assert len(devices) == machine.chips == chips
    assert len({device.process_index for device in devices}) == hosts
    assert machine.chips // machine.chips_per_host == hosts
    host = topologies.topology(topologies.host_of(name))
    assert host.chips == machine.chips_per_host and host.host_bounds[0] <= host.chips


def test_a_misspelt_machine_gets_the_nearest_names():
    with pytest.raises(ValueError, match="did you mean v5e-16"):
        topologies.topology("v5e16")


def test_an_absent_machine_gets_the_tpu_mesh():
    machine, mesh = machine_and_mesh("v5e-16", model=4)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "model": 4}
    assert platform_of(mesh) == "tpu"
    assert jax.default_backend() == "cpu"  # the trap: asking jax instead of the mesh


def test_a_report_counts_what_a_chip_holds():
    machine, mesh = machine_and_mesh("v5e-4")
    x, y = matrix(mesh, 4096, 8192), matrix(mesh, 4096, 8192)
    program = Program("add", mesh, lambda x, y: x + y, (x, y), donate=(0,), resident={"copy": 2.0})
    report = compile_program(program, machine)
    each = 4096 * 8192 * 2 / 4 / GIB
    assert report.arguments == pytest.approx(2 * each, rel=1e-3)
    assert report.outputs == pytest.approx(each, rel=1e-3)
    assert report.aliased == pytest.approx(
        each, rel=1e-3
    )  # the donated argument's place is used again
    assert report.peak == pytest.approx(2 * each, rel=0.05)
    assert report.total == pytest.approx(report.peak + 2.0)
    assert report.fits and report.mesh == "1x4x1" and not report.error
    assert aot.gib_per_chip((x, y)) == pytest.approx(2 * each)


def test_resident_memory_counts_against_the_chip():
    machine, mesh = machine_and_mesh("v5e-4")
    program = Program(
        "one", mesh, lambda x: x + 1, (matrix(mesh, 64, 128),), resident={"all": 15.8}
    )
    assert not compile_program(program, machine).fits


@pytest.mark.parametrize("name", ["v5e-1", "v4-8"])
def test_the_usable_memory_is_the_compilers(name):
    machine, mesh = machine_and_mesh(name)
    rows = lambda gib: int(gib * GIB / 2 / 2**20) // 16 * 16 * mesh.size
    fill = lambda gib: Program(
        "fill", mesh, lambda x: x * 2, (matrix(mesh, rows(gib), 2**20),), donate=(0,)
    )
    assert compile_program(fill(machine.hbm_gib - 0.1), machine).fits
    report = compile_program(fill(machine.hbm_gib + 0.3), machine)
    assert not report.fits
    assert report.peak == pytest.approx(machine.hbm_gib + 0.3, abs=0.1)
    assert "exceeds available HBM" in report.error
    assert "NO" in aot.table([report])


def test_an_error_that_is_not_memory_is_raised():
    machine, mesh = machine_and_mesh("v5e-1")
    with pytest.raises(TypeError):
        compile_program(Program("bad", mesh, lambda x: x + "a", (matrix(mesh, 8, 8),)), machine)


def write_config(folder, rows):
    path = folder / "config.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config(mode=None):\n"
        f"    return ConfigDict({{'rows': {rows}, 'mode': mode, 'mesh': {{'data': 1, 'fsdp': -1, 'model': 1}}}})\n"
    )
    return str(path)


def run_command(path, *more):
    words = [f"--config={path}:x", "--topology=v5e-4", "--programs=test_compile:small_programs"]
    return aot.main([*words, *more])


def test_the_command_prints_a_table_and_succeeds_when_all_fits(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert run_command(write_config(tmp_path, 64), f"--json={out}") == 0
    printed = capsys.readouterr().out
    assert "| double | v5e-4 | 1x4x1 |" in printed
    assert "resident beside double: a cache, 1.50 GiB a chip" in printed
    (row,) = json.loads(out.read_text())["reports"]
    assert row["fits"] and row["resident"] == 1.5


def test_the_command_fails_when_something_does_not_fit(tmp_path, capsys):
    path = write_config(tmp_path, 64)
    assert run_command(path, "--config.rows=40000") == 1
    assert "| NO |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--config.row=1"], "--config.row=1"),
        (["--rows=1"], "unexpected '--rows=1'"),
        (["--config.mesh.model=3"], "does not divide the 4 devices"),
        (["--topology=v5e-5"], "did you mean v5e-"),
        (["--programs=nowhere:programs"], "--programs=nowhere:programs"),
    ],
)
def test_bad_words_are_explained(tmp_path, capsys, words, message):
    assert run_command(write_config(tmp_path, 64), *words) == 2
    assert message in capsys.readouterr().err


def test_sizes_of_uncut_leaves_are_whole():
    mesh = make_mesh(devices=jax.devices()[:1])
    leaf = matrix(mesh, 1024, 1024, spec=(None, None), dtype=np.float32)
    assert aot.gib_per_chip({"a": leaf, "b": leaf}) == 2 * 4 / 1024


def test_rows_of_a_microbatch_fit_any_machine():
    """A multiple of the shards rows are cut into, at least what the config says; the config itself stays."""
    settings = ConfigDict({"microbatch_rows": 6})
    mesh = lambda data, fsdp: SimpleNamespace(shape={"data": data, "fsdp": fsdp, "model": 2})
    sizes = [(1, 1), (1, 4), (2, 3), (8, 2)]
    found = [training.fit_rows(settings, mesh(*size)).microbatch_rows for size in sizes]
    assert found == [6, 8, 6, 16]
    assert settings.microbatch_rows == 6


@pytest.mark.parametrize(
    "loss", ["ppm", *(pytest.param(one, marks=pytest.mark.full) for one in ("pqm", "orm"))]
)
def test_a_reward_models_step_compiles(tmp_path, loss):
    """On a tiny folder, at the config's own batch."""
    config = ppm_config.get_config("tiny")
    export_policy(load_policy(config, make_mesh(devices=jax.devices()[:1])), tmp_path)
    machine, mesh = machine_and_mesh("v5e-4")
    config.model, config.ppm.loss = str(tmp_path), loss
    (program,) = programs.programs(config, mesh, machine)
    report = compile_program(program, machine)
    assert report.fits and report.program.startswith(f"{loss} step"), report.error
