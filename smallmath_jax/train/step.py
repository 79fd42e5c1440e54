"""One train step for every loss: forward, chunked head, loss, accumulated gradient, optimiser, metrics.

A batch is a dict of arrays with a leading microbatch axis, [A, B, T]. Losses are weighted sums, so accumulating is
adding, and one microbatch of 32 rows or four of 8 give the same gradient (law 1).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from smallmath_jax.models.attention import AttentionFn, einsum_attention
from smallmath_jax.models.qwen_vl import QwenVL, forward, head_matrix
from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.models.value_head import values
from smallmath_jax.train import losses

Array = jax.Array
Batch = dict[str, Any]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["step", "model", "opt_state"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything an update changes. `opt_state` is over {name: array} of the trainable parameters only."""

    step: Array  # int32 [], optimiser updates done
    model: QwenVL
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the forward pass runs. The same record for training and for recomputing log-probs (law 2)."""

    dtype: Any = jnp.float32  # master weights stay fp32
    remat: str = "none"
    attention: AttentionFn = einsum_attention
    banned_ids: tuple[int, ...] = ()
    head_chunk: int = 0  # tokens of the whole microbatch per pass over the vocabulary; 0: by device
    constrain: Callable[[Array], Array] = lambda x: x  # sharding of [B, T, D]
    constrain_head: Callable[[Array], Array] = lambda head: head  # sharding of [V, D]


def split_trainable(model: QwenVL, trainable: str | None) -> dict[str, Array]:
    """{name: array} of the parameters whose whole name matches the regex `trainable` (None: all).

    Raises ValueError when none matches.
    """
    leaves = named_leaves(model)
    chosen = {name: x for name, x in leaves if not trainable or re.fullmatch(trainable, name)}
    if not chosen:
        some = ", ".join(name for name, _ in leaves[:4])
        raise ValueError(
            f"trainable={trainable!r} matches the whole name of no parameter; names look like {some}"
        )
    return chosen


def join_trainable(model: QwenVL, parameters: Mapping[str, Array]) -> QwenVL:
    """The model with the named parameters replaced."""
    return map_named(lambda name, leaf: parameters.get(name, leaf), model)


def init_state(
    model: QwenVL, optimizer: optax.GradientTransformation, trainable: str | None = None
) -> TrainState:
    """A state at step 0. Under jax.jit with out_shardings the moments are born sharded; with abstract leaves use
    jax.eval_shape."""
    opt_state = optimizer.init(split_trainable(model, trainable))
    return TrainState(jnp.zeros((), jnp.int32), model, opt_state)


def make_train_step(
    loss: str,
    optimizer: optax.GradientTransformation,
    *,
    compute: Compute = Compute(),  # noqa: B008 (frozen)
    trainable: str | None = None,
    loss_settings: Mapping[str, Any] | None = None,
    value_dropout: float = 0.0,
    schedule: optax.Schedule | None = None,
    state_shardings: TrainState | None = None,
    donate: bool = True,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A jitted f(state, batch) -> (state, metrics).

    Args:
        loss: sft | grpo (tokens), ppm | pqm | orm (values at the batch's ends).
        optimizer: of `optim.make_optimizer`, clipping included.
        trainable: regex of whole parameter names. The others get neither gradient nor optimizer state: "vision/.*"
            frozen is r"(?!vision/).*", LoRA only is r".*/lora_[ab]".
        loss_settings: keyword arguments of the loss (epsilon_low, kl_beta, ...); see `losses`.
        value_dropout: of the value head's input; masks are keyed by the batch's `dropout_keys`.
        schedule: logged as `learning_rate`.
        state_shardings: of the result; arguments keep the sharding they come with.
        donate: the old state's buffers are reused; it must not be read afterwards.

    The batch has a leading microbatch axis on every array: the fields of data.batches, [A, B, T]; for value losses
    also `ends` int32 [A, S, 2] (row, place), `dropout_keys` uint32 [A, S, 2], and what the loss names. Temperature
    and advantages are per token. Metrics are float32 scalars on device, over all microbatches: `loss`, `grad_norm`
    (before clipping), `param_norm`, `learning_rate`, and those of the loss.

    Raises:
        ValueError: the loss is unknown.
    """
    objective = make_objective(loss, compute, loss_settings, value_dropout)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        parameters = split_trainable(state.model, trainable)
        gradient, metrics = accumulate(objective, parameters, state.model, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, parameters)
        parameters = optax.apply_updates(parameters, updates)
        metrics["grad_norm"] = optax.tree.norm(gradient)
        metrics["param_norm"] = optax.tree.norm(parameters)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        model = join_trainable(state.model, parameters)
        return TrainState(state.step + 1, model, opt_state), metrics

    out = None if state_shardings is None else (state_shardings, None)
    return jax.jit(step, donate_argnums=(0,) if donate else (), out_shardings=out)


def make_objective(
    loss: str,
    compute: Compute,
    loss_settings: Mapping[str, Any] | None = None,
    value_dropout: float = 0.0,
) -> Callable[[Mapping[str, Array], QwenVL, Batch], tuple[Array, dict[str, losses.Metric]]]:
    """f(parameters, model, microbatch) -> (loss, metrics), of one microbatch without the leading axis."""
    settings = dict(loss_settings or {})
    known = (*losses.TOKEN_LOSSES, *losses.VALUE_LOSSES)
    if loss not in known:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(known)}")

    def of_tokens(parameters: Mapping[str, Array], model: QwenVL, batch: Batch):
        scores = score_batch(join_trainable(model, parameters), batch, compute)
        return losses.TOKEN_LOSSES[loss](scores, batch, **settings)

    def of_values(parameters: Mapping[str, Array], model: QwenVL, batch: Batch):
        found = end_values(join_trainable(model, parameters), batch, compute, value_dropout)
        return losses.VALUE_LOSSES[loss](found, batch, **settings)

    return of_tokens if loss in losses.TOKEN_LOSSES else of_values


def accumulate(
    objective: Callable[..., tuple[Array, dict[str, losses.Metric]]],
    parameters: Mapping[str, Array],
    model: QwenVL,
    batch: Batch,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """The gradient by name and the metrics of a batch [A, B, ...], summed over its A microbatches.

    A microbatch without any weight is skipped on the device: a rollout batch packs into a varying number of rows, and
    fixed shapes with skipped padding never recompile.
    """
    gradient_of = jax.value_and_grad(objective, has_aux=True)

    def add(total: dict[str, Array], microbatch: Batch):
        (loss, metrics), gradient = gradient_of(parameters, model, microbatch)
        metrics["loss"] = losses.Total(loss)
        return jax.tree.map(jnp.add, total, gradient), metrics

    def visit(total: dict[str, Array], microbatch: Batch):
        if "weights" not in microbatch:
            return add(total, microbatch)
        shapes = jax.eval_shape(add, total, microbatch)[1]
        skip = lambda total, _: (total, losses.empty_metrics(shapes))
        return jax.lax.cond((microbatch["weights"] != 0).any(), add, skip, total, microbatch)

    if jax.tree.leaves(batch)[0].shape[0] == 1:  # no loop, no second copy of the gradient
        nothing = dict.fromkeys(parameters, 0.0)
        gradient, metrics = add(nothing, jax.tree.map(lambda field: field[0], batch))
    else:
        gradient, metrics = jax.lax.scan(visit, jax.tree.map(jnp.zeros_like, parameters), batch)
    return gradient, {name: losses.reduce_metric(metric) for name, metric in metrics.items()}


def score_batch(model: QwenVL, batch: Batch, compute: Compute) -> losses.TokenScores:
    """TokenScores of the tokens that have weight, through the chunked head."""
    hidden = _hidden(model, batch, compute)
    head = compute.constrain_head(head_matrix(model).astype(compute.dtype))
    banned = losses.banned_rows(compute.banned_ids, head.shape[0]) if compute.banned_ids else None
    return losses.score_tokens(
        hidden,
        head,
        batch["tokens"],
        temperature=batch.get("temperature", 1.0),
        banned=banned,
        scored=batch["weights"] != 0,
        chunk=compute.head_chunk or default_head_chunk(head.shape[0], batch["tokens"].shape[0]),
    )


def default_head_chunk(vocab_size: int, rows: int) -> int:
    """Tokens per pass over the vocabulary: what stays in a CPU's cache, else 1024 a chip (rows of a microbatch
    are cut over chips, so at least 1024 and a row's 256)."""
    if jax.default_backend() == "cpu":
        return max(2**21 // vocab_size, 1)
    return max(1024 * jax.device_count(), 256 * rows)


def end_values(model: QwenVL, batch: Batch, compute: Compute, dropout: float = 0.0) -> Array:
    """Raw value-head scores float32 [S] at the batch's `ends` [S, 2] (row, place), last token of what is judged."""
    hidden = _hidden(model, batch, compute)[batch["ends"][:, 0], batch["ends"][:, 1]]
    if not dropout:
        return values(model, hidden)
    # Masks are keyed by what is judged, not by its place: packing and microbatches change none (law 1).
    value = lambda hidden, key: values(model, hidden, dropout=dropout, key=key)
    return jax.vmap(value)(hidden, batch["dropout_keys"])


def _hidden(model: QwenVL, batch: Batch, compute: Compute) -> Array:
    return forward(
        model,
        batch["tokens"],
        batch["positions"],
        batch["segment_ids"],
        batch.get("vision"),
        compute_dtype=compute.dtype,
        remat=compute.remat,
        attention=compute.attention,
        constrain=compute.constrain,
    )
