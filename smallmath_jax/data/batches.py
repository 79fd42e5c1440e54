"""Batches: token weights, packing, fixed-shape collation, and row plans that resume from a step number alone.

The loss is a weighted sum (law 1): weights are computed here, once, for the whole step over all hosts. A sequence is
never cut: one that does not fit a row raises or is dropped and counted.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from smallmath_jax.records import Prompt, draw_key

# Values of a field where nothing is scored. A temperature divides, so it must not be 0.
NEUTRAL = {"temperature": 1.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Sequence:
    """One prompt with its completion, unpadded. `fields` are per-token float32 [T], aligned with the scored token."""

    token_ids: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [3, T]
    weights: np.ndarray  # float32 [T]; 0 on the prompt
    fields: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    pixels: np.ndarray | None = None  # float32 [P, C] of its images, processor order
    grids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 3), np.int32))

    @property
    def patches(self) -> int:
        """Image patches, known from the grids even where pixels are not loaded."""
        return int(self.grids.prod(-1).sum())


def make_sequence(
    prompt: Prompt,
    completion_ids: np.ndarray,
    weights: np.ndarray | float | None = None,
    **fields: np.ndarray | float,
) -> Sequence:
    """A sequence from a prompt and completion ids int [N], end token included.

    `weights` and every field are one number or an array [N] over the completion; weights default to 1. The prompt gets
    weight 0. Raises ValueError for an empty completion or an array of another length.
    """
    completion = np.asarray(completion_ids, np.int32)
    count, start = len(completion), len(prompt.token_ids)
    if not count:
        raise ValueError(
            f"problem {prompt.problem_id!r}: an empty completion has nothing to learn from; leave it out"
        )
    following = np.arange(prompt.next_position, prompt.next_position + count, dtype=np.int32)
    spread = lambda name, value: _over_completion(name, value, start, count, prompt.problem_id)
    return Sequence(
        token_ids=np.concatenate([prompt.token_ids, completion]).astype(np.int32),
        positions=np.concatenate([prompt.positions, np.tile(following, (3, 1))], axis=1),
        weights=spread("weights", 1.0 if weights is None else weights),
        fields={name: spread(name, value) for name, value in fields.items()},
        pixels=prompt.pixels,
        grids=prompt.grids,
    )


def _over_completion(
    name: str, value: np.ndarray | float, start: int, count: int, problem_id: str
) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if value.ndim and value.shape != (count,):
        raise ValueError(
            f"problem {problem_id!r}: {name} has shape {value.shape}, the completion has {count} tokens"
        )
    row = np.full(start + count, NEUTRAL.get(name, 0.0), np.float32)
    row[start:] = value
    return row


def pack(
    lengths: np.ndarray | list[int],
    patches: np.ndarray | list[int] | None,
    row_length: int,
    row_patches: int,
) -> list[list[int]]:
    """First-fit decreasing: indices of the sequences of each row, within row_length tokens and row_patches patches.

    Raises ValueError naming the first sequence that fits no row.
    """
    lengths = np.asarray(lengths, np.int64)
    patches = np.zeros_like(lengths) if patches is None else np.asarray(patches, np.int64)
    too_big = np.flatnonzero((lengths > row_length) | (patches > row_patches))
    if len(too_big):
        first = int(too_big[0])
        raise ValueError(
            f"sequence {first} has {lengths[first]} tokens and {patches[first]} patches; a row holds {row_length} and "
            f"{row_patches}. Raise row_length or row_patches, or drop such sequences (over='drop')"
        )
    # What is left in each row; rows are opened in order, so argmax finds the first that fits.
    left, left_patches = np.empty_like(lengths), np.empty_like(lengths)
    rows: list[list[int]] = []
    for index in np.lexsort((-patches, -lengths)).tolist():
        opened = len(rows)
        fits = left[:opened] >= lengths[index]
        if patches[index]:
            fits &= left_patches[:opened] >= patches[index]
        row = int(fits.argmax()) if opened else 0
        if not opened or not fits[row]:
            row = opened
            rows.append([])
            left[row], left_patches[row] = row_length, row_patches
        rows[row].append(index)
        left[row] -= lengths[index]
        left_patches[row] -= patches[index]
    return rows


def collate(
    rows: list[list[Sequence]],
    row_length: int,
    row_patches: int,
    image_settings: Any,
    image_id: int,
    video_id: int,
) -> dict[str, Any]:
    """Packed rows as one batch of fixed shapes; a row may be empty.

    tokens int32 [B, T]; positions int32 [B, 3, T]; segment_ids int32 [B, T], 0 = padding, 1.. per sequence; weights
    float32 [B, T], 0 on each segment's first token (nothing predicts it); every field of a sequence float32 [B, T].
    With row_patches > 0 also `vision`: the arrays of images.vision_row stacked [B, ...] and token_index int32 [B, T].
    Raises ValueError when a row is over its length or patches, or holds images where row_patches is 0.
    """
    count = len(rows)
    batch: dict[str, Any] = {
        "tokens": np.zeros((count, row_length), np.int32),
        "positions": np.zeros((count, 3, row_length), np.int32),
        "segment_ids": np.zeros((count, row_length), np.int32),
        "weights": np.zeros((count, row_length), np.float32),
    }
    names = sorted({name for row in rows for sequence in row for name in sequence.fields})
    for name in names:
        batch[name] = np.full((count, row_length), NEUTRAL.get(name, 0.0), np.float32)
    for index, row in enumerate(rows):
        _fill_row(batch, index, row, names, row_length, row_patches)
    if row_patches:
        batch["vision"] = _vision(
            rows,
            batch["tokens"],
            batch["segment_ids"],
            row_patches,
            image_settings,
            image_id,
            video_id,
        )
    return batch


def _fill_row(
    batch: dict[str, Any],
    index: int,
    row: list[Sequence],
    names: list[str],
    row_length: int,
    row_patches: int,
) -> None:
    total = sum(len(sequence.token_ids) for sequence in row)
    patches = sum(sequence.patches for sequence in row)
    if total > row_length or patches > row_patches:
        raise ValueError(
            f"row {index} holds {total} tokens and {patches} patches, the batch has room for {row_length} and "
            f"{row_patches}; pack with the same limits"
        )
    start = 0
    for segment, sequence in enumerate(row, 1):
        end = start + len(sequence.token_ids)
        batch["tokens"][index, start:end] = sequence.token_ids
        batch["positions"][index, :, start:end] = sequence.positions
        batch["segment_ids"][index, start:end] = segment
        batch["weights"][index, start:end] = sequence.weights
        batch["weights"][index, start] = 0.0
        for name in names:
            if name in sequence.fields:
                batch[name][index, start:end] = sequence.fields[name]
        start = end


def _vision(
    rows: list[list[Sequence]],
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    row_patches: int,
    settings: Any,
    image_id: int,
    video_id: int,
) -> dict[str, np.ndarray]:
    from smallmath_jax.data.images import token_index, vision_row

    stacked: dict[str, list[np.ndarray]] = {}
    for row in rows:
        with_images = [sequence for sequence in row if len(sequence.grids)]
        if any(sequence.pixels is None for sequence in with_images):
            raise ValueError(
                "a sequence has image grids but no pixels; call prompts.attach_pixels before collating"
            )
        pixels = grids = None
        if with_images:
            pixels = np.concatenate([sequence.pixels for sequence in with_images])
            grids = np.concatenate([sequence.grids for sequence in with_images])
        grids = np.zeros((0, 3), np.int32) if grids is None else grids
        for name, array in vision_row(pixels, grids, row_patches, settings).items():
            stacked.setdefault(name, []).append(array)
    vision = {name: np.stack(arrays) for name, arrays in stacked.items()}
    inside = np.where(segment_ids > 0, tokens, -1)  # padding is 0, which may be a real id
    vision["token_index"] = np.stack([token_index(row, image_id, video_id) for row in inside])
    return vision


def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of epoch `epoch` over n items: int64 [n], a pure function of its arguments.

    Philox' raw bits are the same in every numpy; Generator.permutation may change between releases (NEP 19).
    """
    key = int(draw_key("epoch order", seed, epoch).view(np.uint64)[0])
    return np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")


@dataclasses.dataclass(frozen=True, eq=False)
class RowPlan:
    """How sequences are packed into rows, once for a whole run, and how many rows a step takes."""

    rows: tuple[tuple[int, ...], ...]  # indices of sequences
    rows_per_step: int
    weight_sums: np.ndarray  # float64 [sequences]: sum of each sequence's weights
    dropped: tuple[int, ...] = ()  # sequences too big for a row

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.rows) // self.rows_per_step)


def plan_rows(
    lengths: np.ndarray | list[int],
    patches: np.ndarray | list[int] | None,
    weight_sums: np.ndarray | list[float],
    *,
    row_length: int,
    row_patches: int,
    rows_per_step: int,
    over: str = "error",
) -> RowPlan:
    """Packs all sequences. One too big for a row raises ValueError (over="error") or is dropped (over="drop").

    Raises ValueError too when nothing is supervised: a mask that is empty everywhere is a bug in the data.
    """
    if over not in ("error", "drop"):
        raise ValueError(f"over={over!r}: 'error' or 'drop'")
    lengths = np.asarray(lengths, np.int64)
    patches = np.zeros_like(lengths) if patches is None else np.asarray(patches, np.int64)
    sums = np.asarray(weight_sums, np.float64)
    keep = np.arange(len(lengths))
    if over == "drop":
        keep = np.flatnonzero((lengths <= row_length) & (patches <= row_patches))
    if not sums[keep].sum() > 0:
        raise ValueError(
            f"{len(keep)} sequences and no supervised token in any of them; check the solutions and the limits "
            f"(row_length {row_length}, row_patches {row_patches})"
        )
    packed = pack(lengths[keep], patches[keep], row_length, row_patches)
    return RowPlan(
        rows=tuple(tuple(int(keep[index]) for index in row) for row in packed),
        rows_per_step=rows_per_step,
        weight_sums=sums,
        dropped=tuple(sorted(set(range(len(lengths))) - set(keep.tolist()))),
    )


def step_rows(plan: RowPlan, seed: int, step: int) -> list[list[int]]:
    """Sequence indices of a step (from 0), row by row, over all hosts: a pure function, so a resume needs the step.

    Every epoch takes each row once; an epoch's last step is filled up with empty rows.
    """
    epoch, place = divmod(step, plan.steps_per_epoch)
    order = epoch_order(len(plan.rows), seed, epoch)
    taken = order[place * plan.rows_per_step : (place + 1) * plan.rows_per_step]
    rows = [list(plan.rows[index]) for index in taken]
    return rows + [[] for _ in range(plan.rows_per_step - len(rows))]


def sft_rows(
    get: Callable[[int], Sequence],
    plan: RowPlan,
    seed: int,
    step: int,
    host: int = 0,
    hosts: int = 1,
) -> list[list[Sequence]]:
    """This host's rows of a step. Weights are scaled so that they sum to 1 over the step on all hosts together.

    `get` maps an index to its sequence (a list's __getitem__, or a function that loads pixels). Raises ValueError for a
    step without a supervised token.
    """
    rows = step_rows(plan, seed, step)
    total = float(sum(plan.weight_sums[index] for row in rows for index in row))
    if not total > 0:
        raise ValueError(
            f"step {step}: no supervised token in its {len(rows)} rows; leave such sequences out"
        )
    return [[_scaled(get(index), total) for index in row] for row in shard_rows(rows, host, hosts)]


def _scaled(sequence: Sequence, total: float) -> Sequence:
    return dataclasses.replace(sequence, weights=(sequence.weights / total).astype(np.float32))


def shard_rows(rows: list[Any], host: int, hosts: int) -> list[Any]:
    """The consecutive rows of one host. Raises ValueError when the hosts do not divide the rows."""
    if len(rows) % hosts:
        raise ValueError(
            f"{len(rows)} rows a step cannot be shared by {hosts} hosts; make it a multiple of {hosts}"
        )
    share = len(rows) // hosts
    return rows[host * share : (host + 1) * share]
