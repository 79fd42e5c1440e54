"""Sequences in, updates out: packing into fixed shapes, the compiled step, checkpoints. Shared by SFT and GRPO."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from smallmath_jax.data.batches import Sequence, collate, pack
from smallmath_jax.models.config import ModelConfig
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.parallel import hosts, rules
from smallmath_jax.parallel.mesh import batch_shards
from smallmath_jax.parallel.splash import attention_for
from smallmath_jax.tasks.policy import Policy, compute_dtype, trainable
from smallmath_jax.train import step as steps
from smallmath_jax.train.optim import make_optimizer


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fixed shapes of a stage: every batch is [microbatches, rows, row_length], the last rows padding."""

    row_length: int
    row_patches: int  # vision patches of a row; 0: text only
    rows: int  # of a microbatch
    microbatches: int


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The compiled functions of a stage and what they need. `init_fn` uses up the model it is given."""

    policy: Policy  # its model is abstract: the weights themselves are in the state, once
    mesh: jax.sharding.Mesh
    layout: Layout
    step_fn: Callable[[Any, Any], tuple[Any, dict[str, jax.Array]]]
    log_prob_fn: Callable[[QwenVL, Any], jax.Array]
    init_fn: Callable[[QwenVL], Any]
    state_shardings: Any

    def step(self, state: Any, sequences: list[Sequence]) -> tuple[Any, dict[str, jax.Array]]:
        """One optimiser update on weighted sequences. Metrics stay on the device until someone reads them."""
        rows = self.rows_of(sequences)
        return self.step_rows(state, rows)

    def step_rows(self, state: Any, rows: list[list[Sequence]]) -> tuple[Any, dict[str, jax.Array]]:
        layout = self.layout
        capacity = layout.rows * layout.microbatches
        if len(rows) > capacity:
            raise ValueError(
                f"{len(rows)} rows, and a batch holds {capacity}: the layout is too small"
            )
        batch = self._collate(rows, layout.microbatches)
        return self.step_fn(state, hosts.global_batch(batch, self.mesh, leading=1))

    def rows_of(self, sequences: list[Sequence]) -> list[list[Sequence]]:
        """First-fit packing of the sequences into rows."""
        return [[sequences[i] for i in row] for row in self._pack(sequences)]

    def with_log_probs(
        self, sequences: list[Sequence], model: QwenVL, field: str
    ) -> list[Sequence]:
        """The sequences with `model`'s log-probs of their tokens as a new field (law 2: pi_old, pi_ref)."""
        layout = self.layout
        found: list[np.ndarray | None] = [None] * len(sequences)
        plan = self._pack(sequences)
        for first in range(0, len(plan), layout.rows):
            part = plan[first : first + layout.rows]
            batch = self._collate([[sequences[i] for i in row] for row in part], 1)
            batch = jax.tree.map(lambda x: x[0], batch)
            log_probs = np.asarray(self.log_prob_fn(model, hosts.global_batch(batch, self.mesh)))
            for row, members in enumerate(part):
                start = 0
                for index in members:
                    length = len(sequences[index].token_ids)
                    found[index] = log_probs[row, start : start + length]
                    start += length
        return [
            dataclasses.replace(sequence, fields={**sequence.fields, field: values})
            for sequence, values in zip(sequences, found, strict=True)
        ]

    def _pack(self, sequences: list[Sequence]) -> list[list[int]]:
        lengths = [len(sequence.token_ids) for sequence in sequences]
        patches = [0 if sequence.pixels is None else len(sequence.pixels) for sequence in sequences]
        return pack(lengths, patches, self.layout.row_length, self.layout.row_patches)

    def _collate(self, rows: list[list[Sequence]], microbatches: int) -> dict[str, Any]:
        """This host's part of [microbatches, rows, ...] arrays; missing rows are padding."""
        layout = self.layout
        rows = rows + [[]] * (layout.rows * microbatches - len(rows))
        mine = hosts.local_rows(self.mesh, layout.rows)
        local = [rows[m * layout.rows + r] for m in range(microbatches) for r in mine]
        batch = collate(
            local,
            layout.row_length,
            layout.row_patches,
            self.policy.images,
            self.policy.tokens.image_id,
            self.policy.tokens.video_id,
        )
        return jax.tree.map(lambda x: x.reshape(microbatches, len(mine), *x.shape[1:]), batch)


def make_trainer(
    policy: Policy,
    config: Any,
    settings: Any,
    mesh: jax.sharding.Mesh,
    *,
    loss: str,
    total_updates: int,
    microbatches: int,
    loss_settings: dict[str, Any] | None = None,
    value_dropout: float = 0.0,
) -> Trainer:
    """Compiles nothing yet: programs are built at their first call. `value_dropout` is that of value losses."""
    policy = dataclasses.replace(policy, model=jax.eval_shape(lambda model: model, policy.model))
    optimizer, schedule = make_optimizer(settings.optimizer, total_updates)
    compute = make_compute(
        policy.config, config, mesh, policy.tokens.banned_ids if loss == "grpo" else ()
    )
    names = trainable(config)
    make_state = lambda model: steps.init_state(model, optimizer, names)
    state_shardings = rules.shardings(jax.eval_shape(make_state, policy.model), mesh)
    step_fn = steps.make_train_step(
        loss,
        optimizer,
        compute=compute,
        trainable=names,
        loss_settings=loss_settings,
        value_dropout=value_dropout,
        schedule=schedule,
        state_shardings=state_shardings,
    )
    score = lambda model, batch: steps.score_batch(model, batch, compute).log_probs
    layout = Layout(
        settings.row_length,
        settings.row_patches if policy.config.vision is not None else 0,
        settings.microbatch_rows,
        microbatches,
    )
    return Trainer(
        policy,
        mesh,
        layout,
        step_fn,
        jax.jit(score, out_shardings=rules.replicated(mesh)),
        jax.jit(make_state, out_shardings=state_shardings, donate_argnums=0),
        state_shardings,
    )


def fit_rows(settings: Any, mesh: jax.sharding.Mesh) -> Any:
    """A copy of a stage's settings whose microbatch_rows are a multiple of the shards that rows are cut into.

    The gradient does not depend on it (law 1), so one config serves machines of every size.
    """
    fitted, shards = copy.deepcopy(settings), batch_shards(mesh)
    fitted.microbatch_rows = -(-settings.microbatch_rows // shards) * shards
    return fitted


def make_compute(
    model_config: ModelConfig, config: Any, mesh: jax.sharding.Mesh, banned_ids: Any = ()
) -> steps.Compute:
    """How forward passes run on this mesh."""
    one = mesh.size == 1
    return steps.Compute(
        dtype=compute_dtype(config),
        remat=config.remat,
        attention=attention_for(mesh),
        banned_ids=tuple(int(token) for token in banned_ids),
        constrain=(lambda x: x) if one else rules.constrain(mesh),
        constrain_head=(lambda head: head) if one else rules.constrain_head(mesh),
    )


def microbatches_for(sequences: int, longest: int, most_patches: int, settings: Any) -> int:
    """Microbatches that hold `sequences` of at most `longest` tokens and `most_patches`, however badly they pack.

    First fit opens a row only when all others hold as many of the biggest as a row takes. Raises ValueError when one
    sequence does not fit a row.
    """
    if longest > settings.row_length:
        raise ValueError(
            f"row_length {settings.row_length} is shorter than one sequence of prompt and completion ({longest}); "
            "raise row_length or lower prompt.max_tokens or sampling.max_tokens"
        )
    if most_patches > settings.row_patches:
        raise ValueError(
            f"row_patches {settings.row_patches} are fewer than the picture patches of one sequence ({most_patches}); "
            "raise row_patches or lower vision.max_patches"
        )
    a_row = settings.row_length // longest
    if most_patches:
        a_row = min(a_row, settings.row_patches // most_patches)
    return math.ceil(math.ceil(sequences / a_row) / settings.microbatch_rows)
