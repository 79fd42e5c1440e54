"""What a preference model is trained on: paths of trees and the places on them that are judged, packed into batches.

Two steps that share a prefix, and a step and the trajectory it leads to, share their tokens: what is judged lies at
ends along a path, and a path is read once for all its ends. A batch is planned on the host from the items and the seed
alone, so that a run resumes from a step number. An item lies in one microbatch; weights sum to 1 over a step (law 1).
"""

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterable
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

# Of a microbatch's tokens and patches, what one item may hold, so that items pack well
ITEM_SHARE = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class Judged:
    """Terms of a value loss on one problem, and the paths they are read from.

    Every pair counts with its own weight (before a step's weights are made to sum to 1), every target with 1.
    """

    problem: Problem
    sequences: tuple[Sequence, ...]  # paths from the root; no one is the beginning of another
    ends: tuple[tuple[int, int], ...]  # (sequence, place of the token whose value is read)
    pairs: tuple[tuple[int, int, float], ...] = ()  # (chosen end, rejected end, weight)
    targets: tuple[tuple[int, float], ...] = ()  # (end, value it is to have)

    @property
    def tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)

    @property
    def terms(self) -> int:
        return len(self.pairs) + len(self.targets)

    @property
    def weight(self) -> float:
        return sum(weight for _, _, weight in self.pairs) + len(self.targets)


Ids = tuple[int, ...]
Term = tuple[Ids, Ids, float] | tuple[Ids, float]  # a pair of sides and its weight, or a target


def judged_items(
    policy: Policy,
    problems: SequenceOf[Problem],
    pairs: SequenceOf[PreferencePair],
    examples: SequenceOf[ValueExample],
    config: Any,
) -> tuple[list[Judged], list[Judged], dict[str, int]]:
    """(items of pairs, items of examples, terms dropped by reason), a problem's terms together.

    A side longer than `ppm.max_tokens` drops its term whole. A pair weighs 1 / (n_pos n_neg) of its set (equation 4).
    """
    kept, prompts, _ = prompts_for(unique(problems), policy, config)
    known = {one.id: (one, prompt) for one, prompt in zip(kept, prompts, strict=True)}
    limit = min(config.ppm.max_tokens, config.ppm.row_length)
    counts: Counter[str] = Counter()

    def items(terms: Iterable[tuple[str, Term]]) -> list[Judged]:
        by_problem: dict[str, list[Term]] = {}
        for name, term in terms:
            if name not in known:
                counts["no_prompt"] += 1
            elif len(known[name][1].token_ids) + max(map(len, term[:-1])) > limit:
                counts["too_long"] += 1
            else:
                by_problem.setdefault(name, []).append(term)
        return [
            judged(*known[name], part)
            for name, found in by_problem.items()
            for part in _parts(found, known[name][1], config.ppm)
        ]

    weights = pair_weights([one.positives for one in pairs], [one.negatives for one in pairs])
    side = lambda pair, ids: (*pair.prefix_ids, *ids)
    both = items(
        (one.problem_id, (side(one, one.chosen_ids), side(one, one.rejected_ids), float(weight)))
        for one, weight in zip(pairs, weights, strict=True)
    )
    single = items((one.problem_id, (tuple(one.token_ids), one.value)) for one in examples)
    return both, single, dict(counts)


def judged(problem: Problem, prompt: Prompt, terms: SequenceOf[Term]) -> Judged:
    """The item of these terms of one problem: the longest of their sides as paths, all others as ends on them."""
    sides = dict.fromkeys(side for term in terms for side in term[:-1])
    paths = _paths(terms)
    places = {
        side: (_begun_by(side, paths), len(prompt.token_ids) + len(side) - 1) for side in sides
    }
    number = {side: index for index, side in enumerate(sides)}
    return Judged(
        problem,
        tuple(_ended(prompt, list(path)) for path in paths),
        tuple(places[side] for side in sides),
        tuple((number[t[0]], number[t[1]], t[2]) for t in terms if len(t) == 3),
        tuple((number[t[0]], t[1]) for t in terms if len(t) == 2),
    )


def _paths(terms: SequenceOf[Term]) -> list[Ids]:
    """The sides of these terms that begin no other, in falling order."""
    paths: list[Ids] = []
    for side in sorted({side for term in terms for side in term[:-1]}, reverse=True):
        if not paths or paths[-1][: len(side)] != side:  # a beginning comes right behind its like
            paths.append(side)
    return paths


def _begun_by(side: Ids, paths: SequenceOf[Ids]) -> int:
    return next(index for index, path in enumerate(paths) if path[: len(side)] == side)


def _parts(terms: SequenceOf[Term], prompt: Prompt, settings: Any) -> Iterable[list[Term]]:
    """Terms in their order, cut where the paths of a part would fill more than an item's share of a microbatch."""
    rows, patches = settings.microbatch_rows, _ended(prompt, [0]).patches
    room = ITEM_SHARE * rows * settings.row_length
    # Every path brings the whole picture with it
    most = ITEM_SHARE * rows * max(1, settings.row_patches // patches) if patches else np.inf
    part, needed, count = [], 0, 0
    for term in terms:
        more, sides = sum(len(prompt.token_ids) + len(side) for side in term[:-1]), len(term) - 1
        if part and (needed + more > room or count + sides > most):
            paths = _paths([*part, term])  # many sides begin others: no bound, but what there is
            needed = sum(len(prompt.token_ids) + len(path) for path in paths) - more
            count = len(paths) - sides
            if needed + more > room or count + sides > most:
                yield part
                part, needed, count = [], 0, 0
        part.append(term)
        needed, count = needed + more, count + sides
    if part:
        yield part


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
    ends: int  # values a microbatch may read
    pairs: int  # pairs it may compare


def plan_steps(items: SequenceOf[Judged], settings: Any, seed: int, row_patches: int) -> Plan:
    """Packs epochs * items, about `settings.pairs` terms a step, until `steps` or `tokens` are reached where set.

    An epoch takes every item once. Raises ValueError for no items, or one that fits no microbatch.
    """
    if not items:
        raise ValueError("no pair or example to train on; search more problems, or filter less")
    terms = np.array([item.terms for item in items])
    epoch_steps = min(max(1, round(terms.sum() / settings.pairs)), len(items))
    total = settings.steps or settings.epochs * epoch_steps
    planned, tokens, orders = [], [], []
    for step in range(total):
        epoch, place = divmod(step, epoch_steps)
        if place == 0:
            order = epoch_order(len(items), seed, epoch)
            cuts = np.searchsorted(_part_of(terms[order], epoch_steps), range(1, epoch_steps))
            orders = np.split(order, cuts)
        planned.append(_fill(items, orders[place].tolist(), settings, row_patches))
        tokens.append(sum(items[index].tokens for index in orders[place]))
        if settings.tokens and sum(tokens) >= settings.tokens:
            break
    parts = [{i for row in part for i, _ in row} for step in planned for part in step]
    most = lambda count: max(sum(count(items[index]) for index in part) for part in parts)
    return Plan(
        planned,
        tokens,
        max(map(len, planned)),
        most(lambda item: len(item.ends)),
        max(1, most(lambda item: len(item.pairs))),
    )


def _part_of(terms: np.ndarray, parts: int) -> np.ndarray:
    """Which of `parts` runs of about equally many terms each item falls into; none of them stays empty."""
    middle = np.cumsum(terms) - terms / 2
    wanted = np.floor(middle * parts / terms.sum()).astype(int)
    found = np.zeros(len(terms), int)
    for index in range(1, len(terms)):
        # One part further at most, and far enough that the items left can fill the parts left
        lowest = max(found[index - 1], parts - len(terms) + index)
        found[index] = min(max(wanted[index], lowest), found[index - 1] + 1, parts - 1)
    return found


def _fill(
    items: SequenceOf[Judged], order: list[int], settings: Any, row_patches: int
) -> list[list[Row]]:
    """Microbatches of rows, first fit, an item's sequences together."""
    microbatches: list[list[Row]] = []
    room: list[list[int]] = []
    for index in order:
        needs = [(len(one.token_ids), one.patches) for one in items[index].sequences]
        places = _places(room, needs)
        if places is None:
            microbatches.append([[] for _ in range(settings.microbatch_rows)])
            room = [[settings.row_length, row_patches] for _ in range(settings.microbatch_rows)]
            places = _places(room, needs)
        if places is None:
            raise ValueError(
                f"problem {items[index].problem.id!r}: sequences of {needs} tokens and patches do not fit "
                f"{settings.microbatch_rows} rows of {settings.row_length} and {row_patches}"
            )
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
        members = {index for part in microbatches for row in part for index, _ in row}
        total = sum(self.items[index].weight for index in sorted(members))
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
        pairs = np.zeros((self.plan.pairs, 2), np.int32)
        pair_weights = np.zeros(self.plan.pairs, np.float32)
        targets, weights = np.zeros(count, np.float32), np.zeros(count, np.float32)
        starts: dict[int, dict[int, tuple[int, int]]] = {}  # item -> sequence -> row and start
        for row, entries in enumerate(rows):
            start = 0
            for index, side in entries:
                starts.setdefault(index, {})[side] = row, start
                start += len(self.items[index].sequences[side].token_ids)
        first_end = first_pair = 0
        for index, found in starts.items():
            item = self.items[index]
            for number, (side, place) in enumerate(item.ends, first_end):
                ends[number] = found[side][0], found[side][1] + place
                if keys:
                    names[number] = draw_key(*keys, index, number - first_end)
            for number, (chosen, rejected, weight) in enumerate(item.pairs, first_pair):
                pairs[number] = first_end + chosen, first_end + rejected
                pair_weights[number] = weight / total
            for end, value in item.targets:
                targets[first_end + end], weights[first_end + end] = value, 1.0 / total
            first_end, first_pair = first_end + len(item.ends), first_pair + len(item.pairs)
        return {
            "ends": ends,
            "dropout_keys": names,
            "pairs": pairs,
            "pair_weights": pair_weights,
            "targets": targets,
            "end_weights": weights,
        }
