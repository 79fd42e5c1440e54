"""The two building blocks of every tower: a linear map (with an optional low-rank adapter) and RMS norm."""

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02  # Hugging Face's initializer_range of every supported family


class Linear(nnx.Module):
    """x @ kernel + bias, plus (x @ lora_a) @ lora_b * lora_scale where an adapter was added.

    Master weights keep their own dtype and are cast to that of x, so compute follows the activations.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None
        # nnx.data: Flax otherwise fixes at this None that the attribute never holds parameters
        self.lora_a = nnx.data(None)  # [inputs, rank]
        self.lora_b = nnx.data(None)  # [rank, outputs]
        self.lora_scale = 1.0  # alpha / rank

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., inputs] -> [..., outputs], in x's dtype."""
        lead = x.shape[:-1]
        # Two dimensions, because XLA on CPU materialises a slow transpose in the kernel's gradient of a 3-D product
        x = x.reshape(-1, x.shape[-1])
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora_a is not None:
            low = x @ self.lora_a[...].astype(x.dtype)
            y = y + (low @ self.lora_b[...].astype(x.dtype)) * self.lora_scale
        return y.reshape(*lead, -1)


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """What norms and softmax are computed in: fp32, or the dtype itself where that is wider."""
    return jnp.promote_types(dtype, jnp.float32)


def rms_norm(x: jax.Array, weight: nnx.Param, eps: float) -> jax.Array:
    """Normalises [..., D] in fp32, casts back, THEN multiplies by the weight: the published order, seen in bf16."""
    y = x.astype(wide(x.dtype))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight[...].astype(x.dtype)


def swiglu(block: nnx.Module, x: jax.Array) -> jax.Array:
    """down(silu(gate(x)) * up(x)) of a block that has these three linears: [..., D] -> [..., D]."""
    return block.down(jax.nn.silu(block.gate(x)) * block.up(x))
