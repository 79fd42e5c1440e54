"""A small model and mixed sequences for the tests of the train step; run in other processes too."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from smallmath_jax.data.batches import Sequence, collate, pack
from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.positions import mrope_positions
from smallmath_jax.models.config import tiny_config
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.models.tree import map_named
from smallmath_jax.train import step as steps
from smallmath_jax.train.optim import make_optimizer

VOCABULARY, IMAGE, VIDEO = 96, 90, 91
NORMS = re.compile(r"(norm|norm1|norm2|ln_q)$")
BANNED = (90, 91, 92, 93)
IMAGES = ImageSettings()
CONFIG = tiny_config(
    VOCABULARY,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=92,
    vision_end_token_id=93,
    eos_ids=(94,),
    hidden_size=32,
)


def make_model(seed=0, dtype=jnp.float32):
    """Random weights drawn by numpy (nothing to compile); norms about 1, biases not 0."""
    rng = np.random.default_rng(seed)

    def draw(name, leaf):
        centre = 1.0 if NORMS.search(name) else 0.0
        return jnp.asarray(centre + 0.1 * rng.normal(size=leaf.shape), dtype)

    return map_named(draw, abstract_model(CONFIG))


def make_sequences(count=7, seed=0):
    """Text and image sequences with every field a GRPO batch may have; odd ones hold one image, every fourth two."""
    rng = np.random.default_rng(seed)
    sequences = []
    for number in range(count):
        images = 2 if number % 4 == 3 else number % 2
        grids = np.array([[1, 4, 4]] * images, np.int32).reshape(-1, 3)
        prompt = [5, 6] + [92, *[IMAGE] * 4, 93] * images
        tokens = np.array(prompt + list(rng.integers(0, 90, rng.integers(6, 14))), np.int32)
        positions, _ = mrope_positions(tokens, grids, IMAGE, VIDEO, IMAGES)
        scored = np.arange(len(tokens)) >= len(prompt)
        field = lambda values, scored=scored: np.where(scored, values, 0).astype(np.float32)
        noise = lambda scored=scored: rng.normal(-4, 0.3, len(scored))
        sequences.append(
            Sequence(
                tokens,
                positions,
                field(rng.uniform(0.5, 1.5) / 40),
                {
                    "advantages": field(rng.normal()),
                    "old_log_probs": field(noise()),
                    "sampler_log_probs": field(noise()),
                    "temperature": np.full(len(tokens), 0.7 + 0.1 * number, np.float32),
                },
                rng.normal(size=(16 * images, 1176)).astype(np.float32) if images else None,
                grids,
            )
        )
    return sequences


def layout(sequences, row_length, microbatches=1, rows=0, packed=True, row_patches=48):
    """A batch [A, B, T] of the sequences: packed into rows, or one a row."""
    plan = [[index] for index in range(len(sequences))]
    if packed:
        lengths = [len(s.token_ids) for s in sequences]
        plan = pack(lengths, [s.patches for s in sequences], row_length, row_patches)
    plan += [[]] * (max(rows, -(-len(plan) // microbatches) * microbatches) - len(plan))
    batch = collate(
        [[sequences[i] for i in row] for row in plan], row_length, row_patches, IMAGES, IMAGE, VIDEO
    )
    stack = lambda x: x.reshape(microbatches, len(x) // microbatches, *x.shape[1:])
    return jax.tree.map(stack, batch)


def optimizer(**changes):
    settings = dict(
        name="adamw",
        learning_rate=1e-2,
        schedule="linear",
        warmup_steps=2,
        final_fraction=0.0,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
    )
    return make_optimizer(SimpleNamespace(**(settings | changes)), 20)


GRPO = {"importance_cap": 2.0}
QUICK = {"xla_backend_optimization_level": 0}  # halves the compile time, which is all of a test's


def gradient(model, batch, loss="grpo", compute=None, trainable=None, settings=None, **options):
    """{name: gradient} and metrics, jitted."""
    compute = compute or steps.Compute(banned_ids=BANNED)
    settings = GRPO if settings is None and loss == "grpo" else settings
    objective = steps.make_objective(loss, compute, settings, **options)
    run = lambda model, batch: steps.accumulate(
        objective, steps.split_trainable(model, trainable), model, batch
    )
    return jax.jit(run, compiler_options=QUICK)(model, batch)


def distance(found, expected):
    """The largest ||a - b|| / ||b|| over tensors; tensors that are 0 in both count as equal."""
    assert found.keys() == expected.keys()
    gaps = {}
    for name in expected:
        a, b = np.asarray(found[name], np.float64), np.asarray(expected[name], np.float64)
        gaps[name] = np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300) if b.any() else a.any()
    return max(gaps.values())
