"""Two real processes on CPU, joined by jax.distributed and gloo: agreement, batches, copies; and the watchdog."""

import os
import socket
import subprocess
import sys
import time

import pytest

from smallmath_jax.parallel import hosts

WORKER = """
import sys
import numpy as np
import jax
import jax.numpy as jnp

from smallmath_jax.models.config import tiny_config
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.parallel import hosts
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.rules import shardings

hosts.initialize()
hosts.initialize()
index = hosts.host_index()
assert (hosts.host_count(), jax.device_count(), jax.local_device_count()) == (2, 4, 2)
assert hosts.gather({"host": index, "text": "x" * (3 + 40 * index)}) == [
    {"host": 0, "text": "xxx"}, {"host": 1, "text": "x" * 43}]
assert hosts.broadcast(["from", index]) == ["from", 0]
assert hosts.any_host(index == 1) and not hosts.any_host(False)
assert hosts.share(list(range(5))) == ([0, 2, 4] if index == 0 else [1, 3])
assert len(hosts.host_names()) == 2
hosts.barrier("middle")
try:
    hosts.same_everywhere({"seed": 3, "rows": index})
    raise SystemExit("a difference was not seen")
except ValueError as error:
    assert "rows" in str(error), error

whole = np.arange(8 * 3, dtype=np.float32).reshape(8, 3)
for sizes in ((1, 4, 1), (2, 1, 2)):
    mesh = make_mesh(*sizes)
    rows = hosts.local_rows(mesh, 8)
    assert rows == list(range(4 * index, 4 * index + 4)), (sizes, rows)
    batch = hosts.global_batch({"x": whole[rows]}, mesh)
    assert batch["x"].shape == (8, 3)
    assert float(jax.jit(lambda b: (b["x"] * jnp.arange(8.0)[:, None]).sum())(batch)) == float(
        (whole * np.arange(8.0)[:, None]).sum())
    micro = hosts.global_batch(whole[rows].reshape(1, 4, 3).repeat(2, 0), mesh, leading=1)
    assert micro.shape == (2, 8, 3)

mesh = make_mesh(1, 4, 1)
config = tiny_config(512, image_token_id=1, video_token_id=2, vision_start_token_id=3,
                     vision_end_token_id=4, eos_ids=(5,))
random = np.random.default_rng(0)
alone = jax.tree.map(
    lambda x: random.normal(size=x.shape).astype(np.float32), abstract_model(config))
model = jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    alone, shardings(alone, mesh))
for parts in (1, 2):
    copy = hosts.local_copy(model, jnp.float32, parts)
    for mine, want in zip(jax.tree.leaves(copy), jax.tree.leaves(alone), strict=True):
        assert mine.is_fully_addressable
        np.testing.assert_array_equal(np.asarray(mine), want)
    q = copy.text.layers.q.kernel[...]
    assert q.sharding.shard_shape(q.shape)[2] == q.shape[2] // parts
    jax.jit(lambda x: x.sum())(q).block_until_ready()  # a program of this host alone
hosts.barrier("end")
print("host", index, "good")
"""


WORKDIR_WORKER = """
import pathlib, sys
from smallmath_jax.parallel import hosts
from smallmath_jax.tasks import runs, sources
from configs import grpo

shared, own = map(pathlib.Path, sys.argv[1:])
hosts.initialize()
index = hosts.host_index()

def refused(action, *words):
    try:
        action()
    except ValueError as error:
        for word in words:
            assert word in str(error), error
    else:
        raise SystemExit(f"not refused: {words}")

def start(workdir, config):
    with runs.open_run(config, str(workdir)):
        pass

config = grpo.get_config("tiny")
start(shared, config)
config.seed = index
refused(lambda: start(shared, config), "host 0 has config.seed = 0, host 1 has 1")
config.seed = 0
mine = own / f"host{index}"  # both hosts' link of the same name: two folders
link = mine / "workdir"
refused(lambda: runs.check_shared(link), "1 of 2 hosts do not see", "--workdir=gs://")
assert not list(shared.glob("probe*"))

load = lambda name: sources.load_sources((str(own / name),), config, "grpo.data")
(own / "same.jsonl").write_text('{"problem": "1 + 1?", "answer": "2"}\\n')
hosts.barrier("written")
assert len(load("same.jsonl")["same"]) == 1
row = '{"id": "a", "problem": "1 + %d?", "answer": "2"}\\n' % index
mine.mkdir(exist_ok=True)
(mine / "problems.jsonl").write_text(row)
local = lambda name: sources.load_sources((str(mine / name),), config, "grpo.data")
refused(lambda: local("problems.jsonl"), "config.grpo.data: digest of texts", "host 1")
if index:
    (mine / "problems.jsonl").unlink()
refused(lambda: local("problems.jsonl"), "config.grpo.data: error = 'none'", "host 1")
hosts.barrier("end")
print("host", index, "good")
"""


def free_port():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def environment(**more):
    kept = {
        name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ
    }
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return {**kept, **paths, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", **more}


def start_two_hosts(program, *arguments, **more):
    """Two joined processes of the program."""
    shared = {
        "SMALLMATH_COORDINATOR": f"localhost:{free_port()}",
        "SMALLMATH_HOSTS": "2",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env=environment(**shared, **more, SMALLMATH_HOST=str(index)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]


def run_two_hosts(program, *arguments, **more):
    """Runs the program in two joined processes; each must print that it is good."""
    workers = start_two_hosts(program, *arguments, **more)
    try:
        outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for index, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0, output
        assert f"host {index} good" in output


def test_two_hosts_agree_and_share():
    run_two_hosts(WORKER)


def test_hosts_that_start_with_other_words_folders_or_data_all_stop(tmp_path):
    (tmp_path / "shared").mkdir()
    run_two_hosts(WORKDIR_WORKER, tmp_path / "shared", tmp_path)


def test_one_host_needs_no_network():
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    assert hosts.broadcast("x") == "x"
    assert hosts.share([1, 2]) == [1, 2]
    hosts.barrier("alone")
    hosts.initialize(count=1)


def test_half_an_address_is_explained():
    with pytest.raises(ValueError, match="SMALLMATH_HOST on every host"):
        hosts.initialize(coordinator="localhost:1")


def test_a_hang_ends_the_process_with_stacks():
    program = (
        "import time\n"
        "from smallmath_jax.parallel import hosts\n"
        "with hosts.watchdog(0.4, every_s=0.1) as beat:\n"
        "    for step in range(4):\n"
        "        time.sleep(0.2)\n"
        "        beat(f'step {step}')\n"
        "    time.sleep(60)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == hosts.HANG_EXIT_CODE
    assert "since step 3" in run.stderr
    assert "time.sleep" in run.stderr or "line 7" in run.stderr  # the stack of the hung line


def test_steady_progress_is_left_alone():
    ends = []
    with hosts.watchdog(1.5, stop=ends.append, every_s=0.05) as beat:
        for number in range(20):
            time.sleep(0.1)
            beat() if number % 2 else hosts.beat("of code that knows of no watchdog")
    time.sleep(0.5)
    assert ends == []
