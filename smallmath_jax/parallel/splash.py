"""Which attention a program uses on which machine, and the TPU kernel (splash) under a mesh.

Splash never writes the T x T logits: at T = 4096 it needs 2 MiB where the plain form needs 2 GiB a layer. It is a
Pallas kernel, so GSPMD cannot cut it; `splash_attention` does, by shard_map: rows over data and fsdp, heads over model.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from smallmath_jax.models import attention as portable
from smallmath_jax.parallel.mesh import BATCH_AXES, batch_shards, platform_of

LANES = 128  # a TPU vector register's width: splash takes lengths that are a multiple of it
BLOCK = 1024  # queries and keys a tile; 2048 overflows VMEM at compile time
COMPUTE_BLOCK = 512  # keys multiplied at once inside a tile
SHORT = 1024  # up to here [T, T] logits are cheaper than a loop, on machines without splash


def attention_for(
    mesh: Mesh, platform: str | None = None, interpret: bool = False
) -> portable.AttentionFn:
    """The attention for training on `mesh`: splash on TPU, else plain or, for long rows, blocked.

    The choice is made per call, by row length: one slot serves the decoder's rows and the vision tower's
    patches. `platform` replaces that of the mesh's devices (never ask jax.devices(): a program compiled for
    an absent TPU would get the CPU's choice). `interpret` runs the kernel's logic on any machine, slowly.
    """
    platform = platform or platform_of(mesh)
    splash = functools.partial(splash_attention, mesh=mesh, interpret=interpret)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, **settings):
        length = q.shape[1]
        if length % LANES == 0 and (interpret or (platform == "tpu" and length > LANES)):
            return splash(q, k, v, segment_ids, **settings)
        if length <= SHORT:
            return portable.einsum_attention(q, k, v, segment_ids, **settings)
        return portable.blocked_attention(q, k, v, segment_ids, **settings)

    return attention


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    mesh: Mesh,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention as models.attention defines it, q [B, T, H, Hd], k and v [B, T, K, Hd] -> [B, T, H, Hd].

    `model` cuts the query heads where it divides them; fewer kv heads than shards are repeated so that each shard
    has the one it needs. What the mesh does not divide is computed on every shard. Padding tokens see each other
    here and nothing in einsum_attention: both give finite numbers that nothing reads.

    Raises:
      ValueError: the length is not a multiple of 128.
    """
    length, heads, kv_heads = q.shape[1], q.shape[2], k.shape[2]
    if length % LANES:
        raise ValueError(f"splash attention: row length {length} is not a multiple of {LANES}")
    shards = mesh.shape["model"]
    head_axis = "model" if heads % shards == 0 else None
    if head_axis and kv_heads % shards:
        if shards % kv_heads:
            head_axis = None
        else:
            k, v = (jnp.repeat(x, shards // kv_heads, axis=2) for x in (k, v))
    rows = BATCH_AXES if q.shape[0] % batch_shards(mesh) == 0 else None
    wide, flat = P(rows, None, head_axis, None), P(rows, None)
    local_heads = heads // (shards if head_axis else 1)
    body = functools.partial(
        _local, heads=local_heads, causal=causal, window=window, interpret=interpret
    )
    # The scale is put on q before the kernel, which has none; in fp32, so bf16 rounds once.
    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    specs = (wide, wide, wide, flat)
    # check_vma off: the kernel's outputs do not say over which axes they vary
    call = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=wide, check_vma=False)
    return call(q, k, v, segment_ids)


def _local(q, k, v, segment_ids, *, heads: int, causal: bool, window: int | None, interpret: bool):
    """One shard's [B, T, heads, Hd]: the kernel takes [heads, T, Hd] of one row."""
    length, width = q.shape[1], q.shape[3]
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([_mask(length, causal, window)] * heads),
        block_sizes=_blocks(length),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="o",  # kept by the remat policies that keep the attention's output
        interpret=interpret,
    )
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment_ids, segment_ids))
    return out.swapaxes(1, 2)[..., :width]


def _mask(length: int, causal: bool, window: int | None) -> masks.Mask:
    shape = (length, length)
    if window is not None:  # a token sees `window` tokens, itself included
        return masks.LocalMask(shape, (window - 1, 0 if causal else None), 0)
    return masks.CausalMask(shape) if causal else masks.FullMask(shape)


def _blocks(length: int) -> kernels.BlockSizes:
    """The largest tiles that divide the row."""
    block = math.gcd(length, BLOCK)
    inner = math.gcd(block, COMPUTE_BLOCK)
    return kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=inner,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=inner,
        block_q_dq=block,
        block_kv_dq=block,
    )
