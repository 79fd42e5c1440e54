"""Attention as a slot: functions of (q, k, v, segment_ids) that can stand in for each other.

q is [B, T, H, Hd], k and v are [B, T, K, Hd] with H a multiple of K (head h reads kv head h // (H / K)), segment_ids
is int32 [B, T] with 0 for padding. A token sees its own segment; `causal` hides what comes later in the row and
`window` what lies `window` tokens or more behind. Rows of padding return finite numbers without meaning.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from smallmath_jax.models.layers import wide

AttentionFn = Callable[..., jax.Array]

MASKED = -1e30  # finite, so a fully masked row is uniform and not NaN


def einsum_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
) -> jax.Array:
    """Plain attention with [B, H, T, T] logits, softmax in fp32: [B, T, H, Hd]."""
    slots = jnp.arange(q.shape[1])
    mask = visible(segment_ids, slots, segment_ids, slots, causal, window)
    return masked_attention(q, k, v, mask, scale)


def visible(
    query_segments: jax.Array,
    query_slots: jax.Array,
    key_segments: jax.Array,
    key_slots: jax.Array,
    causal: bool,
    window: int | None,
) -> jax.Array:
    """bool [B, T, S]: which of S keys each of T queries sees. Segments are [B, .], slots [.] places in the row."""
    same = query_segments[:, :, None] == key_segments[:, None, :]
    mask = same & (query_segments[:, :, None] > 0)
    behind = query_slots[:, None] - key_slots[None, :]
    if causal:
        mask &= behind >= 0
    if window is not None:
        mask &= behind < window
    return mask


def masked_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, scale: float
) -> jax.Array:
    """q [B, T, H, Hd] over k, v [B, S, K, Hd] where mask [B, T, S] is true: [B, T, H, Hd].

    Written as batched matrix products over (B, K) with the group's queries side by side: kv heads are never
    repeated, and XLA on CPU runs this about twice as fast as the five-letter einsum.
    """
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    group = heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    q = q.reshape(batch, kv_heads, group * length, width)
    logits = jnp.matmul(q, k.transpose(0, 2, 3, 1), preferred_element_type=wide(q.dtype)) * scale
    logits = logits.reshape(batch, kv_heads, group, length, -1)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, group * length, -1)
    out = jnp.matmul(weights, v.transpose(0, 2, 1, 3))
    out = out.reshape(batch, kv_heads, group, length, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, width)


def blocked_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    block: int = 256,
) -> jax.Array:
    """The numbers of einsum_attention in blocks of queries: logits take [B, H, block, T], in the backward pass too.

    The portable fallback where no kernel serves: same arithmetic, each block recomputed for its gradient.
    """
    batch, length, heads, width = q.shape
    count = -(-length // block)
    padding = count * block - length
    slots = jnp.arange(length)
    blocks = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, count, block, heads, width).swapaxes(0, 1)
    segments = jnp.pad(segment_ids, ((0, 0), (0, padding)))
    segments = segments.reshape(batch, count, block).swapaxes(0, 1)

    @jax.checkpoint
    def attend(inputs: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        queries, query_segments, number = inputs
        query_slots = number * block + jnp.arange(block)
        mask = visible(query_segments, query_slots, segment_ids, slots, causal, window)
        return masked_attention(queries, k, v, mask, scale)

    out = jax.lax.map(attend, (blocks, segments, jnp.arange(count)))
    return out.swapaxes(0, 1).reshape(batch, count * block, heads, width)[:, :length]


def local_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    scale: float,
    reach: int,
) -> jax.Array:
    """einsum_attention(causal=False) where every segment is one run of at most `reach` tokens.

    A block of `reach` queries then needs only its own and the two neighbouring blocks of keys, so the cost is
    3 * reach * T instead of T * T: the vision tower's windows.
    """
    batch, length, heads, width = q.shape
    count = -(-length // reach)
    padding = ((0, 0), (0, count * reach - length))
    cut = lambda x: jnp.pad(x, padding + ((0, 0),) * (x.ndim - 2)).reshape(
        batch, count, reach, *x.shape[2:]
    )

    def neighbours(x: jax.Array) -> jax.Array:
        blocks = jnp.pad(cut(x), ((0, 0), (1, 1)) + ((0, 0),) * (x.ndim - 1))
        near = jnp.concatenate([blocks[:, :-2], blocks[:, 1:-1], blocks[:, 2:]], axis=2)
        return near.reshape(batch * count, 3 * reach, *x.shape[2:])

    fold = lambda x: cut(x).reshape(batch * count, reach, *x.shape[2:])
    mask = visible(
        fold(segment_ids),
        jnp.arange(reach),
        neighbours(segment_ids),
        jnp.arange(3 * reach),
        causal=False,
        window=None,
    )
    out = masked_attention(fold(q), neighbours(k), neighbours(v), mask, scale)
    return out.reshape(batch, count * reach, heads, width)[:, :length]
