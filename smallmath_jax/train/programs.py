"""Train steps as abstract programs: shapes and shardings only, for `parallel.compile`. No array is made."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import abstract_model
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.parallel import rules
from smallmath_jax.parallel.compile import Program, abstract
from smallmath_jax.train import step as steps
from smallmath_jax.train.optim import make_optimizer

GRPO_FIELDS = ("advantages", "sampler_log_probs")
VALUE_LOSSES = ("ppm", "pqm", "orm")


def abstract_batch(
    config: ModelConfig,
    mesh: Mesh,
    *,
    microbatches: int,
    rows: int,
    row_length: int,
    row_patches: int,
    fields: tuple[str, ...] = (),
) -> dict[str, Any]:
    """A batch [A, B, ...] of data.batches.collate, rows cut over the mesh; vision when row_patches > 0."""
    sharding = rules.batch_sharding(mesh, leading=1)
    lead = (microbatches, rows)
    make = lambda dtype, *shape: jax.ShapeDtypeStruct((*lead, *shape), dtype, sharding=sharding)
    batch: dict[str, Any] = {
        "tokens": make(np.int32, row_length),
        "positions": make(np.int32, 3, row_length),
        "segment_ids": make(np.int32, row_length),
        "weights": make(np.float32, row_length),
    }
    batch |= {name: make(np.float32, row_length) for name in fields}
    vision = config.vision
    if vision is not None and row_patches:
        batch["vision"] = {
            "pixels": make(np.float32, row_patches, vision.patch_values),
            "rotary": make(np.int32, row_patches, 2),
            "frame_segments": make(np.int32, row_patches),
            "window_segments": make(np.int32, row_patches),
            "restore": make(np.int32, row_patches // vision.merge**2),
            "token_index": make(np.int32, row_length),
        }
    return batch


def abstract_ends(mesh: Mesh, *, microbatches: int, ends: int, pairs: int) -> dict[str, Any]:
    """What a value loss reads beside rows, on every chip: each microbatch's ends [A, S, ...] and pairs [A, P, 2]."""
    sharding = rules.replicated(mesh)
    make = lambda dtype, *shape: jax.ShapeDtypeStruct(
        (microbatches, *shape), dtype, sharding=sharding
    )
    return {
        "ends": make(np.int32, ends, 2),
        "dropout_keys": make(np.uint32, ends, 2),
        "targets": make(np.float32, ends),
        "end_weights": make(np.float32, ends),
        "pairs": make(np.int32, pairs, 2),
        "pair_weights": make(np.float32, pairs),
    }


def abstract_state(
    config: ModelConfig,
    mesh: Mesh,
    optimizer: Any,
    trainable: str | None = None,
    value_head: bool = False,
) -> Any:
    """The TrainState of fp32 master weights and optimizer moments, with shardings."""
    model = abstract_model(config)
    if value_head:
        model = jax.eval_shape(add_value_head, model, jax.random.key(0))
    state = jax.eval_shape(lambda model: steps.init_state(model, optimizer, trainable), model)
    return abstract(state, rules.shardings(state, mesh))


def train_step_program(
    config: ModelConfig,
    mesh: Mesh,
    *,
    loss: str,
    optimizer_settings: Any,
    compute: steps.Compute,
    microbatches: int,
    rows: int,
    row_length: int,
    row_patches: int = 0,
    trainable: str | None = None,
    loss_settings: dict[str, Any] | None = None,
    value_dropout: float = 0.0,
    ends: int = 0,
    pairs: int = 0,
    resident: dict[str, float] | None = None,
) -> Program:
    """The real train step on `microbatches` x `rows` packed rows, state donated.

    `rows` is of one microbatch, over all chips; `ends` and `pairs` are what a value loss reads of one. Raises
    ValueError as make_train_step does.
    """
    optimizer, schedule = make_optimizer(optimizer_settings, total_steps=1000)
    judges = loss in VALUE_LOSSES
    state = abstract_state(config, mesh, optimizer, trainable, value_head=judges)
    fields = GRPO_FIELDS if loss == "grpo" else ()
    batch = abstract_batch(
        config,
        mesh,
        microbatches=microbatches,
        rows=rows,
        row_length=row_length,
        row_patches=row_patches,
        fields=fields,
    )
    if judges:
        batch |= abstract_ends(mesh, microbatches=microbatches, ends=ends, pairs=pairs)
    step = steps.make_train_step(
        loss,
        optimizer,
        compute=compute,
        trainable=trainable,
        loss_settings=loss_settings,
        value_dropout=value_dropout,
        schedule=schedule,
        state_shardings=jax.tree.map(lambda leaf: leaf.sharding, state),
    )
    return Program(
        f"{loss} step, {microbatches} x {rows} rows of {row_length}",
        mesh,
        step,
        (state, batch),
        resident=resident or {},
    )
