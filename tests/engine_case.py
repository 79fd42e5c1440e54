"""What the engine's tests share: a tiny vision model, prompts with and without images, and the full forward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from smallmath_jax.data.images import ImageSettings, token_index, vision_row
from smallmath_jax.data.positions import mrope_positions
from smallmath_jax.models.config import tiny_config
from smallmath_jax.models.qwen_vl import QwenVL, abstract_model, forward, head_matrix
from smallmath_jax.models.tree import map_named
from smallmath_jax.records import Prompt, draw_key
from smallmath_jax.rollout.engine import Engine, Rollout

VOCABULARY = 48
START, END, IMAGE, VIDEO, EOS, OTHER_EOS = 1, 2, 3, 4, 5, 6
BANNED = (START, END, IMAGE, VIDEO, 47)
IMAGES = ImageSettings(min_pixels=28 * 28, max_pixels=56 * 56)
PATCHES = 32
CONFIG = tiny_config(
    VOCABULARY,
    image_token_id=IMAGE,
    video_token_id=VIDEO,
    vision_start_token_id=START,
    vision_end_token_id=END,
    eos_ids=(EOS, OTHER_EOS),
    hidden_size=32,
)
CONFIG = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, hidden=32))
LENGTH = 64  # of the cache, and of every row of the full forward pass


@functools.cache
def model(seed: int = 0) -> QwenVL:
    """Weights far wider than at the start of training, so that tokens and images make a difference."""
    rng = np.random.default_rng(seed)

    def fill(name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if name.split("/")[-1] in ("input_norm", "post_norm", "norm", "ln_q") else 0.0
        return jnp.asarray(rng.normal(centre, 0.2, leaf.shape), jnp.float32)

    return map_named(fill, abstract_model(CONFIG))


def engine(params: QwenVL | None = None, **changes) -> Engine:
    settings = dict(
        slots=8,
        cache_length=LENGTH,
        prefill_chunk=8,
        decode_steps=4,
        eos_ids=CONFIG.eos_ids,
        banned_ids=BANNED,
        pad_id=0,
        image_settings=IMAGES,
        max_patches=PATCHES,
        prefill_rows=4,
    )
    return Engine(CONFIG, model() if params is None else params, **(settings | changes))


def prompt(name: str, length: int, grids: tuple[tuple[int, int, int], ...] = ()) -> Prompt:
    """`length` random text tokens after the images, all a function of the name."""
    rng = np.random.default_rng(draw_key("prompt", name))
    ids = []
    for grid in grids:
        ids += [START, *[IMAGE] * (int(np.prod(grid)) // 4), END]
    ids = np.array([*ids, *rng.integers(7, 47, length)], np.int32)
    grids = np.array(grids, np.int32).reshape(-1, 3)
    positions, following = mrope_positions(ids, grids, IMAGE, VIDEO, IMAGES)
    pixels = rng.normal(size=(int(grids.prod(axis=1).sum()), 1176)).astype(np.float32)
    return Prompt(name, "", ids, positions, following, pixels if len(grids) else None, grids)


def keys(*names) -> np.ndarray:
    return np.stack([draw_key("test", name) for name in names])


@jax.jit
def _hidden(params, tokens, positions, vision):
    return forward(params, tokens, positions, jnp.ones_like(tokens), vision)[0]


def full_hidden(start: Prompt, more: np.ndarray, params: QwenVL | None = None) -> np.ndarray:
    """float64 [D]: what the uncached model holds at the last token of prompt + more."""
    return _all_hidden(start, more, params)[len(start.token_ids) + len(more) - 1]


def full_logits(start: Prompt, more: np.ndarray, params: QwenVL | None = None) -> np.ndarray:
    """float64 [len(more) + 1, V]: what the uncached model says of each token of `more` and of the one after."""
    hidden = _all_hidden(start, more, params)
    head = np.asarray(head_matrix(model() if params is None else params), np.float64)
    first = len(start.token_ids) - 1
    logits = hidden[first : first + len(more) + 1] @ head.T
    logits[:, list(BANNED)] = -np.inf
    return logits


def _all_hidden(start: Prompt, more: np.ndarray, params: QwenVL | None) -> np.ndarray:
    ids = np.concatenate([start.token_ids, more])
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(ids)] = ids  # what follows them cannot be seen by them
    after = start.next_position + np.arange(LENGTH)
    positions = np.concatenate([start.positions, np.tile(after, (3, 1))], axis=1)[None, :, :LENGTH]
    vision = vision_row(start.pixels, start.grids, PATCHES, IMAGES)
    vision["token_index"] = token_index(tokens[0], IMAGE, VIDEO)
    vision = {name: array[None] for name, array in vision.items()}
    params = model() if params is None else params
    return np.asarray(_hidden(params, tokens, positions.astype(np.int32), vision), np.float64)


def full_log_probs(start: Prompt, rollout: Rollout, temperature: float, **more) -> np.ndarray:
    """float64 [N]: the log-probs of a rollout's tokens by the uncached model."""
    scores = full_logits(start, rollout.token_ids, **more)[:-1] / (temperature or 1.0)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    return scores[np.arange(len(scores)), rollout.token_ids]
