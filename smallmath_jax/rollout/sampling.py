"""Drawing tokens: every setting is a traced row, every draw is named by (key, token index), no sort of the vocabulary.

The distribution of a row is softmax(logits / temperature) over the tokens that are not banned, kept by top-k, then
kept by top-p of what top-k left (the order and the tie rules of Hugging Face's warpers: a tie at either border stays).
The draw is Gumbel-max. A row at temperature 0 takes the largest logit; its log-prob is that of temperature 1 over the
tokens that are not banned, whatever its top-k and top-p (they cannot change which token it takes).
"""

import jax
import jax.numpy as jnp
from jax import lax

_NEVER = -1e30  # a banned logit; finite, so that no subtraction makes NaN
_ONE_BITS = 0x3F800000  # the bits of float32 1.0: non-negative floats are ordered as their bits are


def sample(
    logits: jax.Array,
    keys: jax.Array,
    index: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    banned: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-prob under the distribution it was drawn from.

    logits f32 [B, V], keys uint32 [B, 2], index i32 [B] (tokens this row drew before), temperature f32 [B]
    (0: greedy), top_k i32 [B] (0: off), top_p f32 [B] (1: off), banned bool [V].
    Returns tokens i32 [B], log_probs f32 [B].
    """
    drawn = temperature > 0
    scores = jnp.where(banned, _NEVER, logits.astype(jnp.float32))
    scores = scores / jnp.where(drawn, temperature, 1.0)[:, None]
    scores = scores - scores.max(axis=-1, keepdims=True)
    weights = jnp.where(banned, 0.0, jnp.exp(scores))  # [B, V], the largest is 1
    threshold = support_threshold(weights, jnp.where(drawn, top_k, 0), jnp.where(drawn, top_p, 1.0))
    kept = weights >= threshold[:, None]
    total = jnp.where(kept, weights, 0.0).sum(axis=-1)

    noise = lax.cond(
        drawn.any(),
        lambda _: _gumbel(keys, index, logits.shape[-1]),
        lambda _: jnp.zeros_like(scores),
        None,
    )
    tokens = _argmax(jnp.where(kept, scores + jnp.where(drawn[:, None], noise, 0.0), -jnp.inf))
    chosen = jnp.take_along_axis(scores, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jnp.log(total)


def support_threshold(weights: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest weight each row keeps, f32 [B]; 0 keeps all. weights f32 [B, V] >= 0 with largest 1.

    Top-k and top-p each cost nothing while no row of the batch has one.
    """

    def by_rank(_):
        wanted = jnp.where(top_k > 0, top_k, weights.shape[1]).astype(jnp.float32)
        return _threshold(weights, jnp.ones_like(weights), wanted)

    def by_mass(ranked):
        kept = jnp.where(weights >= ranked[:, None], weights, 0.0)
        found = _threshold(kept, kept, top_p * kept.sum(axis=-1))
        return jnp.where(top_p < 1.0, jnp.maximum(found, ranked), ranked)

    none = jnp.zeros(weights.shape[:1], weights.dtype)
    ranked = lax.cond((top_k > 0).any(), by_rank, lambda _: none, None)
    return lax.cond((top_p < 1.0).any(), by_mass, lambda ranked: ranked, ranked)


def _threshold(weights: jax.Array, masses: jax.Array, wanted: jax.Array) -> jax.Array:
    """The largest t with sum(masses[weights >= t]) >= wanted, exactly, f32 [B]: bisection over the bits of t."""

    def halve(_, bounds):
        low, high = (
            bounds  # mass(low) >= wanted; mass(high) < wanted, or high is past the largest weight
        )
        middle = low + (high - low) // 2
        least = lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.where(weights >= least[:, None], masses, 0.0).sum(axis=-1) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(wanted.shape, jnp.int32)
    high = jnp.full(wanted.shape, _ONE_BITS + 1, jnp.int32)
    low, _ = lax.fori_loop(0, 30, halve, (low, high))  # 2**30 > _ONE_BITS: the bounds meet
    return lax.bitcast_convert_type(low, jnp.float32)


def _argmax(scores: jax.Array) -> jax.Array:
    """The first largest of each row, i32 [B]: jnp.argmax in two passes that XLA on CPU can vectorise, 4x faster."""
    best = scores.max(axis=-1, keepdims=True)
    places = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    last = scores.shape[-1] - 1  # stands for NaN scores, whose log-prob is NaN as well
    return jnp.where(scores == best, places, last).min(axis=-1)


def _gumbel(keys: jax.Array, index: jax.Array, vocabulary: int) -> jax.Array:
    """Gumbel noise f32 [B, V], a function of each row's own key and index alone (law 5)."""

    def row(key, at):
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), at)
        return jax.random.gumbel(key, (vocabulary,), jnp.float32)

    return jax.vmap(row)(keys, index)


def match_stops(recent: jax.Array, stops: jax.Array) -> jax.Array:
    """Whether a row's newest tokens end with one of its stop sequences, bool [B].

    recent i32 [B, W]: the newest tokens, the newest last, -1 before the first; stops i32 [B, Q, W]: right-aligned
    sequences, -1 where a sequence is shorter than W, all -1 where there is none.
    """
    free = stops < 0
    same = (recent[:, None, :] == stops) | free
    return (same.all(axis=-1) & ~free.all(axis=-1)).any(axis=-1)
