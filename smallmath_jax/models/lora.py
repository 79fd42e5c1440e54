"""Low-rank adapters (Hu et al., arXiv 2106.09685): kernel + lora_a @ lora_b * alpha / rank in chosen linear maps."""

import re
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

from smallmath_jax.models.layers import Linear
from smallmath_jax.models.qwen_vl import QwenVL


def add_lora(model: QwenVL, rank: int, alpha: float, targets: str, key: jax.Array) -> QwenVL:
    """A copy of the model with fresh adapters in every Linear whose slash name (`text/layers/q`) matches `targets`.

    lora_a [..., inputs, rank] is uniform within 1 / sqrt(inputs) and lora_b [..., rank, outputs] zero, so the copy
    computes what the model does. Train names matching `.*/lora_[ab]`. Raises ValueError when nothing matches.
    """
    if rank < 1:
        raise ValueError(f"LoRA rank must be at least 1, not {rank}; rank 0 means: add none")
    names = [name for name, _ in _linears(model)]
    chosen = [name for name in names if re.fullmatch(targets, name)]
    if not chosen:
        raise ValueError(
            f"LoRA targets {targets!r} match no linear map; there are {', '.join(names)}"
        )
    keys = dict(zip(chosen, jax.random.split(key, len(chosen)), strict=True))

    def adapt(name: str, linear: Linear) -> None:
        if name in keys:
            linear.lora_a, linear.lora_b = _adapter(linear.kernel[...], rank, keys[name])
            linear.lora_scale = alpha / rank

    return _edited(model, adapt)


def merge_lora(model: QwenVL) -> QwenVL:
    """A copy of the model with every adapter added to its kernel (in the kernel's dtype) and taken away."""

    def merge(name: str, linear: Linear) -> None:
        if linear.lora_a is None:
            return
        update = linear.lora_a[...].astype(jnp.float32) @ linear.lora_b[...].astype(jnp.float32)
        kernel = linear.kernel[...]
        merged = kernel.astype(jnp.float32) + update * linear.lora_scale
        linear.kernel = nnx.Param(merged.astype(kernel.dtype))
        linear.lora_a, linear.lora_b, linear.lora_scale = None, None, 1.0

    return _edited(model, merge)


def _adapter(kernel: jax.Array, rank: int, key: jax.Array) -> tuple[nnx.Param, nnx.Param]:
    *stack, inputs, outputs = kernel.shape
    bound = inputs**-0.5
    first = jax.random.uniform(key, (*stack, inputs, rank), minval=-bound, maxval=bound)
    return nnx.Param(first), nnx.Param(jnp.zeros((*stack, rank, outputs)))


def _edited(model: QwenVL, edit: Callable[[str, Linear], None]) -> QwenVL:
    copy = jax.tree.map(lambda leaf: leaf, model)  # new module objects around the same arrays
    for name, linear in _linears(copy):
        edit(name, linear)
    return copy


def _linears(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, Linear]]:
    """(slash name, module) of every linear map, a stacked one once."""
    for name, child in sorted(vars(module).items()):
        if isinstance(child, Linear):
            yield prefix + name, child
        elif isinstance(child, nnx.Module):
            yield from _linears(child, f"{prefix}{name}/")
