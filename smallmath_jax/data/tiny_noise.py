"""Noisy worked solutions of the embedded problems: what a tiny bootstrap policy learns from.

The large policy that starts rStar-Math's first round is right on 60 % of the problems. Here its place is taken by a
model fine-tuned on programs of which a stated share is wrong: a number read wrongly, or an operator mistaken. Their
outputs are those of the wrong programs, so the form teaches nothing about which is which.
"""

import ast
import random

from smallmath_jax.data.tiny import LARGEST, OPERATORS, program
from smallmath_jax.records import Problem

MISTAKES = ("number", "operator")


def noisy_solution(problem: Problem, rate: float, seed: int) -> tuple[str, bool]:
    """(solution in the grammar `code_steps`, whether it was spoilt): spoilt with probability `rate`.

    Raises ValueError for a problem that is not embedded, or a rate outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"noise rate {rate} must lie between 0 and 1")
    source = random.Random(f"noise {seed} {problem.id}")
    lines, printed = program(problem), problem.answer
    spoilt = source.random() < rate and _spoil(lines, source, problem.answer)
    if spoilt:
        lines, printed = spoilt
    steps = "".join(f"{line}<end_of_step>\n" for line in lines[:-1])
    text = (
        f"<code>\n{steps}{lines[-1]}\n<end_of_code>\n<output>{printed}<end_of_output>\n"
        f"<answer>\\boxed{{{printed}}}<end_of_answer>"
    )
    return text, bool(spoilt)


def _spoil(lines: list[str], source: random.Random, answer: str) -> tuple[list[str], str] | None:
    """The program with one mistake that changes what it prints; None when none of many tries does."""
    for _ in range(50):
        changed = list(lines)
        place = source.randrange(len(lines) - 1)
        changed[place] = _mistaken(lines[place], source.choice(MISTAKES), source)
        printed = _run(changed)
        if printed is not None and printed != answer:
            return changed, printed
    return None


def _mistaken(line: str, mistake: str, source: random.Random) -> str:
    """The assignment with one of its numbers or operators replaced; unchanged where it has none."""
    tree = ast.parse(line)
    kind = ast.Constant if mistake == "number" else ast.BinOp
    found = [node for node in ast.walk(tree) if isinstance(node, kind)]
    if not found:
        return line
    node = source.choice(found)
    if mistake == "number":
        near = [node.value + shift for shift in (-2, -1, 1, 2) if node.value + shift >= 0]
        node.value = source.choice([*near, source.randint(1, LARGEST)])
    else:
        others = [operator for operator in OPERATORS if not isinstance(node.op, operator)]
        node.op = source.choice(others)()
    return ast.unparse(tree).replace(" ", "")


def _run(lines: list[str]) -> str | None:
    """What the program prints: one name, or two with a slash between; None for a division by zero."""
    values: dict[str, int] = {}
    try:
        for line in lines[:-1]:
            assigned = ast.parse(line).body[0]
            values[assigned.targets[0].id] = _value(assigned.value, values)
    except ZeroDivisionError:
        return None
    shown = ast.parse(lines[-1]).body[0].value.args
    return "/".join(str(values[name.id]) for name in shown)


def _value(tree: ast.expr, values: dict[str, int]) -> int:
    if isinstance(tree, ast.BinOp):
        return OPERATORS[type(tree.op)](_value(tree.left, values), _value(tree.right, values))
    return values[tree.id] if isinstance(tree, ast.Name) else tree.value
