"""The vision tower of Qwen2.5-VL: window attention, full attention in some blocks, merger of 2 x 2 patches."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from smallmath_jax.models.attention import AttentionFn, local_attention
from smallmath_jax.models.config import VisionConfig
from smallmath_jax.models.layers import INIT_STD, Linear, rms_norm, swiglu, wide
from smallmath_jax.models.rope import rotate, vision_angles
from smallmath_jax.models.text import REMAT, unroll

_EPS = 1e-6  # fixed in the published code, not in config.json


class Block(nnx.Module):
    """One block; the tower holds them stacked, [depth, ...] a parameter. Every linear has a bias."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        hidden, middle = config.hidden, config.intermediate
        self.norm1 = nnx.Param(jnp.ones((hidden,)))
        self.norm2 = nnx.Param(jnp.ones((hidden,)))
        for name in ("q", "k", "v", "proj"):
            setattr(self, name, Linear(hidden, hidden, bias=True, rngs=rngs))
        self.gate = Linear(hidden, middle, bias=True, rngs=rngs)
        self.up = Linear(hidden, middle, bias=True, rngs=rngs)
        self.down = Linear(middle, hidden, bias=True, rngs=rngs)


class Merger(nnx.Module):
    """Norm, then a two-layer perceptron over each group of merge x merge patches."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        wide = config.hidden * config.merge**2
        self.ln_q = nnx.Param(jnp.ones((config.hidden,)))
        self.fc1 = Linear(wide, wide, bias=True, rngs=rngs)
        self.fc2 = Linear(wide, config.out_hidden, bias=True, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, P, hidden] -> [B, P / merge^2, out_hidden]. The GELU is the exact (erf) one."""
        x = rms_norm(x, self.ln_q, _EPS).reshape(x.shape[0], -1, self.fc1.kernel.shape[0])
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=False))


class VisionTower(nnx.Module):
    """Patches in window order in, merged vision tokens in window order out."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        self.config = config
        shape = (config.patch_values, config.hidden)
        self.patch_embed = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), shape))
        keys = jax.random.split(rngs.params(), config.depth)
        self.blocks = jax.vmap(lambda key: Block(config, nnx.Rngs(key)))(keys)
        self.merger = Merger(config, rngs)

    def __call__(
        self,
        pixels: jax.Array,
        rotary: jax.Array,
        window_segments: jax.Array,
        frame_segments: jax.Array,
        *,
        attention: AttentionFn,
        remat: str = "none",
    ) -> jax.Array:
        """pixels [B, P, C], rotary int32 [B, P, 2], two segment ids int32 [B, P] -> [B, P / merge^2, out_hidden]."""
        config = self.config
        head_dim = config.hidden // config.heads
        angles = vision_angles(rotary, head_dim)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        full = jnp.isin(jnp.arange(config.depth), jnp.array(config.full_attention_blocks))
        attend = _attention(config, window_segments, frame_segments, attention)

        def body(x: jax.Array, inputs: tuple[Block, jax.Array]) -> tuple[jax.Array, None]:
            block, is_full = inputs
            y = rms_norm(x, block.norm1, _EPS)
            split = lambda z: z.reshape(*z.shape[:2], config.heads, head_dim)
            turn = lambda z: rotate(split(z).astype(wide(x.dtype)), cos, sin).astype(x.dtype)
            out = attend(turn(block.q(y)), turn(block.k(y)), split(block.v(y)), is_full)
            x = x + block.proj(out.reshape(x.shape))
            return x + swiglu(block, rms_norm(x, block.norm2, _EPS)), None

        if remat != "none":
            body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
        x = pixels @ self.patch_embed[...].astype(pixels.dtype)
        x, _ = jax.lax.scan(body, x, (self.blocks, full), unroll=unroll(config.depth))
        return self.merger(x)


def _attention(
    config: VisionConfig,
    window_segments: jax.Array,
    frame_segments: jax.Array,
    attention: AttentionFn,
) -> Callable[..., jax.Array]:
    """(q, k, v [B, P, H, Hd], is_full) -> [B, P, H, Hd]: within frames where is_full, else within windows."""
    settings = {"scale": (config.hidden // config.heads) ** -0.5}
    reach = (config.window // config.patch) ** 2  # patches of a whole window, a run in window order
    everywhere = {**settings, "causal": False, "window": None}

    def masked(q, k, v, is_full):  # few patches: a window's neighbours are the whole row anyway
        return attention(q, k, v, jnp.where(is_full, frame_segments, window_segments), **everywhere)

    # The gradient of a cond keeps what either branch would: recompute instead, or windows pay for full attention
    @jax.checkpoint
    def within_frames(q, k, v):
        return attention(q, k, v, frame_segments, **everywhere)

    @jax.checkpoint
    def within_windows(q, k, v):
        return local_attention(q, k, v, window_segments, reach=reach, **settings)

    def chosen(q, k, v, is_full):
        return jax.lax.cond(is_full, within_frames, within_windows, q, k, v)

    return masked if window_segments.shape[1] <= 4 * reach else chosen
