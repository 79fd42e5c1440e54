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

_UNROLLED = 4  # layers


def unroll(layers: int) -> int:
    """How far lax.scan is unrolled: wholly for toy models, where stacking residuals costs XLA on CPU half the time."""
    return layers if layers <= _UNROLLED else 1


Constrain = Callable[[jax.Array], jax.Array]
# "k": a [B, kv_heads, head_dim, S] array a layer, "v": a [B, kv_heads, S, head_dim] array a layer. With the cache slots
# last in one and before the width in the other both products of attention are plain ones: 4x an einsum's speed on CPU.
Cache = dict[str, tuple[jax.Array, ...]]


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
        hidden, _ = jax.lax.scan(body, constrain(hidden), self.layers, unroll=unroll(config.layers))
        return rms_norm(hidden, self.norm, config.rms_eps)

    def cached(
        self,
        hidden: jax.Array,
        positions: jax.Array,
        cache: Cache,
        start: jax.Array,
        layers: tuple[Layer, ...] | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Like __call__ for T new tokens of each row that follow the start[b] tokens its cache row holds.

        Layers are unrolled, each with arrays of its own: a scan over stacks copies every layer's weights and cache
        out of the stack at each token (twice the time on CPU). `layers` gives the weights cut by `split_layers`
        beforehand; without it they are cut here. A donated cache is updated in place; slots past its end are dropped.
        """
        config = self.config
        layers = split_layers(self.layers) if layers is None else layers
        cos, sin = _tables(config, positions, hidden.dtype)
        places = start[:, None] + jnp.arange(hidden.shape[1])
        slots = jnp.arange(cache["v"][0].shape[2])
        mask = slots <= places[:, :, None]
        if config.sliding_window is not None:
            mask &= places[:, :, None] - slots < config.sliding_window
        rows = jnp.arange(hidden.shape[0])[:, None]
        new = {"k": [], "v": []}
        for layer, keys, values in zip(layers, cache["k"], cache["v"], strict=True):
            q, k, v = _project(layer, config, hidden, cos, sin)
            write = {"mode": "drop", "unique_indices": True}
            keys = keys.at[rows, :, :, places].set(k.astype(keys.dtype), **write)
            values = values.at[rows, :, places].set(v.astype(values.dtype), **write)
            out = _cached_attention(q, keys, values, mask, config.head_dim**-0.5)
            hidden = _finish(layer, config, hidden, out)
            new["k"].append(keys)
            new["v"].append(values)
        cache = {name: tuple(arrays) for name, arrays in new.items()}
        return rms_norm(hidden, self.norm, config.rms_eps), cache


def split_layers(layers: Layer) -> tuple[Layer, ...]:
    """The stacked layers as one module a layer, their parameters without the leading axis."""
    count = layers.input_norm[...].shape[0]
    return tuple(jax.tree.map(lambda leaf, at=at: leaf[at], layers) for at in range(count))


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


def _cached_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    """Attention of q [B, T, H, Hd] over k [B, K, Hd, S], v [B, K, S, Hd] where mask [B, T, S]: [B, T, H, Hd]."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = (q * scale).reshape(batch, kv_heads, group * length, width).astype(k.dtype)
    logits = jnp.matmul(q, k, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, kv_heads, group, length, -1)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jnp.exp(logits - logits.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype).reshape(batch, kv_heads, group * length, -1)
    out = jnp.matmul(weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, kv_heads, group, length, width) / total
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)
    return out.astype(v.dtype)
