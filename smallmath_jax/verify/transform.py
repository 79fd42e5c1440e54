"""Rewriting trees before they are compared: matrices multiplied out, plus-minus signs written out."""

import functools
import itertools

from smallmath_jax.verify.evaluate import Undecided
from smallmath_jax.verify.trees import Node, children

CHOICES = 6  # independent plus-minus signs in one expression, at most


def fold_matrices(node: Node) -> Node:
    """Scalar multiples, sums and products of matrices as one matrix, entry by entry."""
    if node.kind not in ("mul", "div", "add", "neg") or not _has_matrix(node):
        return node
    args = tuple(fold_matrices(arg) for arg in node.args)
    kinds = [arg.kind == "matrix" for arg in args]
    if node.kind == "neg" and kinds[0]:
        return _each(args[0], lambda entry: Node("neg", (entry,)))
    if node.kind == "div" and kinds == [True, False]:
        return _each(args[0], lambda entry: Node("div", (entry, args[1])))
    if node.kind == "mul" and any(kinds):
        return functools.reduce(_product, args)
    if node.kind == "add" and all(kinds):
        return functools.reduce(_matrix_sum, args)
    raise Undecided(f"{node.kind} of a matrix and something else")


def _has_matrix(node: Node) -> bool:
    return node.kind == "matrix" or any(_has_matrix(child) for child in children(node))


def _each(matrix: Node, change) -> Node:
    return Node("matrix", tuple(tuple(change(entry) for entry in row) for row in matrix.args))


def _product(first: Node, second: Node) -> Node:
    if second.kind != "matrix":
        first, second = second, first
    if first.kind != "matrix" and second.kind != "matrix":
        return Node("mul", (first, second))
    if first.kind != "matrix":
        return _each(second, lambda entry: Node("mul", (first, entry)))
    if any(len(row) != len(second.args) for row in first.args):
        raise Undecided("a product of matrices whose shapes do not fit")
    columns = list(zip(*second.args, strict=True))
    return Node(
        "matrix",
        tuple(
            tuple(
                Node("add", tuple(Node("mul", pair) for pair in zip(row, column, strict=True)))
                for column in columns
            )
            for row in first.args
        ),
    )


def _matrix_sum(first: Node, second: Node) -> Node:
    if [len(row) for row in first.args] != [len(row) for row in second.args]:
        raise Undecided("a sum of matrices whose shapes differ")
    return Node(
        "matrix",
        tuple(
            tuple(Node("add", pair) for pair in zip(*rows, strict=True))
            for rows in zip(first.args, second.args, strict=True)
        ),
    )


def has_signs(node: Node) -> bool:
    """Whether a tree contains \\pm or \\mp."""
    if node.kind in ("pm", "mp"):
        return True
    return any(has_signs(child) for child in children(node))


def expand_signs(node: Node) -> list[list[Node]]:
    """Readings of \\pm: signs that go together (two values), and signs chosen freely, where there are several."""
    count = _count_signs(node)
    if count > CHOICES:
        raise Undecided(f"more than {CHOICES} plus-minus signs")
    together = [_choose(node, itertools.repeat(sign)) for sign in (1, -1)]
    if count < 2:
        return [together]
    free = [_choose(node, iter(signs)) for signs in itertools.product((1, -1), repeat=count)]
    return [together, free]


def _count_signs(node: Node) -> int:
    here = node.kind in ("pm", "mp")
    return here + sum(_count_signs(child) for child in children(node))


def _choose(node: Node, signs) -> Node:
    """The tree with each \\pm replaced by the next sign, each \\mp by its opposite."""
    if not node.args or not isinstance(node.args[0], Node):
        return node
    if node.kind not in ("pm", "mp"):
        return Node(node.kind, tuple(_choose(arg, signs) for arg in node.args), node.value)
    sign = next(signs) * (1 if node.kind == "pm" else -1)
    left, right = (_choose(arg, signs) for arg in node.args)
    return Node("add", (left, right if sign > 0 else Node("neg", (right,))))
