"""Growing a search tree by the children of one node: sample, filter, run code, grade, score, attach.

Shared by every search. What it may call is in `Search`; engines, sandboxes and graders are the caller's.
"""

import asyncio
import dataclasses
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from smallmath_jax.records import Problem, Tree, draw_key
from smallmath_jax.search import rstar, steps, vote
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import Candidate
from smallmath_jax.search.tree import (
    LiveNode,
    LiveTree,
    backup,
    from_record,
    is_terminal,
    mark_exhausted,
    new_tree,
    path,
    revive,
    to_record,
    update,
)

Generate = Callable[[Any, int, np.ndarray], Awaitable[Sequence[Candidate]]]
Append = Callable[[Any, list[int]], Any]
Encode = Callable[[str], Sequence[int]]
RunCode = Callable[[list[tuple[str, str]]], Awaitable[Sequence[Any]]]
Score = Callable[[list[Any]], Awaitable[Sequence[float]]]
Grade = Callable[[str], Awaitable[str]]
RIGHT, WRONG = 1.0, -1.0


@dataclasses.dataclass(frozen=True)
class Search:
    """One problem's search: its tree, and what it may call.

    generate: (handle, n, keys uint32 [n, 2]) -> n candidates; keys name the draws (law 5).
    append: (handle, token ids) -> the handle behind them; no waiting.
    encode: text -> token ids, of what is appended behind <end_of_code>.
    run_code: [(prefix, code)] -> a result each (see steps.CodeResult), for all children of a node at once.
    score: [handle] -> a score each, in [-1, 1]: the process preference model.
    grade: answer -> verdict (correct, wrong, ...); needed exactly when settings.use_gold.
    equal: whether two answers are the same, for votes and early stopping.
    """

    problem: Problem
    live: LiveTree
    settings: SearchSettings
    generate: Generate
    append: Append
    encode: Encode
    run_code: RunCode
    score: Score | None = None
    grade: Grade | None = None
    equal: Callable[[str, str], bool] = str.__eq__


def open_search(
    problem: Problem, root: Any, settings: SearchSettings, tree: Tree | None, callables: dict
) -> Search:
    """A search at its start, or where `tree` ended. Raises ValueError for callables that do not fit the settings."""
    live = new_tree(root) if tree is None else from_record(tree, root)
    run = Search(problem=problem, live=live, settings=settings, **callables)
    if settings.use_gold != (run.grade is not None):
        raise ValueError(
            "search.use_gold and grade go together: annotation grades answers, an evaluation never sees the gold answer"
        )
    if settings.guidance == "ppm" and run.score is None:
        raise ValueError("search.guidance='ppm' needs a preference model to score with (score=...)")
    if tree is not None and tree.problem_id != problem.id:
        raise ValueError(f"problem {problem.id!r} cannot go on with a tree of {tree.problem_id!r}")
    return run


async def finish(run: Search, body: Awaitable[str]) -> Tree:
    """Awaits the search itself, which returns why it stopped, and makes the record.

    An exception ends this search alone: stopped="failed", the message in extra["failure"], and the tree as it was
    before the expansion that failed. Such a problem is best searched again from its start.
    """
    extra: dict[str, Any] = {}
    live, settings = run.live, run.settings
    try:
        stopped = await body
    except Exception as error:  # whatever it was, the other problems go on
        stopped, extra["failure"] = "failed", f"{type(error).__name__}: {error}"
    if stopped in ("decided", "confident"):
        saved = max(0, settings.rollouts - live.rollouts)
        spent = live.tokens / max(live.rollouts, 1)
        extra |= {"rollouts_saved": saved, "tokens_saved": round(saved * spent)}
    chosen = vote.choose(live, settings, run.equal)
    return to_record(live, run.problem, settings, stopped=stopped, chosen=chosen, extra=extra)


async def expand(run: Search, node: LiveNode) -> bool:
    """Gives a leaf its children: sample, filter, run code, grade, score, then back up. Returns whether one answers.

    Nothing is attached or counted before every call has come back, so a failed call leaves the tree as it was. The
    public code then counts its previous candidates once more, and draws the same step again.
    """
    drawn = await draw(run, node, run.settings.candidates)
    try:
        grown = await grow(run, node, drawn)
    except Exception:
        if not run.settings.compat:
            raise
        await _count_again(run)
        return False
    attach(run, node, grown)
    return any(child.kind == "answer" for child in grown.children)


async def _count_again(run: Search) -> None:
    if run.score is None:
        return
    again = run.live.latest
    scores = await run.score([handle_of(run, node) for node in again])
    for node, score in zip(again, scores, strict=True):
        (backup if node.kind == "answer" else update)(node, float(score))


class Grown(NamedTuple):
    """The children of a node, ready to be attached, and what was left out."""

    children: list[LiveNode]
    tokens: int
    duplicates: int
    dropped: int
    discarded: int


async def widen(run: Search, nodes: Sequence[LiveNode]) -> bool:
    """Draws as many candidates again for nodes that have children; steps they have already are dropped.

    Returns whether there is anything new to select below them.
    """
    again = ("again", run.live.rollouts)
    drawn = await asyncio.gather(
        *(draw(run, node, run.settings.candidates, *again) for node in nodes)
    )
    for node, candidates in zip(nodes, drawn, strict=True):
        known = {tuple(child.token_ids[: child.written]) for child in node.children}
        fresh = [one for one in candidates if tuple(one.token_ids) not in known]
        grown = await grow(run, node, fresh)
        spent = sum(len(one.token_ids) for one in candidates)
        repeated = len(candidates) - len(fresh)
        attach(run, node, grown._replace(tokens=spent, duplicates=grown.duplicates + repeated))
        if not all(map(is_terminal, grown.children)):
            revive(node)
    return not run.live.root.exhausted


async def draw(run: Search, node: LiveNode, count: int, *more: Any) -> Sequence[Candidate]:
    """`count` samples of the next step; each draw is keyed by what names it, `more` included."""
    settings = run.settings
    names = (settings.seed, run.problem.id, settings.round, node.tag, *more)
    keys = np.stack([draw_key(*names, sample) for sample in range(count)])
    return await run.generate(handle_of(run, node), count, keys)


async def grow(
    run: Search, node: LiveNode, drawn: Sequence[Candidate], keep_all: bool = False
) -> Grown:
    """The children `drawn` make below a node, with their code run, answers graded and scores given."""
    settings = run.settings
    if keep_all:
        kept = steps.Kept(list(drawn), 0, 0)
    elif settings.compat:
        kept = rstar.filter_candidates(drawn)
    else:
        kept = steps.filter_candidates(drawn, settings)
    made = [_child(run, node, candidate) for candidate in kept.candidates]
    await _execute(run, node, made)
    keeps = settings.errors == "keep"
    children = [child for child in made if keeps or child.kind != "error"]
    for number, child in enumerate(children, len(node.children) + 1):
        child.tag = f"{node.tag}.{number}"
        if child.kind == "open" and _too_deep(child, settings):
            child.kind = "too_deep"
    await _grade(run, children)
    await _score(run, children)
    tokens = sum(len(candidate.token_ids) for candidate in drawn)
    return Grown(children, tokens, kept.duplicates, kept.dropped, len(made) - len(children))


def attach(run: Search, node: LiveNode, grown: Grown) -> None:
    """Puts grown children into the tree and backs their values up."""
    live = run.live
    live.tokens += grown.tokens
    live.duplicates += grown.duplicates
    live.dropped += grown.dropped
    live.discarded += grown.discarded
    live.nodes += grown.children
    node.children = node.children + grown.children
    live.latest = [child for child in grown.children if child.score is not None]
    for child in grown.children:
        _reward(run, child)
    if not run.settings.compat or not node.children:
        mark_exhausted(node)


def handle_of(run: Search, node: LiveNode) -> Any:
    """Where generation goes on behind a node; made again from its ids when the tree was read from a record."""
    above = None
    for step in path(node) if node.handle is None else [node]:
        if step.handle is None:
            step.handle = run.append(above, list(step.token_ids)) if step.token_ids else above
        above = step.handle
    return above


def _child(run: Search, parent: LiveNode, candidate: Candidate) -> LiveNode:
    step = rstar.read_step(candidate.text) if run.settings.compat else steps.read_step(candidate)
    return LiveNode(
        parent=parent,
        text=candidate.text,
        token_ids=[int(token) for token in candidate.token_ids],
        written=len(candidate.token_ids),
        log_prob=float(candidate.log_prob),
        kind=step.kind,
        answer=step.answer if step.kind == "answer" else None,
        status="waiting" if step.runs else "",
        rollout=run.live.rollouts,
        handle=candidate.handle,
    )


async def _execute(run: Search, parent: LiveNode, children: list[LiveNode]) -> None:
    """Runs the children's code; failures and outputs go into them."""
    runs = [child for child in children if child.status == "waiting"]
    if not runs:
        return
    program = rstar.program if run.settings.compat else steps.program
    results = await run.run_code([program(parent, child.text) for child in runs])
    for child, result in zip(runs, results, strict=True):
        child.status, child.output, child.error = result.status, result.stdout, result.stderr_tail
        if run.settings.compat:
            _observe_rstar(run, parent, child, result)
            continue
        child.errors = 0 if result.status == steps.OK else parent.errors + 1
        if child.errors >= run.settings.max_errors:
            child.kind = "error"
        if steps.ending(child.text) == steps.CODE_END:
            _append_text(run, child, steps.shown_output(parent, result, run.settings))


def _observe_rstar(run: Search, parent: LiveNode, child: LiveNode, result: Any) -> None:
    observed = rstar.observation(result)
    child.errors = parent.errors + 1 if rstar.failed(observed) else 0
    child.kind = "error" if child.errors >= run.settings.max_errors else child.kind
    text = rstar.step_text(child.text, observed, child.kind == "error")
    _append_text(run, child, text[len(child.text) :])


def _append_text(run: Search, child: LiveNode, text: str) -> None:
    """Adds given text to a step, as ids: what the policy wrote keeps the ids it drew."""
    if not text:
        return
    ids = [int(token) for token in run.encode(text)]
    child.text += text
    child.token_ids = child.token_ids + ids
    if child.handle is not None and ids:
        child.handle = run.append(child.handle, ids)


def _too_deep(child: LiveNode, settings: SearchSettings) -> bool:
    """A step at the last depth must be an answer; the public code lets later rollouts go one deeper."""
    return (
        child.depth > settings.max_depth if settings.compat else child.depth >= settings.max_depth
    )


async def _grade(run: Search, children: list[LiveNode]) -> None:
    answers = [child for child in children if child.kind == "answer"]
    if run.grade is None or not answers:
        return
    verdicts = await asyncio.gather(*(run.grade(child.answer) for child in answers))
    for child, verdict in zip(answers, verdicts, strict=True):
        child.verdict = verdict


async def _score(run: Search, children: list[LiveNode]) -> None:
    """Scores answers where no gold answer is used, then, under PPM guidance, open children."""
    if run.score is None:
        return
    answers = [] if run.settings.use_gold else [one for one in children if one.kind == "answer"]
    guided = run.settings.guidance == "ppm"
    scored = answers + [child for child in children if guided and child.kind == "open"]
    if not scored:
        return
    scores = await run.score([handle_of(run, child) for child in scored])
    if len(scores) != len(scored) or not all(math.isfinite(value) for value in scores):
        raise ValueError(
            f"the preference model gave {list(scores)} for {len(scored)} nodes; need a finite score each"
        )
    for child, value in zip(scored, scores, strict=True):
        child.score = float(value)


def _reward(run: Search, child: LiveNode) -> None:
    """First values of a new child, and what its answer is worth to all above it (section 3.2.3).

    An answer that could not be graded (unparsable gold, timeout) counts nowhere. Without gold and PPM an answer counts
    as a visit of value 0, so that exploration still moves on; the public code counts nothing then.
    """
    settings = run.settings
    if child.kind == "answer":
        if settings.use_gold:
            value = {"correct": RIGHT, "wrong": WRONG}.get(child.verdict)
        else:
            value = None if child.score is None and settings.compat else child.score or 0.0
        if value is not None:
            backup(child, value)
    elif child.kind != "open":
        update(child, WRONG)
    elif child.score is not None and settings.score_visits:
        update(child, child.score)
    elif child.score is not None:
        child.value_sum = child.score
