"""Right by luck or by reasoning: programs of right answers, run on other instances of their problem.

An embedded problem can be drawn again with other numbers. A program that answers rightly only for the numbers it was
written for is no positive example: its answer is relabelled wrong, and the values that it backed up are taken back.
"""

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from smallmath_jax.data.tiny import is_embedded, rebind, reinstantiate
from smallmath_jax.records import Node, Problem, Tree
from smallmath_jax.search.expand import RIGHT, WRONG
from smallmath_jax.search.steps import OK, code_of
from smallmath_jax.search.tree import path_to
from smallmath_jax.tasks.driver import Host, same_answer


def recheck(
    trees: Sequence[Tree], problems: Mapping[str, Problem], host: Host, instances: int
) -> tuple[list[Tree], dict[str, int]]:
    """The trees with lucky answers relabelled, and counts of right answers checked and lucky.

    A program counts as reasoning when it is right on each of up to `instances` other instances that its inputs can be
    bound to, at least one. Trees of problems that cannot be drawn again are returned as they are.
    """
    asked: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (problem, program) -> (code, answer)
    right: list[list[tuple[str, tuple[str, str]]]] = []
    others: dict[str, list[Problem]] = {}
    for tree in trees:
        problem = problems.get(tree.problem_id)
        answers = [node for node in tree.nodes if node.verdict == "correct"]
        if not can_check(problem) or not instances:
            answers = []
        right.append([(node.tag, (tree.problem_id, _program(tree, node))) for node in answers])
        for _, key in right[-1]:
            if key not in asked:
                if problem.id not in others:
                    others[problem.id] = [reinstantiate(problem, n) for n in range(instances)]
                bound = ((rebind(key[1], problem, one), one.answer) for one in others[problem.id])
                asked[key] = [(code, answer) for code, answer in bound if code is not None]
    lucky = asyncio.run(_lucky(asked, host)) if asked else set()
    relabelled = []
    for tree, found in zip(trees, right, strict=True):
        relabelled.append(relabel(tree, [tag for tag, key in found if key in lucky]))
    checked = sum(map(len, right))
    wrong = sum(key in lucky for found in right for _, key in found)
    return relabelled, {"right_answers": checked, "lucky": wrong}


def can_check(problem: Problem | None) -> bool:
    """Whether the problem can be drawn again with other numbers."""
    return problem is not None and is_embedded(problem)


async def _lucky(asked: Mapping[Any, list[tuple[str, str]]], host: Host) -> set[Any]:
    """The programs that fail on an instance, or could be bound to none."""

    async def fails(code: str, answer: str) -> bool:
        result = await host.run_program("", code)
        return result.status != OK or not same_answer(answer, result.stdout.strip())

    checks = [(key, code, answer) for key, bound in asked.items() for code, answer in bound]
    failed = await asyncio.gather(*(fails(code, answer) for _, code, answer in checks))
    lucky = {key for key, bound in asked.items() if not bound}
    return lucky | {key for (key, _, _), bad in zip(checks, failed, strict=True) if bad}


def _program(tree: Tree, answer: Node) -> str:
    """All code on the way to an answer; steps that failed left nothing behind."""
    way = path_to(tree, answer.tag)[:-1]
    return "".join(code_of(step.text) for step in way if step.status == OK)


def relabel(tree: Tree, tags: Sequence[str]) -> Tree:
    """The tree with these right answers wrong, as if they had been graded so: +1 on their paths becomes -1."""
    if not tags:
        return tree
    nodes = {node.tag: node for node in tree.nodes}
    for tag in tags:
        nodes[tag] = dataclasses.replace(nodes[tag], verdict="wrong")
        while tag:
            node = nodes[tag]
            nodes[tag] = dataclasses.replace(node, value_sum=node.value_sum + WRONG - RIGHT)
            tag = node.parent
    return dataclasses.replace(tree, nodes=list(nodes.values()))
