"""Model folders on many devices and hosts, and the host memory their import needs. Each test is a fresh process."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny_hf
from safetensors.numpy import load_file
from test_weights import published_config

SHARDED = """
import sys
import jax, numpy as np
from smallmath_jax.models import streaming, weights
from smallmath_jax.models.tree import named_leaves
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.rules import shardings

source, out = sys.argv[1:]
alone, config = weights.import_folder(source)
for axes, size in (((1, 8, 1), 32 << 20), ((2, 2, 2), 3000)):  # whole leaves; blocks, with replicas
    mesh = make_mesh(*axes)
    streaming.BLOCK_BYTES = size
    streaming._SMALL_BYTES = 0 if size == 3000 else 1 << 20
    cut, _ = weights.import_folder(source, shardings=lambda m: shardings(m, mesh))
    for (name, whole), (_, leaf) in zip(named_leaves(alone), named_leaves(cut), strict=True):
        assert leaf.shape == whole.shape and len(leaf.sharding.device_set) == 8, name
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index], err_msg=name)
    assert not cut.text.layers.gate.kernel.sharding.is_fully_replicated
    weights.export_folder(cut, config, f"{out}/{size}", source=source)
# a tree of shardings serves as well as a function
streaming.BLOCK_BYTES = 32 << 20
tree = shardings(alone, mesh)
same, _ = weights.import_folder(source, shardings=tree)
assert same.text.norm.sharding.mesh == mesh
print("good")
"""

HOSTS = """
import sys
import jax, numpy as np
port, index, source, out = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(index))
from smallmath_jax.models import streaming, weights
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.rules import shardings
streaming.BLOCK_BYTES = 500
mesh = make_mesh(1, 4, 1)
model, config = weights.import_folder(source, shardings=lambda m: shardings(m, mesh))
assert not model.text.embed.is_fully_addressable
weights.export_folder(model, config, out, source=source)
print("good")
"""

# Real shapes of Qwen2.5-VL-3B in bf16, noise of a few layers repeated; then its import on 8 devices.
LARGE = """
import json, resource, sys, time
import numpy as np, ml_dtypes
import jax
from smallmath_jax.models import streaming, tensors, weight_table, weights
from smallmath_jax.models.config import from_hf
from smallmath_jax.models.tree import named_leaves
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.rules import shardings

folder, flat, tiny = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
wanted = weight_table.hub_tensors(from_hf(flat))
noise = np.random.default_rng(0).integers(0x3000, 0x4000, 1 << 24, np.uint16)
noise = noise.view(ml_dtypes.bfloat16)
def pieces():
    for entry in wanted.values():
        left = int(np.prod(entry.shape))
        while left:
            yield noise[:left]
            left -= min(left, noise.size)
with open(f"{folder}/model.safetensors", "wb") as file:
    shapes = {name: entry.shape for name, entry in wanted.items()}
    tensors.write_file(file, shapes, noise.dtype, pieces())
del noise
with open(f"{folder}/config.json", "w") as file:
    json.dump(flat, file)

def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM")}

mesh = make_mesh(1, 8, 1)
# what jax's own machinery keeps resident is no part of an import
streaming.BLOCK_BYTES, size = 3000, streaming.BLOCK_BYTES
weights.import_folder(tiny, shardings=lambda m: shardings(m, mesh))
streaming.BLOCK_BYTES = size
before = resident()["VmRSS"]
open("/proc/self/clear_refs", "w").write("5")  # restart the peak
start = time.perf_counter()
model, _ = weights.import_folder(
    folder, dtype=jax.numpy.bfloat16, shardings=lambda m: shardings(m, mesh))
seconds = time.perf_counter() - start
leaves = dict(named_leaves(model))
buffers = sum(s.data.nbytes for leaf in leaves.values() for s in leaf.addressable_shards)
largest = max(leaf.addressable_shards[0].data.nbytes
              for name, leaf in leaves.items() if "/layers/" in name or "/blocks/" in name)
print(json.dumps({"host": resident()["VmHWM"] - before - buffers, "buffers": buffers,
                  "shard": largest, "seconds": seconds, "before": before}))
"""


def environment(devices: int) -> dict[str, str]:
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }


def run(program: str, *arguments: object, devices: int = 8) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment(devices),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_onto_a_mesh_is_the_import_onto_one_device_and_exports_alike(tmp_path):
    tiny_hf.make("vl_untied").save_pretrained(tmp_path / "in")
    assert "good" in run(SHARDED, tmp_path / "in", tmp_path)
    expected = exported(tmp_path / "in")
    folders = [folder for folder in tmp_path.iterdir() if folder.name != "in"]
    assert len(folders) == 2
    for folder in folders:
        assert exported(folder) == expected, folder.name


def exported(folder) -> dict[str, bytes]:
    return {name: a.tobytes() for name, a in load_file(folder / "model.safetensors").items()}


@pytest.mark.full
def test_two_hosts_import_their_parts_and_export_together(tmp_path):
    tiny_hf.make("vl_untied").save_pretrained(tmp_path / "in")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = [str(tmp_path / "in"), str(tmp_path / "out")]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, str(port), str(index), *arguments],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=170)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all("good" in output for output in outputs), outputs
    assert exported(tmp_path / "out") == exported(tmp_path / "in")


@pytest.mark.full
def test_importing_3b_needs_little_host_memory_beyond_the_device_buffers(tmp_path):
    """Under 1.5 shards of the largest stacked leaf; on CPU the buffers are host memory too and are subtracted."""
    tiny_hf.make("vl_tied").save_pretrained(tmp_path / "tiny")
    try:
        flat = json.dumps(published_config("vl3b"))
        report = json.loads(run(LARGE, tmp_path, flat, tmp_path / "tiny"))
    finally:
        (tmp_path / "model.safetensors").unlink(missing_ok=True)  # 7.5 GB
    print(report)
    assert report["buffers"] >= 7_509_245_952
    assert report["host"] < 1.5 * report["shard"], report
