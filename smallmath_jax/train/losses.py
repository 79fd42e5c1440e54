"""Token log-probabilities through the vocabulary head, and every loss, as pure functions of arrays.

Law 1: each loss is a weighted sum over tokens, sequences or pairs whose weights were computed on the host
(`train.advantages`), so its gradient does not depend on how the batch was cut, packed, padded or sharded.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Batch = dict[str, Any]

BANNED_LOGIT = -1e30  # finite: probability exactly 0, and 0 * logit is 0, not NaN
RATIO_LIMIT = 20.0  # |log ratio| beyond it is clamped before exp


class TokenScores(NamedTuple):
    """What the head says of each token of a batch; all [B, T], aligned with the token scored, 0 where not scored."""

    log_probs: Array  # float32, differentiable
    entropy: Array  # float32 nats of the distribution the token was drawn from; no gradient
    hit: Array  # bool: the token is (one of) the most likely


class Mean(NamedTuple):
    """A metric that is total / count over everything the step saw."""

    total: Array
    count: Array


class Smallest(NamedTuple):
    """A metric that is the minimum over microbatches."""

    value: Array


class Largest(NamedTuple):
    """A metric that is the maximum over microbatches."""

    value: Array


class Total(NamedTuple):
    """A metric that adds up over microbatches."""

    value: Array


Metric = Mean | Smallest | Largest | Total


def score_tokens(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    banned: Array | None = None,
    scored: Array | None = None,
    chunk: int = 1024,
) -> TokenScores:
    """Log-probability, entropy and top-1 hit of each token under softmax(hidden @ head.T / temperature).

    The vocabulary is visited `chunk` tokens at a time (about 1024 a chip: smaller pays again and again for the
    gradient of the head), forward and backward, so `[B, T, V]` never exists. Softmax in at least fp32.

    Args:
        hidden: [B, T, D] after the final norm, in the compute dtype.
        head: [V, D], in the compute dtype; under a mesh already constrained to the vocabulary sharding.
        tokens: int32 [B, T]; tokens[t] is scored from hidden[t - 1], tokens[0] never.
        temperature: scalar or [B, T] aligned with the token it drew; 0 (greedy) reads as 1, as in the sampler.
        banned: bool [V], rows outside the support (special tokens of the vision input, unused rows).
        scored: bool [B, T], tokens whose score is wanted; chunks without any are skipped. None: all.
        chunk: tokens per pass over the vocabulary, counted over the whole batch.
    """
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    temperature = jnp.broadcast_to(jnp.asarray(temperature, wide), tokens.shape)
    inverse = 1.0 / jnp.where(temperature == 0, 1.0, temperature)
    if banned is None:
        banned = jnp.zeros(head.shape[0], bool)
    if scored is None:
        scored = jnp.ones(tokens.shape, bool)
    last = jnp.arange(tokens.shape[1]) == tokens.shape[1] - 1
    ahead = lambda field: jnp.roll(field, -1, axis=1)  # the field of the token a position predicts
    scored = ahead(scored) & ~last
    fields = (hidden, ahead(tokens), ahead(inverse), scored)
    if _chunk_count(chunk, tokens.shape) == 1:
        outputs = _head_scores(chunk, head, banned, *fields)
    else:
        # Scored positions go to the front of their row (rows stay where they are sharded), so whole chunks are skipped.
        home, order = _front(scored)
        fields = (_rows(field, order) for field in fields)
        outputs = (_rows(field, home) for field in _head_scores(chunk, head, banned, *fields))
    log_probs, entropy, hit = (
        jnp.roll(jnp.where(scored, field, 0), 1, axis=1) for field in outputs
    )
    return TokenScores(log_probs, jax.lax.stop_gradient(entropy), hit > 0)


def token_log_probs(
    hidden: Array,
    head: Array,
    tokens: Array,
    *,
    temperature: Array | float = 1.0,
    banned_ids: Array | None = None,
    chunk: int = 1024,
) -> tuple[Array, Array]:
    """(log_probs [B, T], entropy [B, T]) of every token but the first of a row; see `score_tokens`."""
    banned = None if banned_ids is None else banned_rows(banned_ids, head.shape[0])
    scores = score_tokens(hidden, head, tokens, temperature=temperature, banned=banned, chunk=chunk)
    return scores.log_probs, scores.entropy


def banned_rows(banned_ids: Any, vocab_size: int) -> Array:
    """bool [V] from token ids; ids beyond the vocabulary are ignored."""
    return jnp.zeros(vocab_size, bool).at[jnp.asarray(banned_ids, jnp.int32)].set(True, mode="drop")


def _front(scored: Array) -> tuple[Array, Array]:
    """The permutation of each row that moves scored positions to the front: where each goes, what each place gets."""
    counted = scored.astype(jnp.int32)
    left = counted.cumsum(axis=1)
    home = jnp.where(scored, left - 1, left[:, -1:] + (1 - counted).cumsum(axis=1) - 1)
    rows, places = jnp.indices(scored.shape)
    order = jnp.zeros_like(places).at[rows, home].set(places, unique_indices=True)
    return home, order


def _rows(field: Array, order: Array) -> Array:
    """field [B, T, ...] with the positions of each row in the order given, [B, T]."""
    return jnp.take_along_axis(field, order.reshape(order.shape + (1,) * (field.ndim - 2)), axis=1)


def _logits(hidden: Array, head: Array, inverse: Array, banned: Array) -> Array:
    """[B, t, V] in at least fp32, scaled and banned."""
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=wide)
    return jnp.where(banned, BANNED_LOGIT, logits * inverse[..., None])


def _is_target(logits: Array, targets: Array) -> Array:
    # A comparison and not a gather: no collective when the vocabulary is sharded.
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, 2) == targets[..., None]


def _read(logits: Array, targets: Array) -> tuple[Array, Array, Array, Array]:
    """(log_probs, entropy, hit, log of the partition sum) of a chunk of logits [B, t, V]."""
    top = logits.max(-1)
    weights = jnp.exp(logits - top[..., None])
    total = weights.sum(-1)
    log_total = top + jnp.log(total)
    picked = jnp.where(_is_target(logits, targets), logits, 0).sum(-1)
    entropy = log_total - (weights * logits).sum(-1) / total
    return picked - log_total, entropy, (picked >= top).astype(entropy.dtype), log_total


def _split(field: Array, count: int) -> Array:
    """[B, T, ...] -> [count, B, ceil(T / count), ...]: time is cut, the (sharded) batch axis is not."""
    length = -(-field.shape[1] // count)
    padding = [(0, 0), (0, length * count - field.shape[1])] + [(0, 0)] * (field.ndim - 2)
    field = jnp.pad(field, padding).reshape(field.shape[0], count, length, *field.shape[2:])
    return jnp.moveaxis(field, 1, 0)


def _join(field: Array, length: int) -> Array:
    """Undoes `_split`."""
    field = jnp.moveaxis(field, 0, 1)
    return field.reshape(field.shape[0], -1, *field.shape[3:])[:, :length]


def _chunk_count(chunk: int, shape: tuple[int, ...]) -> int:
    return min(shape[1], -(-shape[0] * shape[1] // chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_scores(chunk, head, banned, hidden, targets, inverse, scored):
    return _head_forward(chunk, head, banned, hidden, targets, inverse, scored)[0]


def _head_forward(chunk, head, banned, hidden, targets, inverse, scored):
    """Residuals hold the log partition sums [B, T], and the logits only when one chunk is the whole batch."""
    inputs = (head, banned, hidden, targets, inverse, scored)
    count = _chunk_count(chunk, targets.shape)
    if count == 1:
        logits = _logits(hidden, head, inverse, banned)
        *outputs, log_total = _read(logits, targets)
        return tuple(outputs), (inputs, log_total, logits)

    def visit(_, part):
        hidden, targets, inverse, scored = part
        read = lambda: _read(_logits(hidden, head, inverse, banned), targets)
        nothing = lambda: (jnp.zeros(targets.shape, inverse.dtype),) * 4
        return None, jax.lax.cond(scored.any(), read, nothing)

    parts = tuple(_split(field, count) for field in (hidden, targets, inverse, scored))
    _, outputs = jax.lax.scan(visit, None, parts)
    *outputs, log_total = (_join(field, targets.shape[1]) for field in outputs)
    return tuple(outputs), (inputs, log_total, None)


def _head_backward(chunk, residuals, cotangents):
    """d log p_target = onehot - p; entropy and hit carry no gradient. The head's gradient adds up in fp32."""
    (head, banned, hidden, targets, inverse, scored), log_total, logits = residuals
    slope = jnp.where(scored, cotangents[0], 0) * inverse
    wide = slope.dtype

    def gradients(hidden, targets, slope, log_total, logits):
        probabilities = jnp.exp(logits - log_total[..., None])
        slopes = (_is_target(logits, targets) - probabilities) * slope[..., None]
        slopes = jnp.where(banned, 0, slopes).astype(hidden.dtype)
        to_hidden = jnp.einsum("btv,vd->btd", slopes, head, preferred_element_type=wide)
        to_head = jnp.einsum("btv,btd->vd", slopes, hidden, preferred_element_type=wide)
        return to_hidden.astype(hidden.dtype), to_head

    if logits is not None:
        to_hidden, to_head = gradients(hidden, targets, slope, log_total, logits)
        return to_head.astype(head.dtype), None, to_hidden, None, None, None

    def visit(total, part):
        hidden, targets, inverse, slope, log_total, scored = part

        def add(total):
            logits = _logits(hidden, head, inverse, banned)
            to_hidden, to_head = gradients(hidden, targets, slope, log_total, logits)
            return total + to_head, to_hidden

        return jax.lax.cond(scored.any(), add, lambda total: (total, jnp.zeros_like(hidden)), total)

    count = _chunk_count(chunk, targets.shape)
    fields = (hidden, targets, inverse, slope, log_total, scored)
    parts = tuple(_split(field, count) for field in fields)
    to_head, to_hidden = jax.lax.scan(visit, jnp.zeros(head.shape, wide), parts)
    to_hidden = _join(to_hidden, targets.shape[1])
    return to_head.astype(head.dtype), None, to_hidden, None, None, None


_head_scores.defvjp(_head_forward, _head_backward)


def sft(scores: TokenScores, batch: Batch) -> tuple[Array, dict[str, Metric]]:
    """Weighted cross-entropy: -sum(w log p). Metrics are means over the tokens with weight.

    batch: weights [B, T].
    """
    weights, counted = _weights(batch)
    loss = -jnp.sum(jnp.where(counted, weights * scores.log_probs, 0))
    return loss, {
        "entropy": _mean(scores.entropy, counted),
        "mean_token_accuracy": _mean(scores.hit, counted),
        "trained_tokens": Total(counted.sum()),
    }


def grpo(
    scores: TokenScores,
    batch: Batch,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    importance_cap: float = 0.0,
    kl_beta: float = 0.0,
) -> tuple[Array, dict[str, Metric]]:
    """Clipped policy gradient: -sum(w (c min(r A, clip(r, 1 - low, 1 + high) A) - beta KL)).

    r = pi / pi_old. pi_old is `old_log_probs` where the batch has it (the trainer's own, recomputed before the first
    update: mu > 1), else this pass without gradient (mu = 1, so r = 1). c = min(pi_old / pi_sampler, importance_cap),
    1 when the cap is 0. KL is the k3 estimate to `reference_log_probs` (Schulman); with beta = 0 it is not computed.
    Which denominator (Adjusted GRPO and the others) is in the weights: `advantages.token_weights`.

    batch: weights, advantages [B, T]; optional old_log_probs, sampler_log_probs, reference_log_probs [B, T]. Whatever
    they hold where the weight is 0, NaN included, counts for nothing.
    """
    weights, counted = _weights(batch)
    of_counted = lambda field: jnp.where(counted, field, 0)
    current = of_counted(scores.log_probs)
    old = of_counted(batch.get("old_log_probs", jax.lax.stop_gradient(current)))
    advantages = of_counted(batch["advantages"])
    ratio = _exp_clamped(current - old)
    clipped = jnp.clip(ratio, 1 - epsilon_low, 1 + epsilon_high)
    objective = jnp.minimum(ratio * advantages, clipped * advantages)
    metrics = _clip_metrics(ratio, advantages, counted, epsilon_low, epsilon_high)
    if "sampler_log_probs" in batch:
        mismatch = old - of_counted(batch["sampler_log_probs"])
        importance = jax.lax.stop_gradient(_exp_clamped(mismatch))
        if importance_cap:
            importance = jnp.minimum(importance, importance_cap)
            objective = objective * importance
        metrics |= _mismatch_metrics(mismatch, importance, counted)
    elif importance_cap:
        raise ValueError(
            f"grpo: importance_cap={importance_cap} needs sampler_log_probs in the batch; "
            "record them at sampling, or set importance_cap to 0"
        )
    metrics["policy_loss"] = Total(-jnp.sum(of_counted(weights * objective)))
    if kl_beta:
        ahead = of_counted(batch["reference_log_probs"]) - current
        divergence = _exp_clamped(ahead) - ahead - 1
        objective = objective - kl_beta * divergence
        metrics["kl"] = _mean(divergence, counted)
    metrics["entropy"] = _mean(scores.entropy, counted)
    metrics["trained_tokens"] = Total(counted.sum())
    return -jnp.sum(of_counted(weights * objective)), metrics


def ppm(values: Array, batch: Batch, *, tanh: bool = False) -> tuple[Array, dict[str, Metric]]:
    """Pairwise Bradley-Terry over Q-value pairs: -sum(w log sigmoid(v_chosen - v_rejected)) (rStar-Math, eq. 4).

    values: float32 [S] raw scores of the batch's ends. batch: pairs int32 [N, 2] of (chosen, rejected) places in
    [0, S); pair_weights float32 [N] (`advantages.pair_weights`: 1 / (n_pos n_neg) over problems; 0 = padding).
    tanh: squash scores before they are compared, as the paper draws it; its released code does not.
    """
    values = jnp.tanh(values) if tanh else values
    chosen, rejected = values[batch["pairs"][:, 0]], values[batch["pairs"][:, 1]]
    weights = batch["pair_weights"]
    counted = weights != 0
    margin = chosen - rejected
    loss = -jnp.sum(jnp.where(counted, weights * jax.nn.log_sigmoid(margin), 0))
    return loss, {
        "accuracy": _mean(margin > 0, counted),
        "margin": _mean(margin, counted),
        "mean_reward": _mean((chosen + rejected) / 2, counted),
    }


def pqm(values: Array, batch: Batch, *, tanh: bool = True) -> tuple[Array, dict[str, Metric]]:
    """Squared error to Q-values: sum(w (v - q)^2), v squashed to [-1, 1] unless `tanh` is off.

    values: float32 [S]. batch: targets float32 [S] in [-1, 1]; end_weights float32 [S] (0 = padding).
    """
    values = jnp.tanh(values) if tanh else values
    weights, targets = batch["end_weights"], batch["targets"]
    counted = weights != 0
    error = jnp.where(counted, values - targets, 0)
    return jnp.sum(weights * error**2), {
        "mean_absolute_error": _mean(jnp.abs(error), counted),
        "mean_reward": _mean(values, counted),
    }


def orm(values: Array, batch: Batch) -> tuple[Array, dict[str, Metric]]:
    """Outcome reward model: binary cross-entropy, sum(w BCE(sigmoid(v), right)).

    values: float32 [S] logits. batch: targets float32 [S], 1 right and 0 wrong; end_weights float32 [S] (0 = padding).
    """
    weights, right = batch["end_weights"], batch["targets"] > 0.5
    counted = weights != 0
    signed = jnp.where(right, values, -values)
    loss = -jnp.sum(jnp.where(counted, weights * jax.nn.log_sigmoid(signed), 0))
    return loss, {
        "accuracy": _mean(signed > 0, counted),
        "mean_reward": _mean(values, counted),
    }


TOKEN_LOSSES = {"sft": sft, "grpo": grpo}  # of (TokenScores, batch)
VALUE_LOSSES = {"ppm": ppm, "pqm": pqm, "orm": orm}  # of (values of the batch's ends, batch)


def empty_metrics(shapes: dict[str, Metric]) -> dict[str, Metric]:
    """The metrics of a microbatch that was skipped: they change no sum, minimum or maximum."""
    neutral = {Smallest: jnp.inf, Largest: -jnp.inf}
    fill = lambda metric: jax.tree.map(
        lambda x: jnp.full(x.shape, neutral.get(type(metric), 0), x.dtype), metric
    )
    return {name: fill(metric) for name, metric in shapes.items()}


def reduce_metric(metric: Metric) -> Array:
    """One number from a metric whose fields are stacked over microbatches."""
    if isinstance(metric, Mean):
        return metric.total.sum() / jnp.maximum(metric.count.sum(), 1)
    if isinstance(metric, Total):
        return metric.value.sum()
    value = metric.value.min() if isinstance(metric, Smallest) else metric.value.max()
    return jnp.where(jnp.isfinite(value), value, 0)  # no microbatch had a counted token


def _weights(batch: Batch) -> tuple[Array, Array]:
    return batch["weights"], batch["weights"] != 0


def _mean(field: Array, counted: Array) -> Mean:
    return Mean(jnp.sum(jnp.where(counted, field, 0)), counted.sum())


def _exp_clamped(log_ratio: Array) -> Array:
    return jnp.exp(jnp.clip(log_ratio, -RATIO_LIMIT, RATIO_LIMIT))


def _clip_metrics(
    ratio: Array, advantages: Array, counted: Array, low: float, high: float
) -> dict[str, Metric]:
    """Shares of counted tokens whose gradient the clip removed, as TRL names them; tokens with A = 0 never are."""
    is_low = (ratio < 1 - low) & (advantages < 0)
    is_high = (ratio > 1 + high) & (advantages > 0)
    low_mean, high_mean = _mean(is_low, counted), _mean(is_high, counted)
    share = lambda mean: mean.total / jnp.maximum(mean.count, 1)
    return {
        "clip_ratio/low_mean": low_mean,
        "clip_ratio/low_min": Smallest(share(low_mean)),
        "clip_ratio/high_mean": high_mean,
        "clip_ratio/high_max": Largest(share(high_mean)),
        "clip_ratio/region_mean": _mean(is_low | is_high, counted),
    }


def _mismatch_metrics(mismatch: Array, importance: Array, counted: Array) -> dict[str, Metric]:
    """How far the sampler's probabilities are from the trainer's, as TRL names it."""
    size = jax.lax.stop_gradient(jnp.abs(mismatch))
    return {
        "sampling/sampling_logp_difference/mean": _mean(size, counted),
        "sampling/sampling_logp_difference/max": Largest(jnp.where(counted, size, 0).max()),
        "sampling/importance_sampling_ratio/min": Smallest(
            jnp.where(counted, importance, jnp.inf).min()
        ),
        "sampling/importance_sampling_ratio/mean": _mean(importance, counted),
        "sampling/importance_sampling_ratio/max": Largest(
            jnp.where(counted, importance, -jnp.inf).max()
        ),
    }
