"""Our engine, SFT step and GRPO step at the peers' shape.

python benchmarks/peers/ours.py
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent))
from run import keep_freed_memory  # noqa: E402

keep_freed_memory()  # as run.py does on CPU

import os  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import shape  # noqa: E402
from flax import nnx  # noqa: E402

from configs.common import optimizer as optimizer_settings  # noqa: E402
from smallmath_jax.models.config import ModelConfig, TextConfig  # noqa: E402
from smallmath_jax.models.qwen_vl import QwenVL  # noqa: E402
from smallmath_jax.records import Prompt, Sampling, draw_key  # noqa: E402
from smallmath_jax.rollout.engine import Engine, Limits  # noqa: E402
from smallmath_jax.train.optim import make_optimizer  # noqa: E402
from smallmath_jax.train.step import Compute, init_state, make_train_step  # noqa: E402

CONFIG = ModelConfig(
    family="qwen2",
    text=TextConfig(
        vocab_size=shape.VOCABULARY,
        hidden_size=shape.WIDTH,
        layers=shape.LAYERS,
        heads=shape.HEADS,
        kv_heads=shape.KV_HEADS,
        head_dim=shape.HEAD_DIM,
        intermediate=shape.INTERMEDIATE,
        rope_theta=1e6,
        rms_eps=1e-6,
        tie=True,
        qkv_bias=True,
    ),
)


def make_engine(model: QwenVL, slots: int, length: int) -> Engine:
    return Engine(
        CONFIG,
        model,
        slots=slots,
        cache_length=length,
        prefill_chunk=64,
        decode_steps=32,
        eos_ids=(),
        banned_ids=(),
        pad_id=0,
        image_settings=None,
        max_patches=0,
    )


def prompt(random: np.random.Generator, length: int) -> Prompt:
    ids = random.integers(2, shape.VOCABULARY, length).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (3, 1))
    return Prompt("", "", ids, positions, length)


def generate(model: QwenVL, random: np.random.Generator) -> None:
    engine = make_engine(model, shape.ROWS, shape.PROMPT + shape.NEW)
    prompts = [prompt(random, shape.PROMPT) for _ in range(shape.ROWS)]
    modes = {
        "greedy": Sampling(temperature=0.0),
        "sampled, T = 1": Sampling(),
        "sampled, T = 0.9": Sampling(temperature=0.9),
        "sampled, top_p = 0.95": Sampling(top_p=0.95),
    }
    for name, sampling in modes.items():

        def call(repeat: int, sampling=sampling) -> None:
            roots = [engine.root(one) for one in prompts]
            for number, root in enumerate(roots):
                keys = draw_key(repeat, number)[None]
                engine.submit(root, 1, Limits(shape.NEW), sampling, keys)
            done = engine.drain()
            assert all(len(rollout.token_ids) == shape.NEW for _, rollout in done)
            for root in roots:
                engine.prune(root)

        shape.measure(f"ours {name}", call, shape.ROWS * shape.NEW)


def prefill(model: QwenVL, random: np.random.Generator) -> None:
    length = int(os.environ.get("P2", 512))
    engine = make_engine(model, 8, length + 64)
    for group in (1, 8):

        def call(repeat: int, group=group) -> None:
            root = engine.root(prompt(random, length))
            keys = np.stack([draw_key(repeat, sample) for sample in range(group)])
            engine.submit(root, group, Limits(1), Sampling(), keys)
            engine.drain()
            engine.prune(root)

        shape.measure(f"ours prefill of {length} tokens, group of {group}", call, length)


def train(model: QwenVL, random: np.random.Generator) -> None:
    rows, length = shape.ROWS, shape.PROMPT + shape.NEW
    tokens = random.integers(2, shape.VOCABULARY, (1, rows, length)).astype(np.int32)
    scored = np.broadcast_to(np.arange(length) >= shape.PROMPT, tokens.shape)
    advantages = random.standard_normal((1, rows, 1))
    advantages = (advantages - advantages.mean()) / advantages.std()
    batch = {
        "tokens": tokens,
        "positions": np.tile(np.arange(length, dtype=np.int32), (1, rows, 3, 1)),
        "segment_ids": np.ones(tokens.shape, np.int32),
    }
    weights = {"sft": np.ones(tokens.shape) * (np.arange(length) > 0), "grpo": scored}
    for loss, weight in weights.items():
        optimizer, schedule = make_optimizer(optimizer_settings(1e-5), 1000)
        step = make_train_step(loss, optimizer, compute=Compute(), schedule=schedule)
        fields = {"weights": (weight / weight.sum()).astype(np.float32)}
        if loss == "grpo":
            fields["advantages"] = (advantages * scored).astype(np.float32)
        state = [init_state(jax.tree.map(jnp.array, model), optimizer)]

        def call(_: int, step=step, state=state, fields=fields) -> None:
            state[0], metrics = step(state[0], batch | fields)
            jax.block_until_ready(metrics)

        shape.measure(f"ours {loss.upper()} step", call, rows * length)


def main() -> None:
    model = QwenVL(CONFIG, nnx.Rngs(0))
    random = np.random.default_rng(0)
    generate(model, random)
    prefill(model, random)
    train(model, random)


if __name__ == "__main__":
    main()
