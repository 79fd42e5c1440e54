"""The compiled programs under the engine: prepare weights, look at images, prefill pages, fill slots, decode.

Each is traced once for an engine's shape; everything a request can ask for is a traced array. Pages are a pool of
[pages, ...] arrays a layer, slots the dense cache that decoding works on.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from smallmath_jax.models import value_head
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.lora import merge_lora
from smallmath_jax.models.qwen_vl import (
    QwenVL,
    embed_images,
    forward_cached,
    head_matrix,
    init_cache,
)
from smallmath_jax.models.text import Cache, Layer, split_layers
from smallmath_jax.models.tree import leaf_name, map_named
from smallmath_jax.parallel import rules
from smallmath_jax.rollout.sampling import match_stops, sample

RUNNING, EOS, STOP, LENGTH = range(4)
REASONS = ("running", "eos", "stop", "length")
MAX_STOPS, MAX_STOP_LENGTH = 16, 16  # stop sequences of a request, tokens of one
# Of [slots, kv heads, ...], [pages, kv heads, ...] and [slots, vocabulary]: each chip decodes its own slots; a page,
# which any slot may need, lies on all of them.
SLOTS, PAGES, LOGITS = ("data", "model"), (None, "model"), ("data", "model")


@dataclasses.dataclass(frozen=True)
class Shape:
    """All that a program's shapes depend on: hashable, the static argument of every program."""

    config: ModelConfig
    slots: int
    cache_length: int  # a multiple of chunk
    chunk: int
    pages: int
    prefill_rows: int
    decode_steps: int
    dtype: str
    mesh: Mesh | None = None  # of the weights; None: the default device

    @property
    def row_pages(self) -> int:
        return self.cache_length // self.chunk


class Weights(NamedTuple):
    """The model as the programs read it, in the compute dtype, with one module a layer in place of the stack."""

    model: QwenVL  # text.layers is None
    layers: tuple[Layer, ...]
    banned: jax.Array  # bool [V]
    eos: jax.Array  # i32 [E]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Weights with their modules taken apart: flattening modules at each call costs milliseconds, a tuple nothing."""

    leaves: tuple[jax.Array, ...]
    structure: Any = dataclasses.field(metadata={"static": True})

    def unpack(self) -> Weights:
        return jax.tree.unflatten(self.structure, self.leaves)


class Rows(NamedTuple):
    """What each slot is doing, kept on the host; the first axis is the slot."""

    active: np.ndarray  # bool [B]
    last: np.ndarray  # i32 [B] newest token, not yet in the cache
    length: np.ndarray  # i32 [B] tokens in the cache
    position: np.ndarray  # i32 [B] mRoPE position of `last`, the same on all three axes
    count: np.ndarray  # i32 [B] tokens drawn
    limit: np.ndarray  # i32 [B] tokens to draw at most
    keys: np.ndarray  # uint32 [B, 2]
    temperature: np.ndarray  # f32 [B]
    top_k: np.ndarray  # i32 [B]
    top_p: np.ndarray  # f32 [B]
    stops: np.ndarray  # i32 [B, MAX_STOPS, MAX_STOP_LENGTH], see sampling.match_stops
    recent: np.ndarray  # i32 [B, MAX_STOP_LENGTH] newest drawn tokens, the newest last


def idle_rows(slots: int) -> Rows:
    """Rows with nothing to do."""
    whole = lambda *shape: np.zeros((slots, *shape), np.int32)
    return Rows(
        active=np.zeros(slots, bool),
        last=whole(),
        length=whole(),
        position=whole(),
        count=whole(),
        limit=whole(),
        keys=np.zeros((slots, 2), np.uint32),
        temperature=np.zeros(slots, np.float32),
        top_k=whole(),
        top_p=np.ones(slots, np.float32),
        stops=whole(MAX_STOPS, MAX_STOP_LENGTH) - 1,
        recent=whole(MAX_STOP_LENGTH) - 1,
    )


@functools.partial(jax.jit, static_argnums=0)
def make_caches(shape: Shape) -> tuple[Cache, Cache]:
    """(slots, pool of pages), both zero."""
    slots = init_cache(shape.config, shape.slots, shape.cache_length, shape.dtype)
    pool = init_cache(shape.config, shape.pages, shape.chunk, shape.dtype)
    return _placed(shape, slots, SLOTS), _placed(shape, pool, PAGES)


@functools.partial(jax.jit, static_argnums=0)
def prepare(shape: Shape, params: QwenVL, banned: jax.Array, eos: jax.Array) -> Packed:
    """A copy of the weights in the compute dtype (the value head in fp32), layers apart.

    Adapters are merged in fp32 only: in bf16 an update smaller than a kernel's last digit would be lost, and the
    sampler would not be the policy that is trained (law 2).
    """

    def cast(name: str, leaf: jax.Array) -> jax.Array:
        return leaf.astype(jnp.float32 if name.startswith("value_head") else shape.dtype)

    model = map_named(cast, merge_lora(params) if shape.dtype == "float32" else params)
    layers = split_layers(model.text.layers)
    model.text.layers = None
    weights = Weights(model, layers, banned, eos)
    if shape.mesh is not None:
        weights = lax.with_sharding_constraint(weights, weight_shardings(shape.mesh, weights))
    leaves, structure = jax.tree.flatten(weights)
    return Packed(tuple(leaves), structure)


def weight_shardings(mesh: Mesh, weights: Weights) -> Weights:
    """Where prepared weights (arrays or ShapeDtypeStruct) lie on a mesh: as `parallel.rules` cuts the stacked ones."""
    units = rules.head_units(weights.model.config)

    def layer(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = f"text/layers/{leaf_name(path)}"
        spec = rules.spec_for(name, (1, *leaf.shape), mesh.shape, units=units)
        return NamedSharding(mesh, PartitionSpec(*spec[1:]))

    return Weights(
        rules.shardings(weights.model, mesh),
        tuple(jax.tree_util.tree_map_with_path(layer, one) for one in weights.layers),
        rules.replicated(mesh),
        rules.replicated(mesh),
    )


@functools.partial(jax.jit, static_argnums=0)
def see(shape: Shape, packed: Packed, vision: dict[str, jax.Array]) -> jax.Array:
    """Vision tokens [P / 4, D] of one row of data.images.vision_row, in reading order."""
    rows = {name: array[None] for name, array in vision.items()}
    return embed_images(packed.unpack().model, rows, jnp.dtype(shape.dtype))[0]


class Chunks(NamedTuple):
    """The pages a prefill call computes, a row each."""

    tokens: np.ndarray  # i32 [R, C]
    positions: np.ndarray  # i32 [R, 3, C]
    start: np.ndarray  # i32 [R] place of the chunk's first token on its path
    before: np.ndarray  # i32 [R, row_pages] the path's earlier pages, anything past them
    target: np.ndarray  # i32 [R] the page to write; `pages` for an idle row
    last: np.ndarray  # i32 [R] column whose value is wanted
    seen: np.ndarray  # [R, C, D] vision tokens, in the compute dtype
    is_seen: np.ndarray  # bool [R, C]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def prefill(shape: Shape, packed: Packed, pool: Cache, chunks: Chunks) -> tuple[Cache, jax.Array]:
    """The pool with the pages written, and the value head's reading f32 [R] (0 without one)."""
    weights = packed.unpack()
    rows, kv_heads, head_dim = shape.prefill_rows, *_head_shape(shape)
    work = {
        "k": tuple(
            pages[chunks.before].transpose(0, 2, 3, 1, 4).reshape(rows, kv_heads, head_dim, -1)
            for pages in pool["k"]
        ),
        "v": tuple(
            pages[chunks.before].transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, -1, head_dim)
            for pages in pool["v"]
        ),
    }
    embeddings = weights.model.text.embed[...][chunks.tokens]
    embeddings = jnp.where(chunks.is_seen[..., None], chunks.seen, embeddings)
    hidden, work = _forward(shape, weights, embeddings, chunks.positions, work, chunks.start)
    axes = {"k": 2, "v": 1}  # of the cache slots, in one row
    cut = {
        name: jax.vmap(
            lambda row, at, axis=axis: lax.dynamic_slice_in_dim(row, at, shape.chunk, axis)
        )
        for name, axis in axes.items()
    }
    pool = {
        name: tuple(
            pages.at[chunks.target].set(cut[name](row, chunks.start), mode="drop")
            for pages, row in zip(pool[name], work[name], strict=True)
        )
        for name in axes
    }
    return _placed(shape, pool, PAGES), _values(weights.model, hidden, chunks.last)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def fill_slots(
    shape: Shape, slots: Cache, pool: Cache, slot: jax.Array, chunk: jax.Array, page: jax.Array
) -> Cache:
    """Copies pages i32 [M] into chunks i32 [M] of slots i32 [M]; a slot past the last is left out."""
    kv_heads, head_dim = _head_shape(shape)
    cut, whole = (shape.slots, kv_heads), (shape.row_pages, shape.chunk)
    keys = tuple(
        old.reshape(*cut, head_dim, *whole)
        .at[slot, :, :, chunk]
        .set(pages[page], mode="drop")
        .reshape(old.shape)
        for old, pages in zip(slots["k"], pool["k"], strict=True)
    )
    values = tuple(
        old.reshape(*cut, *whole, head_dim)
        .at[slot, :, chunk]
        .set(pages[page], mode="drop")
        .reshape(old.shape)
        for old, pages in zip(slots["v"], pool["v"], strict=True)
    )
    return _placed(shape, {"k": keys, "v": values}, SLOTS)


class Decoded(NamedTuple):
    """What a decode call did."""

    tokens: jax.Array  # i32 [N, B]
    log_probs: jax.Array  # f32 [N, B]
    count: jax.Array  # i32 [B] tokens drawn so far, those of this call included
    reason: jax.Array  # i32 [B] RUNNING, or why the row ended
    steps: jax.Array  # i32 steps run


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode(
    shape: Shape, packed: Packed, slots: Cache, rows: Rows, leave: jax.Array
) -> tuple[Cache, Decoded]:
    """Up to decode_steps tokens for every active row; ends early when at most `leave` rows are still active."""
    weights = packed.unpack()
    head = head_matrix(weights.model)

    class State(NamedTuple):
        cache: Cache
        rows: Rows
        out: Decoded

    def go_on(state: State) -> jax.Array:
        return (state.out.steps < shape.decode_steps) & (state.rows.active.sum() > leave)

    def step(state: State) -> State:
        rows, out = state.rows, state.out
        hidden, cache = _forward(
            shape,
            weights,
            _placed(shape, weights.model.text.embed[...][rows.last][:, None], ("data",)),
            jnp.broadcast_to(rows.position[:, None, None], (shape.slots, 3, 1)),
            state.cache,
            jnp.where(rows.active, rows.length, shape.cache_length),  # idle rows write nothing
        )
        logits = jnp.einsum("bd,vd->bv", hidden[:, 0], head, preferred_element_type=jnp.float32)
        logits = _placed(shape, logits, LOGITS)
        tokens, log_probs = sample(
            logits, rows.keys, rows.count, rows.temperature, rows.top_k, rows.top_p, weights.banned
        )
        rows, reason = _advance(rows, tokens, weights.eos)
        return State(
            cache,
            rows,
            Decoded(
                out.tokens.at[out.steps].set(tokens),
                out.log_probs.at[out.steps].set(log_probs),
                rows.count,
                jnp.where(out.reason == RUNNING, reason, out.reason),
                out.steps + 1,
            ),
        )

    drawn = (shape.decode_steps, shape.slots)
    nothing = Decoded(
        jnp.zeros(drawn, jnp.int32),
        jnp.zeros(drawn, jnp.float32),
        rows.count,
        jnp.zeros(shape.slots, jnp.int32),
        jnp.int32(0),
    )
    state = lax.while_loop(go_on, step, State(slots, Rows(*map(jnp.asarray, rows)), nothing))
    return _placed(shape, state.cache, SLOTS), state.out


def _advance(rows: Rows, tokens: jax.Array, eos: jax.Array) -> tuple[Rows, jax.Array]:
    """Rows after drawing tokens i32 [B], and why each ended now i32 [B]: EOS before a stop, a stop before the limit."""
    active = rows.active
    grown = active.astype(jnp.int32)
    recent = jnp.concatenate([rows.recent[:, 1:], tokens[:, None]], axis=1)
    count = rows.count + grown
    reason = jnp.select(
        [
            ~active,
            (tokens[:, None] == eos).any(axis=1),
            match_stops(recent, rows.stops),
            count >= rows.limit,
        ],
        [RUNNING, EOS, STOP, LENGTH],
        RUNNING,
    )
    return rows._replace(
        active=active & (reason == RUNNING),
        last=jnp.where(active, tokens, rows.last),
        length=rows.length + grown,
        position=rows.position + grown,
        count=count,
        recent=jnp.where(active[:, None], recent, rows.recent),
    ), reason


def _forward(shape, weights, embeddings, positions, cache, start):
    return forward_cached(
        weights.model,
        embeddings,
        positions,
        cache,
        start,
        weights.layers,
        compute_dtype=jnp.dtype(shape.dtype),
    )


def _values(model: QwenVL, hidden: jax.Array, last: jax.Array) -> jax.Array:
    if model.value_head is None:
        return jnp.zeros(hidden.shape[:1], jnp.float32)
    return value_head.values(model, value_head.last_hidden(hidden, last + 1))


def _head_shape(shape: Shape) -> tuple[int, int]:
    return shape.config.text.kv_heads, shape.config.text.head_dim


def sharding(
    shape: Shape, size: tuple[int, ...], axes: tuple[str | None, ...]
) -> NamedSharding | None:
    """Of an array of that size cut by its first dimensions; an axis that does not divide its dimension is left out."""
    if shape.mesh is None:
        return None
    mesh = shape.mesh.shape
    cut = (
        axis if axis and whole % mesh[axis] == 0 else None
        for axis, whole in zip(axes, size, strict=False)
    )
    return NamedSharding(shape.mesh, PartitionSpec(*cut))


def _placed(shape: Shape, arrays: Any, axes: tuple[str | None, ...]) -> Any:
    """`arrays`, each laid out as `sharding` says."""
    if shape.mesh is None:
        return arrays
    place = lambda leaf: lax.with_sharding_constraint(leaf, sharding(shape, leaf.shape, axes))
    return jax.tree.map(place, arrays)
