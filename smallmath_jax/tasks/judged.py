"""What a preference model is trained on: pairs and examples as sequences, packed into batches of fixed shape.

A batch is planned on the host from the items and the seed alone, so that a run resumes from a step number. Both sides
of a pair lie in one microbatch; weights sum to 1 over a step (law 1).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence as SequenceOf
from typing import Any

import jax
import numpy as np

from smallmath_jax.data.batches import Sequence, collate, epoch_order, make_sequence
from smallmath_jax.parallel import hosts, rules
from smallmath_jax.records import PreferencePair, Problem, Prompt, draw_key
from smallmath_jax.search.select import ValueExample
from smallmath_jax.tasks import training
from smallmath_jax.tasks.policy import Policy, prompts_for, with_pixels
from smallmath_jax.train.advantages import pair_weights


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """One term of a value loss: a pair (chosen, rejected), or one example and its target."""

    problem: Problem
    sequences: tuple[Sequence, ...]  # weight 1 on the last token, 0 elsewhere
    weight: float  # before a step's weights are made to sum to 1
    target: float = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def judged_items(
    policy: Policy,
    problems: SequenceOf[Problem],
    pairs: SequenceOf[PreferencePair],
    examples: SequenceOf[ValueExample],
    config: Any,
) -> tuple[list[Judged], list[Judged], dict[str, int]]:
    """(pairs, examples, what was dropped by reason). A side longer than `ppm.max_tokens` drops its term whole.

    A pair weighs 1 / (n_pos n_neg) of its set (equation 4), an example 1.
    """
    kept, prompts, _ = prompts_for(unique(problems), policy, config)
    known = {one.id: (one, prompt) for one, prompt in zip(kept, prompts, strict=True)}
    limit = min(config.ppm.max_tokens, config.ppm.row_length)
    counts: Counter[str] = Counter()

    def make(problem_id: str, sides: SequenceOf[list[int]], weight: float, target: float = 0.0):
        if problem_id not in known:
            counts["no_prompt"] += 1
            return None
        problem, prompt = known[problem_id]
        if len(prompt.token_ids) + max(map(len, sides)) > limit:
            counts["too_long"] += 1
            return None
        return Judged(problem, tuple(_ended(prompt, ids) for ids in sides), weight, target)

    both = (
        make(
            pair.problem_id,
            (pair.prefix_ids + pair.chosen_ids, pair.prefix_ids + pair.rejected_ids),
            float(pair_weights(pair.positives, pair.negatives)),
        )
        for pair in pairs
    )
    single = (make(one.problem_id, (one.token_ids,), 1.0, one.value) for one in examples)
    found = [one for one in both if one], [one for one in single if one]
    return *found, dict(counts)


def _ended(prompt: Prompt, ids: list[int]) -> Sequence:
    weights = np.zeros(len(ids), np.float32)
    weights[-1] = 1.0
    return make_sequence(prompt, np.asarray(ids, np.int32), weights)


def unique(problems: SequenceOf[Problem]) -> list[Problem]:
    """The problems, each id once."""
    return list({problem.id: problem for problem in problems}.values())


def held_out(
    items: SequenceOf[Judged], share: float, seed: int
) -> tuple[list[Judged], list[Judged]]:
    """(to train on, held out), by problem."""
    drawn = lambda item: draw_key(seed, "held out", item.problem.id)[0] / 2**32
    train = [item for item in items if drawn(item) >= share]
    return train, [item for item in items if drawn(item) < share]


# ---- batches of fixed shape

Row = list[tuple[int, int]]  # (item, which of its sequences), from left to right


@dataclasses.dataclass(frozen=True)
class Plan:
    """Every step's items, packed into rows of microbatches: a pure function of the items, the settings and the seed."""

    steps: list[list[list[Row]]]  # step -> microbatch -> row
    tokens: list[int]  # of each step
    microbatches: int  # of the largest step
    ends: int  # sequences a microbatch may hold


def plan_steps(items: SequenceOf[Judged], settings: Any, seed: int, row_patches: int) -> Plan:
    """Packs epochs * items, `settings.pairs` terms a step, until `steps` or `tokens` are reached where they are set.

    The two sides of a pair lie in one microbatch. Raises ValueError for no items, or one that fits no row.
    """
    if not items:
        raise ValueError("no pair or example to train on; search more problems, or filter less")
    per_step = min(settings.pairs, len(items))
    epoch_steps = len(items) // per_step
    total = settings.steps or settings.epochs * epoch_steps
    ends = settings.microbatch_rows * max(4, settings.row_length // 256)
    planned, tokens = [], []
    for step in range(total):
        epoch, place = divmod(step, epoch_steps)
        order = epoch_order(len(items), seed, epoch)[place * per_step : (place + 1) * per_step]
        planned.append(_fill(items, order.tolist(), settings, row_patches, ends))
        tokens.append(sum(items[index].tokens for index in order))
        if settings.tokens and sum(tokens) >= settings.tokens:
            break
    return Plan(planned, tokens, max(map(len, planned)), ends)


def _fill(
    items: SequenceOf[Judged], order: list[int], settings: Any, row_patches: int, ends: int
) -> list[list[Row]]:
    """Microbatches of rows, first fit, an item's sequences together."""
    microbatches: list[list[Row]] = []
    room: list[list[int]] = []
    held = 0
    for index in order:
        needs = [(len(one.token_ids), one.patches) for one in items[index].sequences]
        places = _places(room, needs) if held + len(needs) <= ends else None
        if places is None:
            microbatches.append([[] for _ in range(settings.microbatch_rows)])
            room = [[settings.row_length, row_patches] for _ in range(settings.microbatch_rows)]
            held, places = 0, _places(room, needs)
        if places is None:
            raise ValueError(
                f"problem {items[index].problem.id!r}: sequences of {needs} tokens and patches do not fit "
                f"{settings.microbatch_rows} rows of {settings.row_length} and {row_patches}"
            )
        held += len(needs)
        for side, (row, (length, patches)) in enumerate(zip(places, needs, strict=True)):
            room[row][0] -= length
            room[row][1] -= patches
            microbatches[-1][row].append((index, side))
    return microbatches


def _places(room: list[list[int]], needs: list[tuple[int, int]]) -> list[int] | None:
    """The first row with room for each, in turn; None when one finds none."""
    left = [list(row) for row in room]
    places = []
    for length, patches in needs:
        fits = (n for n, row in enumerate(left) if row[0] >= length and row[1] >= patches)
        row = next(fits, None)
        if row is None:
            return None
        left[row][0] -= length
        left[row][1] -= patches
        places.append(row)
    return places


@dataclasses.dataclass(frozen=True)
class Batches:
    """Makes the device batch of a step."""

    items: SequenceOf[Judged]
    plan: Plan
    layout: training.Layout
    policy: Policy
    mesh: jax.sharding.Mesh
    seed: int

    def step(self, number: int, dropout: bool = True) -> dict[str, Any]:
        """[A, ...] arrays: rows cut over the mesh, what speaks of the whole microbatch on every device."""
        microbatches = self.plan.steps[number]
        members = [
            index for part in microbatches for row in part for index, side in row if not side
        ]
        total = sum(self.items[index].weight for index in members)
        keys = (self.seed, "dropout", number) if dropout else ()
        parts = [self._part(rows, total, keys) for rows in microbatches]
        empty: list[Row] = [[] for _ in range(self.layout.rows)]
        parts += [self._part(empty, 1.0, ())] * (self.layout.microbatches - len(parts))
        cut, whole = ({name: [p[k][name] for p in parts] for name in parts[0][k]} for k in (0, 1))
        stack = lambda values: jax.tree.map(lambda *x: np.stack(x), *values)
        cut = {name: stack(values) for name, values in cut.items()}
        place = functools.partial(
            jax.make_array_from_process_local_data, rules.replicated(self.mesh)
        )
        rows = hosts.global_batch(cut, self.mesh, leading=1)
        return rows | {name: place(np.stack(values)) for name, values in whole.items()}

    def _part(
        self, rows: list[Row], total: float, keys: tuple[Any, ...]
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """One microbatch: (arrays cut by rows, arrays of its ends)."""
        mine = hosts.local_rows(self.mesh, self.layout.rows)
        batch = collate(
            [[self._sequence(*entry) for entry in rows[row]] for row in mine],
            self.layout.row_length,
            self.layout.row_patches,
            self.policy.images,
            self.policy.tokens.image_id,
            self.policy.tokens.video_id,
        )
        return batch, self._ends(rows, total, keys)

    def _sequence(self, index: int, side: int) -> Sequence:
        item = self.items[index]
        return with_pixels(item.sequences[side], item.problem, self.policy)

    def _ends(self, rows: list[Row], total: float, keys: tuple[Any, ...]) -> dict[str, np.ndarray]:
        count = self.plan.ends
        ends, names = np.zeros((count, 2), np.int32), np.zeros((count, 2), np.uint32)
        pairs, pair_weights = np.zeros((count // 2, 2), np.int32), np.zeros(count // 2, np.float32)
        targets, weights = np.zeros(count, np.float32), np.zeros(count, np.float32)
        places: dict[tuple[int, int], int] = {}
        for row, entries in enumerate(rows):
            start = 0
            for index, side in entries:
                place = places[index, side] = len(places)
                start += len(self.items[index].sequences[side].token_ids)
                ends[place] = row, start - 1
                targets[place] = self.items[index].target
                weights[place] = self.items[index].weight / total
                if keys:
                    names[place] = draw_key(*keys, index, side)
        both = [index for index, side in places if side]
        for number, index in enumerate(both):
            pairs[number] = places[index, 0], places[index, 1]
            pair_weights[number] = self.items[index].weight / total
        return {
            "ends": ends,
            "dropout_keys": names,
            "pairs": pairs,
            "pair_weights": pair_weights,
            "targets": targets,
            "end_weights": weights,
        }
