"""Rotary embeddings: plain, multimodal (mRoPE) and the vision tower's two-dimensional one.

Angles are always fp32: bf16 angles are coarse at large coordinates.
"""

import jax
import jax.numpy as jnp
import numpy as np

_VISION_THETA = 10000.0


def inverse_frequencies(count: int, theta: float) -> np.ndarray:
    """theta ** -(i / count) for i in range(count): float32 [count]."""
    return (theta ** -(np.arange(count) / count)).astype(np.float32)


def text_angles(
    positions: jax.Array, head_dim: int, theta: float, sections: tuple[int, int, int] | None
) -> jax.Array:
    """positions int32 [B, 3, T] (t, h, w) -> angles fp32 [B, T, head_dim / 2].

    With `sections` the first sections[0] frequencies turn with t, the next with h, the rest with w (Qwen2-VL, 2.1);
    without, all turn with the first axis.
    """
    frequencies = inverse_frequencies(head_dim // 2, theta)
    axes = np.repeat(np.arange(3), sections) if sections else np.zeros(head_dim // 2, np.int32)
    if len(axes) != head_dim // 2:
        raise ValueError(f"mrope_section {sections} must sum to head_dim / 2 = {head_dim // 2}")
    if sections is None:
        chosen = positions[:, :1].astype(jnp.float32)
    else:
        chosen = positions.astype(jnp.float32)[:, axes]
    return jnp.swapaxes(chosen, 1, 2) * frequencies


def vision_angles(rotary: jax.Array, head_dim: int) -> jax.Array:
    """rotary int32 [..., P, 2] (h, w of each patch) -> angles fp32 [..., P, head_dim / 2]: h's half, then w's."""
    frequencies = inverse_frequencies(head_dim // 4, _VISION_THETA)
    angles = rotary.astype(jnp.float32)[..., None] * frequencies
    return angles.reshape(*rotary.shape[:-1], head_dim // 2)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the split halves of x [B, T, H, head_dim] by cos, sin [B, T, head_dim / 2], in x's dtype."""
    cos, sin = (table[:, :, None].astype(x.dtype) for table in (cos, sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
