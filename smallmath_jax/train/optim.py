"""AdamW, learning-rate schedules, clipping by global norm."""

import re
from typing import Any

import optax

SCHEDULES = ("constant", "linear", "cosine")
# Norm weights and biases do not decay (as in Hugging Face's Trainer); everything else does, embeddings included.
NO_DECAY = r"(^|/)(bias|norm|input_norm|post_norm|norm1|norm2|ln_q)$"


def make_schedule(settings: Any, total_steps: int) -> optax.Schedule:
    """Learning rate by optimiser update: `warmup_steps` up from 0, then constant, or down to `final_fraction` of it.

    The first update after no warm-up has the full rate; with warm-up of W update k < W has rate * (k + 1) / W.

    Args:
        settings: learning_rate, schedule (constant | linear | cosine), warmup_steps, final_fraction.
        total_steps: updates of the whole run, warm-up included; the decay ends with the last one.
    """
    if settings.schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule {settings.schedule!r} is unknown; known: {', '.join(SCHEDULES)}"
        )
    peak, warmup = settings.learning_rate, settings.warmup_steps
    decay = max(total_steps - warmup, 1)
    floor = settings.final_fraction
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, peak * floor, decay),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay, alpha=floor),
    }[settings.schedule]()
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    settings: Any, total_steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clip by global norm, then AdamW (decoupled decay, scaled by the learning rate), and its schedule.

    Works on a dict of arrays by parameter name, the form in which `step.TrainState` keeps optimizer state. With
    `name` = muon the kernels, layer by layer, take orthogonalised momentum (K. Jordan et al. 2024; optax.contrib) at
    `muon_learning_rate` times the schedule's fraction, and everything else AdamW: it learns from random weights in
    half the steps. Weight decay is then the kernels' alone.

    Args:
        settings: fields of `make_schedule`, b1, b2, eps, weight_decay, clip_norm (0: no clipping), name (adamw | muon).
        total_steps: updates of the whole run.
    """
    if settings.name not in OPTIMIZERS:
        raise ValueError(
            f"optimizer.name {settings.name!r} is unknown; known: {', '.join(OPTIMIZERS)}"
        )
    schedule = make_schedule(settings, total_steps)
    transform = OPTIMIZERS[settings.name](settings, schedule)
    if not settings.clip_norm:
        return transform, schedule
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), transform), schedule


def _adamw(settings: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=decays if settings.weight_decay else None,
    )


def _muon(settings: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    ratio = settings.muon_learning_rate / settings.learning_rate
    return optax.contrib.muon(
        lambda step: ratio * schedule(step),
        weight_decay=settings.weight_decay,
        adam_learning_rate=schedule,
        eps=settings.eps,
        adam_b1=settings.b1,
        adam_b2=settings.b2,
        muon_weight_dimension_numbers=kernel_dimensions,
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


def kernel_dimensions(parameters: dict[str, Any]) -> dict[str, Any]:
    """Which axes of each parameter are a matrix for muon: a kernel's last two, its layer axis apart; None elsewhere."""
    matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return {
        name: matrix if name.endswith("/kernel") and not name.startswith("value_head") else None
        for name in parameters
    }


def decays(parameters: dict[str, Any]) -> dict[str, bool]:
    """Which parameters weight decay applies to, by name."""
    return {name: re.search(NO_DECAY, name) is None for name in parameters}
