"""Monte Carlo tree search over reasoning steps: one coroutine a problem (rStar-Math, section 3.2).

    async def search(problem, root, *, generate, append, encode, run_code, score, grade, settings) -> Tree

A rollout walks from the root to a leaf by upper confidence bound, expands it, goes on greedily among the new children,
and ends at an answer. There is no lock-step: thousands of searches share one engine, each waits only for its own
calls, and one that fails ends alone, with its failure in the record. Draws are keyed by (seed, problem, round, node,
sample), so a tree does not depend on its neighbours, and a stored tree goes on as if it had never stopped.
"""

import asyncio
import itertools
import math
from typing import Any

from smallmath_jax.records import Problem, Tree, draw_key
from smallmath_jax.search import vote
from smallmath_jax.search.expand import Search, expand, finish, open_search, widen
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import LiveNode, backup, best_child


async def search(
    problem: Problem,
    root: Any,
    *,
    settings: SearchSettings,
    tree: Tree | None = None,
    **callables: Any,
) -> Tree:
    """Searches one problem and returns its tree; goes on with `tree` where one is given.

    Args:
        problem: its gold answer is copied into the record and used by nothing here.
        root: the handle of the prompt, images included; opaque here.
        tree: a finished search of the same problem; with more rollouts in the settings it goes on, as if it had asked
            for them at once.
        callables: generate, append, encode, run_code, score, grade, equal: see `expand.Search`.

    Failures of callables are in the record (`expand.finish`). Raises ValueError for callables that do not fit the
    settings.
    """
    run = open_search(problem, root, settings, tree, callables)
    return await finish(run, _search(run))


def search_now(problem: Problem, root: Any, **arguments: Any) -> Tree:
    """`search`, from ordinary code: blocks until it is done."""
    return asyncio.run(search(problem, root, **arguments))


def search_seeds(seed: int, count: int) -> list[int]:
    """Seeds of `count` searches; the first is `seed` itself, so that one search is the first of many."""
    others = (int(draw_key(seed, "search", number)[0]) for number in range(1, count))
    return [seed, *others]


async def _search(run: Search) -> str:
    """Rollouts until there are enough; returns why it stopped."""
    live = run.live
    while not (reason := ended(run)):
        if live.root.exhausted and not await widen(run, picked_path(run)):
            live.rollouts += 1  # it cost as much as one
            live.wasted += 1
            continue
        await rollout(run)
    return reason


def ended(run: Search) -> str:
    """Why no further rollout is due; "" while one is."""
    if run.live.rollouts >= run.settings.rollouts:
        return "rollouts"
    if run.live.root.exhausted and not run.settings.widen:
        return "exhausted"
    return vote.stop_reason(run.live, run.settings, run.equal)


def picked_path(run: Search) -> list[LiveNode]:
    """From the root down to a node without expanded children, each step picked with the policy's probability.

    That is how a new search would come there. Nodes whose children answer are left out: answers to one output agree.
    """
    settings = run.settings
    nodes, node = [], run.live.root
    while node is not None:
        if not any(child.kind == "answer" for child in node.children):
            nodes.append(node)
        names = (settings.seed, run.problem.id, settings.round, node.tag, "pick", run.live.rollouts)
        opened = [child for child in node.children if child.children]
        draw = (int(draw_key(*names)[0]) + 0.5) / 2**32
        highest = max((child.log_prob for child in opened), default=0.0)
        weights = [math.exp(child.log_prob - highest) for child in opened]
        below = itertools.accumulate(weights)
        reached = (
            child for child, sum_ in zip(opened, below, strict=True) if sum_ > draw * sum(weights)
        )
        node = next(reached, opened[-1] if opened else None)
    return nodes


async def rollout(run: Search) -> None:
    """One walk down: choose, expand what is not expanded, until an answer or a dead end."""
    live, settings = run.live, run.settings
    node = best_child(live.root, settings) if live.root.children else live.root
    walk, expanded, answered, last = [], False, False, live.root
    # The public code takes max_depth steps a rollout, wherever it starts; a depth limit is all that is needed.
    for _ in range(settings.max_depth) if settings.compat else itertools.count():
        walk.append(node.tag if node else None)
        if node is None:
            break
        last = node
        if not node.children:
            expanded = True
            answered = await expand(run, node)
            if answered and not settings.compat:
                break
        if node.children or node.exhausted:  # else its expansion was lost (compat): again
            node = best_child(node, settings)
    else:
        walk.append(node.tag if node else None)
    live.walks.append(walk)
    live.wasted += not expanded
    if not answered and settings.dead_end is not None:
        backup(last, settings.dead_end)
    live.rollouts += 1
