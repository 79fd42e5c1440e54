"""Other ways through the same tree: step beam search, and independent chains (best of N, sampling baselines)."""

import asyncio
import dataclasses
from typing import Any

from smallmath_jax.records import Problem, Tree
from smallmath_jax.search.expand import (
    Grown,
    Search,
    attach,
    draw,
    finish,
    grow,
    handle_of,
    open_search,
)
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.tree import LiveNode, is_terminal


async def beam_search(
    problem: Problem,
    root: Any,
    *,
    width: int,
    settings: SearchSettings,
    **callables: Any,
) -> Tree:
    """Step beam search: of all children of a level the `width` best by PPM score go on.

    Each answer found takes one place of the width; it ends when all places are taken or no step is left. Its tree has
    values like any other. Callables as in `expand.Search`, with a score. Raises ValueError without guidance="ppm".
    """
    if settings.guidance != "ppm" or width < 1:
        raise ValueError(
            f"beam search needs search.guidance='ppm' (got {settings.guidance!r}) and a width of at least 1 ({width})"
        )
    run = open_search(problem, root, settings, None, callables)
    return await finish(run, (_rstar_beam if settings.compat else _beam)(run, width))


async def _beam(run: Search, width: int) -> str:
    beam, found = [run.live.root], 0
    while beam and found < width:
        run.live.walks.append([node.tag for node in beam])
        grown = await asyncio.gather(*(_grown(run, node, run.settings.candidates) for node in beam))
        for node, new in zip(beam, grown, strict=True):
            attach(run, node, new)
        run.live.rollouts += 1
        children = [child for new in grown for child in new.children]
        found += sum(child.kind == "answer" for child in children)
        # First filter, then slice: a dead step takes no place
        opened = [child for child in children if child.kind == "open"]
        opened.sort(key=lambda child: child.score, reverse=True)
        beam = opened[: max(width - found, 0)]
    return "decided" if found >= width else "exhausted"


async def _grown(run: Search, node: LiveNode, count: int, keep_all: bool = False) -> Grown:
    return await grow(run, node, await draw(run, node, count), keep_all)


async def _rstar_beam(run: Search, width: int) -> str:
    """The public code's beam: dead steps keep their places, and a live step's samples may land below a dead one.

    A width below zero, from many answers in one level, keeps nearly everything.
    """
    settings = dataclasses.replace(run.settings, max_errors=1)
    unscored = dataclasses.replace(run, settings=settings, score=None)
    live, current = run.live, [run.live.root]
    for _ in range(settings.max_depth):
        live.walks.append([node.tag for node in current])
        alive = [node for node in current if not is_terminal(node)]
        if not alive:
            return "exhausted"
        samples = await asyncio.gather(*(draw(run, node, settings.candidates) for node in alive))
        live.tokens += sum(len(one.token_ids) for drawn in samples for one in drawn)
        candidates: list[LiveNode] = []
        for node, drawn in zip(current, samples, strict=False):  # not the nodes they were drawn for
            node.children = (await grow(unscored, node, drawn)).children
            candidates += node.children
        live.nodes += candidates
        live.rollouts += 1
        scores = await run.score([handle_of(run, child) for child in candidates])
        for child, score in zip(candidates, scores, strict=True):
            child.score = child.value_sum = float(score)
        candidates.sort(key=lambda child: child.score, reverse=True)
        width -= sum(child.kind == "answer" for child in candidates)
        current = candidates[:width]
    return "exhausted"


async def sample_chains(
    problem: Problem,
    root: Any,
    *,
    count: int,
    settings: SearchSettings,
    **callables: Any,
) -> Tree:
    """`count` independent trajectories, step by step with their code run: no search, nothing filtered.

    For best-of-N, pass@k, and the sampling baselines of the ablation. A tree whose root has `count` children, each of
    them the start of a chain. Callables as in `expand.Search`.
    """
    run = open_search(problem, root, settings, None, callables)
    return await finish(run, _chains(run, count))


async def _chains(run: Search, count: int) -> str:
    first = await _grown(run, run.live.root, count, keep_all=True)
    chains = await asyncio.gather(*(_chain(run, child) for child in first.children))
    attach(run, run.live.root, first)
    for node, grown in (link for chain in chains for link in chain):
        attach(run, node, grown)  # in the order of the chains, whichever came back first
    run.live.rollouts += len(chains)
    return "rollouts"


async def _chain(run: Search, node: LiveNode) -> list[tuple[LiveNode, Grown]]:
    links = []
    while node.kind == "open":
        grown = await _grown(run, node, 1, keep_all=True)
        links.append((node, grown))
        if not grown.children:
            break
        node = grown.children[0]
    return links
