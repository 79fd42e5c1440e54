"""A tiny model whose weights are set by hand: each token names the next ones, so it writes one known program."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np

from smallmath_jax.data.tokens import encode_after
from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.train.checkpoint import Checkpoints
from smallmath_jax.train.step import TrainState

# After the prompt: a sum that is 7 or 8, and an answer that is 7 or 8, whatever the sum was.
WRITTEN = (
    "\n<code>print(3+4)<end_of_code>",
    "+5)",
    "<end_of_output><answer>\\boxed{7}<end_of_answer>",
    "{8}",
)


def chained(policy, texts=WRITTEN):
    """`policy` (tiny, born at random: its blocks change nothing yet) with a first MLP that maps tokens to the next."""
    embed = 10.0 * np.asarray(policy.model.text.embed[...], np.float64)
    marks = list(policy.tokens.step_ids.values())  # born alike: the mean of all others
    embed[marks] = np.random.default_rng(0).normal(0.0, embed.std(), (len(marks), embed.shape[1]))
    unit = embed / np.linalg.norm(embed, axis=-1, keepdims=True)
    following: dict[int, list[int]] = {}
    for text in texts:
        ids = encode_after(policy.tokens, text).tolist()
        for now, after in zip(ids, ids[1:], strict=False):
            following.setdefault(now, []).append(after)
    leaves = {name: np.asarray(leaf).copy() for name, leaf in named_leaves(policy.model)}
    for name in ("gate", "up", "down"):
        leaves[f"text/layers/{name}/kernel"][:] = 0.0
    for feature, (now, after) in enumerate(following.items()):
        for name in ("gate", "up"):
            leaves[f"text/layers/{name}/kernel"][0, :, feature] = unit[now]
        leaves["text/layers/down/kernel"][0, feature] = 10.0 * unit[sorted(set(after))].sum(0)
    leaves["text/embed"] = embed.astype(np.float32)
    model = map_named(lambda name, _: jnp.asarray(leaves[name]), policy.model)
    return dataclasses.replace(policy, model=model)


def save(folder, model):
    """A checkpoint of a training stage that has ended."""
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), model, {}))
    (folder / "done.json").write_text('{"step": 1}')


def write_config(root, config):
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.json").write_text(
        json.dumps({"config": json.loads(config.to_json_best_effort())})
    )
