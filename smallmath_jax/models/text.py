"""The decoder of Qwen2.5, Qwen2.5-VL and Phi-3: pre-norm, grouped-query attention, SwiGLU, one scan over layers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from smallmath_jax.models.attention import MASKED, AttentionFn
from smallmath_jax.models.config import TextConfig
from smallmath_jax.models.layers import INIT_STD, Linear, rms_norm, swiglu
from smallmath_jax.models.rope import rotate, text_angles

_POLICIES = jax.checkpoint_policies
# What the forward pass keeps for the backward pass, besides each layer's input.
REMAT = {
    "none": None,  # everything
    "full": _POLICIES.nothing_saveable,  # nothing: recompute the layer
    "qkvo": _POLICIES.save_only_these_names("q", "k", "v", "o"),  # no attention recompute
    "dots": _POLICIES.dots_with_no_batch_dims_saveable,  # every linear map's output
}

Constrain = Callable[[jax.Array], jax.Array]


class Layer(nnx.Module):
    """One decoder layer; the decoder holds them stacked, [layers, ...] a parameter."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        hidden, middle = config.hidden_size, config.intermediate
        heads, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.input_norm = nnx.Param(jnp.ones((hidden,)))
        self.post_norm = nnx.Param(jnp.ones((hidden,)))
        self.q = Linear(hidden, heads, bias=config.qkv_bias, rngs=rngs)
        self.k = Linear(hidden, kv, bias=config.qkv_bias, rngs=rngs)
        self.v = Linear(hidden, kv, bias=config.qkv_bias, rngs=rngs)
        self.o = Linear(heads, hidden, bias=False, rngs=rngs)
        self.gate = Linear(hidden, middle, bias=False, rngs=rngs)
        self.up = Linear(hidden, middle, bias=False, rngs=rngs)
        self.down = Linear(middle, hidden, bias=False, rngs=rngs)


class Decoder(nnx.Module):
    """Embedding, stacked layers, final norm and, where it is not tied, the head."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab_size, config.hidden_size)
        self.embed = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))
        keys = jax.random.split(rngs.params(), config.layers)
        self.layers = jax.vmap(lambda key: Layer(config, nnx.Rngs(key)))(keys)
        self.norm = nnx.Param(jnp.ones((config.hidden_size,)))
        # in one step: Flax fixes at the first assignment whether an attribute holds parameters
        self.lm_head = (
            None if config.tie else nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))
        )

    def __call__(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        *,
        attention: AttentionFn,
        remat: str = "none",
        constrain: Constrain = lambda x: x,
    ) -> jax.Array:
        """Embeddings [B, T, D], positions [B, 3, T], segment_ids [B, T] -> final hidden [B, T, D]."""
        config = self.config
        if remat not in REMAT:
            raise ValueError(f"remat {remat!r} is unknown; known: {', '.join(REMAT)}")
        cos, sin = _tables(config, positions, hidden.dtype)

        def body(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            q, k, v = _project(layer, config, x, cos, sin)
            out = attention(
                q,
                k,
                v,
                segment_ids,
                scale=config.head_dim**-0.5,
                causal=True,
                window=config.sliding_window,
            )
            return constrain(_finish(layer, config, x, out)), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        hidden, _ = jax.lax.scan(body, constrain(hidden), self.layers)
        return rms_norm(hidden, self.norm, config.rms_eps)

    def cached(
        self, hidden: jax.Array, positions: jax.Array, cache: dict[str, jax.Array], start: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Like __call__ for T new tokens of each row that follow the start[b] tokens its cache row holds.

        The scan only reads the cache and gives back the new keys and values, which one scatter writes afterwards: no
        layer of the cache is copied, and a donated cache is updated in place. Slots past the end are dropped.
        """
        config = self.config
        cos, sin = _tables(config, positions, hidden.dtype)
        length, slots = hidden.shape[1], cache["k"].shape[2]
        mask = _cache_masks(start, length, slots, config.sliding_window)

        def body(x: jax.Array, inputs: tuple[Layer, jax.Array, jax.Array]):
            layer, old_k, old_v = inputs
            q, k, v = _project(layer, config, x, cos, sin)
            k, v = k.astype(old_k.dtype), v.astype(old_v.dtype)
            out = _cached_attention(q, (old_k, old_v), (k, v), mask, config.head_dim**-0.5)
            return _finish(layer, config, x, out), (k, v)

        hidden, new = jax.lax.scan(body, hidden, (self.layers, cache["k"], cache["v"]))
        rows = jnp.arange(hidden.shape[0])[:, None]
        places = start[:, None] + jnp.arange(length)
        cache = {
            name: cache[name].at[:, rows, places].set(value, mode="drop", unique_indices=True)
            for name, value in zip(("k", "v"), new, strict=True)
        }
        return rms_norm(hidden, self.norm, config.rms_eps), cache


def _tables(config: TextConfig, positions: jax.Array, dtype) -> tuple[jax.Array, jax.Array]:
    angles = text_angles(positions, config.head_dim, config.rope_theta, config.mrope_section)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def _project(layer: Layer, config: TextConfig, x: jax.Array, cos: jax.Array, sin: jax.Array):
    """Rotated q [B, T, H, Hd], rotated k and v [B, T, K, Hd] of a layer's input."""
    x = rms_norm(x, layer.input_norm, config.rms_eps)
    split = lambda y: y.reshape(*y.shape[:2], -1, config.head_dim)
    q = checkpoint_name(rotate(split(layer.q(x)), cos, sin), "q")
    k = checkpoint_name(rotate(split(layer.k(x)), cos, sin), "k")
    return q, k, checkpoint_name(split(layer.v(x)), "v")


def _finish(layer: Layer, config: TextConfig, x: jax.Array, out: jax.Array) -> jax.Array:
    """The rest of a layer, from its attention output [B, T, H, Hd]."""
    out = checkpoint_name(out.reshape(*out.shape[:2], -1), "o")
    x = x + layer.o(out)
    return x + swiglu(layer, rms_norm(x, layer.post_norm, config.rms_eps))


def _cache_masks(start: jax.Array, length: int, slots: int, window: int | None):
    """What T new tokens see: of the cache, bool [B, T, S], and of each other, bool [B, T, T]."""
    places = start[:, None] + jnp.arange(length)
    behind = places[:, :, None] - jnp.arange(slots)
    old = jnp.broadcast_to((jnp.arange(slots) < start[:, None])[:, None], behind.shape)
    ahead = jnp.arange(length)[:, None] - jnp.arange(length)
    new = ahead >= 0
    if window is not None:
        old &= behind < window
        new &= ahead < window
    return old, jnp.broadcast_to(new, (start.shape[0], length, length))


def _cached_attention(
    q: jax.Array,
    old: tuple[jax.Array, jax.Array],
    new: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array, jax.Array],
    scale: float,
) -> jax.Array:
    """Attention of q [B, T, H, Hd] over cached [B, S, K, Hd] and new [B, T, K, Hd] keys, one softmax over both."""
    batch, length, heads, width = q.shape
    kv_heads = old[0].shape[2]
    group = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, width)
    logits = [
        jnp.where(
            mask[:, None, None],
            jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * scale,
            MASKED,
        )
        for (k, _), mask in zip((old, new), masks, strict=True)
    ]
    top = jnp.maximum(logits[0].max(-1, keepdims=True), logits[1].max(-1, keepdims=True))
    weights = [jnp.exp(part - top) for part in logits]
    total = weights[0].sum(-1) + weights[1].sum(-1)
    out = sum(
        jnp.einsum("bkgts,bskh->btkgh", weight.astype(v.dtype), v)
        for weight, (_, v) in zip(weights, (old, new), strict=True)
    )
    out = out / total.transpose(0, 3, 1, 2)[..., None]
    return out.astype(q.dtype).reshape(batch, length, heads, width)
