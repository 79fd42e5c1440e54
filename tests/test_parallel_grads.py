"""Law 1 across devices: eight virtual CPU devices, cut in several ways, give the gradient one device gives."""

import functools
import json
import os
import subprocess
import sys

import pytest

WORKER = """
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from smallmath_jax.data.batches import collate, make_sequence
from smallmath_jax.data.images import ImageSettings
from smallmath_jax.models.config import tiny_config
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.models.tree import named_leaves
from smallmath_jax.parallel import rules
from smallmath_jax.parallel.hosts import global_batch
from smallmath_jax.parallel.mesh import make_mesh
from smallmath_jax.parallel.splash import attention_for
from smallmath_jax.records import Prompt
from smallmath_jax.train import step as steps
import optax

ROWS, LENGTH, PATCHES = 8, 64, 32
config = tiny_config(264, image_token_id=260, video_token_id=261, vision_start_token_id=262,
                     vision_end_token_id=263, eos_ids=(1,), hidden_size=32, layers=1)
# 3 vision heads, an odd intermediate size: some leaves cannot be cut, and are not
config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, hidden=48, heads=3,
                                                                intermediate=90))
random = np.random.default_rng(7)
settings = ImageSettings()


def sequence(number):
    text = random.integers(2, 256, 6)
    ids, pixels, grids = text, None, np.zeros((0, 3), np.int32)
    if number % 2:
        ids = np.concatenate([text, [262], [260] * 4, [263], random.integers(2, 256, 3)])
        pixels = random.normal(size=(16, 1176)).astype(np.float32)
        grids = np.array([[1, 4, 4]], np.int32)
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    prompt = Prompt(str(number), "", ids.astype(np.int32), positions, len(ids), pixels, grids)
    done = random.integers(2, 256, 8 + number % 5)
    return make_sequence(prompt, done, weights=random.uniform(0.1, 1.0, len(done)) / 100,
                         advantages=random.normal(size=len(done)))


batch = collate([[sequence(2 * r), sequence(2 * r + 1)] for r in range(ROWS)], LENGTH, PATCHES,
                settings, 260, 261)
assert set(batch["vision"]) and (batch["vision"]["token_index"] >= 0).any()
# two microbatches: the accumulation loop carries a cut gradient
batch = jax.tree.map(lambda x: np.stack([x, x[::-1]]), batch)
model = QwenVL(config, rngs=nnx.Rngs(0))
# the state of this "optimizer" is the gradient it was given
keep = optax.GradientTransformation(
    lambda parameters: jax.tree.map(jnp.zeros_like, parameters),
    lambda gradient, state, parameters: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def one_step(mesh):
    compute = steps.Compute(
        attention=attention_for(mesh),
        head_chunk=256,
        banned_ids=(260, 261),
        constrain=rules.constrain(mesh),
        constrain_head=rules.constrain_head(mesh),
    )
    places = rules.shardings(jax.eval_shape(lambda m: steps.init_state(m, keep), model), mesh)
    state = jax.device_put(steps.init_state(model, keep), places)
    step = steps.make_train_step("grpo", keep, compute=compute, state_shardings=places, donate=False)
    state, metrics = step(state, global_batch(batch, mesh, leading=1))
    held = {name: list(leaf.sharding.shard_shape(leaf.shape)) for name, leaf in named_leaves(state)}
    return jax.device_get((state.opt_state, metrics)), held


size = lambda x: float(np.linalg.norm(np.asarray(x, np.float64).ravel()))
(wanted, metrics), _ = one_step(make_mesh(1, 1, 1, jax.devices()[:1]))
assert all(size(g) > 0 for g in wanted.values()), [n for n, g in wanted.items() if not size(g)]
result = {"devices": jax.device_count(), "loss": float(metrics["loss"]), "meshes": {}}
for name in sys.argv[1:]:
    sizes = [int(size) for size in name.split('x')]
    (found, metrics), held = one_step(make_mesh(*sizes))
    assert set(found) == set(wanted)
    result["meshes"][name] = {
        "worst": max((size(found[name] - g) / size(g), name) for name, g in wanted.items()),
        "loss": float(metrics["loss"]),
        "weight": held["model/text/layers/q/kernel"],
        "moment": held["opt_state/text/layers/q/kernel"],
    }
print(json.dumps(result))
"""


@functools.cache
def measure(*meshes):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept |= {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    words = [sys.executable, "-c", WORKER, *meshes]
    run = subprocess.run(words, env=kept, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(measured, mesh, held):
    assert measured["devices"] == 8
    found = measured["meshes"][mesh]
    distance, name = found["worst"]
    assert distance <= 1e-5, f"{name}: ||dg|| / ||g|| = {distance}"
    assert found["loss"] == pytest.approx(measured["loss"], rel=1e-5)
    assert found["weight"] == found["moment"] == held  # [layers, in / fsdp, out / model]


@pytest.mark.parametrize("mesh, held", [("2x2x2", [1, 16, 16]), ("1x8x1", [1, 4, 32])])
def test_eight_devices_give_the_gradient_of_one(mesh, held):
    check(measure("2x2x2", "1x8x1"), mesh, held)


@pytest.mark.full
@pytest.mark.parametrize("mesh, held", [("8x1x1", [1, 32, 32]), ("1x2x4", [1, 16, 8])])
def test_other_cuts_do_too(mesh, held):
    check(measure("8x1x1", "1x2x4"), mesh, held)
