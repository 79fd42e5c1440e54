"""The whole model, for every family: a decoder, a vision tower where the family has one, an optional value head."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from smallmath_jax.models.attention import AttentionFn, einsum_attention
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.text import Cache, Constrain, Decoder, Layer
from smallmath_jax.models.vision import VisionTower


class QwenVL(nnx.Module):
    """Parameters only; the functions below compute with them. Used as a plain pytree by jax.jit and jax.grad."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.text = Decoder(config.text, rngs)
        self.vision = VisionTower(config.vision, rngs) if config.vision is not None else None
        self.value_head = nnx.data(None)  # a Linear [D, 1] where value_head.add_value_head put one


def abstract_model(config: ModelConfig) -> QwenVL:
    """The model with ShapeDtypeStruct leaves: for sharding, compiling and counting without memory."""
    return jax.eval_shape(lambda key: QwenVL(config, nnx.Rngs(key)), jax.random.key(0))


def embed(
    model: QwenVL,
    tokens: jax.Array,
    vision: Mapping[str, jax.Array] | None = None,
    compute_dtype=jnp.float32,
    *,
    remat: str = "none",
    attention: AttentionFn = einsum_attention,
) -> jax.Array:
    """Tokens int32 [B, T] -> [B, T, D], vision tokens replaced by the row's image embeddings.

    `vision` holds [B, P, ...] arrays of data.images.vision_row and token_index int32 [B, T]: which of the row's P / 4
    vision tokens, in reading order, stands at each place (-1: text).
    """
    embeddings = model.text.embed[...][tokens].astype(compute_dtype)
    if vision is None:
        return embeddings
    if model.vision is None:
        raise ValueError(
            f"the batch has images, but family {model.config.family!r} has no vision tower"
        )
    images = embed_images(model, vision, compute_dtype, remat=remat, attention=attention)
    index = vision["token_index"]
    seen = jnp.take_along_axis(images, jnp.maximum(index, 0)[..., None], axis=1)
    return jnp.where((index >= 0)[..., None], seen, embeddings)


def embed_images(
    model: QwenVL,
    vision: Mapping[str, jax.Array],
    compute_dtype=jnp.float32,
    *,
    remat: str = "none",
    attention: AttentionFn = einsum_attention,
) -> jax.Array:
    """Vision tokens [B, P / 4, D] of each row in reading order; padding follows the real ones."""
    pixels = vision["pixels"].astype(compute_dtype)
    segments = vision["window_segments"], vision["frame_segments"]
    merged = model.vision(pixels, vision["rotary"], *segments, remat=remat, attention=attention)
    return jnp.take_along_axis(merged, vision["restore"][..., None], axis=1)


def forward(
    model: QwenVL,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    vision: Mapping[str, jax.Array] | None = None,
    *,
    compute_dtype=jnp.float32,
    remat: str = "none",
    attention: AttentionFn = einsum_attention,
    constrain: Constrain = lambda x: x,
) -> jax.Array:
    """Final hidden states [B, T, D] (after the last norm) of tokens int32 [B, T].

    positions int32 [B, 3, T]; segment_ids int32 [B, T], 0 = padding: packed, left- and right-padded rows are all the
    same thing. `constrain` is applied to every [B, T, D] residual (sharding). Logits are hidden @ head_matrix(model).T.
    """
    hidden = embed(model, tokens, vision, compute_dtype, remat=remat, attention=attention)
    return model.text(
        hidden, positions, segment_ids, attention=attention, remat=remat, constrain=constrain
    )


def head_matrix(model: QwenVL) -> jax.Array:
    """[V, D]: the head, which is the embedding where the two are tied."""
    head = model.text.embed if model.text.lm_head is None else model.text.lm_head
    return head[...]


def init_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> Cache:
    """An empty cache: a layer has k [batch, kv_heads, head_dim, length] and v [batch, kv_heads, length, head_dim]."""
    text = config.text
    wide, tall = (text.head_dim, length), (length, text.head_dim)
    make = lambda shape: tuple(
        jnp.zeros((batch, text.kv_heads, *shape), dtype) for _ in range(text.layers)
    )
    return {"k": make(wide), "v": make(tall)}


def forward_cached(
    model: QwenVL,
    embeddings: jax.Array,
    positions: jax.Array,
    cache: Cache,
    start: jax.Array,
    layers: tuple[Layer, ...] | None = None,
    *,
    compute_dtype=jnp.float32,
) -> tuple[jax.Array, Cache]:
    """Final hidden [B, T, D] of T new tokens a row, and the cache with them written.

    Token t of row b is written at cache slot start[b] + t and sees the slots up to its own; the cache is dense from
    slot 0. Trailing padding of a chunk does no harm: what follows overwrites it. Donate the cache to keep it in place.
    `layers` are the weights of text.split_layers, cut once for many calls.
    """
    return model.text.cached(embeddings.astype(compute_dtype), positions, cache, start, layers)
