"""Holds the package to its size limits: files <= 550 lines (450 is the aim), functions <= 80, nesting <= 5."""

import ast
import pathlib
import sys

FILE_LINES, FUNCTION_LINES, NESTING = 550, 80, 5
BLOCKS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def depth(node: ast.AST, level: int = 0) -> int:
    """Deepest nesting of blocks below a function; an elif does not nest."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        inner = level
        if isinstance(child, BLOCKS):
            chained = (
                isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            )
            inner = level if chained else level + 1
        deepest = max(deepest, depth(child, inner))
    return deepest


def complaints(path: pathlib.Path) -> list[str]:
    text = path.read_text()
    found = []
    if text.count("\n") > FILE_LINES:
        found.append(f"{path}: {text.count(chr(10))} lines, at most {FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(
                    f"{path}:{node.lineno} {node.name}: {lines} lines, at most {FUNCTION_LINES}"
                )
            if depth(node) > NESTING:
                found.append(
                    f"{path}:{node.lineno} {node.name}: nested {depth(node)} deep, at most {NESTING}"
                )
    return found


if __name__ == "__main__":
    everything = [
        line
        for path in sorted(pathlib.Path("smallmath_jax").rglob("*.py"))
        for line in complaints(path)
    ]
    print("\n".join(everything) or "sizes: fine")
    sys.exit(bool(everything))
