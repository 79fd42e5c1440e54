"""The engine on several devices: slots cut over `data`, heads over `model`, the same tokens as on one."""

import json
import os
import pathlib
import subprocess
import sys

import engine_case as case
import numpy as np
import pytest

from smallmath_jax.records import Sampling
from smallmath_jax.rollout.engine import Limits

HERE = pathlib.Path(__file__).parent
WORKER = """
import json, sys
import jax
import numpy as np
from smallmath_jax.models.tree import map_named
from smallmath_jax.parallel import rules
from smallmath_jax.parallel.mesh import make_mesh
import engine_case as case
from test_engine_devices import play

mesh = make_mesh(-1, 1, int(sys.argv[1]))
placed = jax.device_put(case.model(), rules.shardings(case.model(), mesh))
made = case.engine(placed, slots=16)
print(json.dumps(play(made)))
slots = made._slots["k"][0]
print(json.dumps([list(slots.shape), list(slots.addressable_shards[0].data.shape)]))
"""


def play(made):
    """Groups of two prompts, one with a picture, and a completion below an appended node: ids and log-probs."""
    roots = [
        made.root(case.prompt("text", 11)),
        made.root(case.prompt("picture", 9, ((1, 4, 4),))),
    ]
    roots.append(made.append(roots[1], [9, 10, 11]))
    told = []
    for number, root in enumerate(roots):
        keys = case.keys(*[(number, sample) for sample in range(7)])
        for _, rollout in made.fork(root, 7, Limits(12), Sampling(), keys):
            told.append([rollout.token_ids.tolist(), np.asarray(rollout.log_probs, float).tolist()])
    return told


@pytest.mark.parametrize("parts", [1, 2])
def test_four_devices_draw_what_one_draws(parts):
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{HERE.parent}:{HERE}",
    }
    run = subprocess.run(
        [sys.executable, "-c", WORKER, str(parts)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert run.returncode == 0, run.stderr
    found, (whole, piece) = map(json.loads, run.stdout.splitlines())
    expected = play(case.engine(slots=16))
    assert [ids for ids, _ in found] == [ids for ids, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    heads = case.CONFIG.text.kv_heads
    assert piece[:2] == [whole[0] * parts // 4, heads // parts if heads % parts == 0 else heads]
