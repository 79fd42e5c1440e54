"""The trees answers are read into, and the cursor that reads them. Data and small steps only."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from smallmath_jax.verify.normalise import Token, Unreadable, canonical

DEPTH = 48  # nested groups
DIGITS = 1_000  # of one number
END = Token("end", "")

# Node kinds an arithmetic operator accepts; all others are structures (tuples, sets, relations, words ...).
SCALARS = frozenset(
    "num dec var const add neg mul div pow call opaque pm mp fact pct deg matrix series".split()
)


class Node(NamedTuple):
    """One node. `value` is a number, a name or whatever else the kind says; `args` are nodes."""

    kind: str
    args: tuple = ()
    value: Any = None


def children(node: Node) -> Iterator[Node]:
    """The nodes right below a node; the cells of a matrix, row by row."""
    for arg in node.args:
        if isinstance(arg, Node):
            yield arg
        else:
            yield from arg


class Survey(NamedTuple):
    """The free variables of a tree, and its traits: kinds of nodes, names of functions, "bare log"."""

    names: set[str]
    traits: set[str]


def survey(node: Node) -> Survey:
    """One walk over a tree."""
    names: set[str] = set()
    traits: set[str] = set()
    bound: set[str] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        kind = node.kind
        if kind == "var":
            names.add(node.value)
            continue
        traits.add(kind)
        if kind == "call":
            traits.add("bare log" if node.value == "log" and len(node.args) == 1 else node.value)
        elif kind == "series":
            bound.add(node.value[1])
        waiting.extend(children(node))
    return Survey(names - bound, traits)


def free_variables(node: Node) -> set[str]:
    """Names of the variables a tree contains."""
    return survey(node).names


_PADDING = (END,) * 8  # so that looking ahead needs no check


class Reader:
    """A cursor over tokens.

    The readers of larger things come in as callables: `group` reads what a bracket opens, `listing` a whole answer,
    `words` makes a node of tokens that are no mathematics.
    """

    def __init__(
        self,
        tokens: Sequence[Token],
        group: Callable[["Reader", str], Node],
        listing: Callable[["Reader"], Node],
        words: Callable[[Sequence[Token]], Node],
    ) -> None:
        self.tokens = [*tokens, *_PADDING]
        self.size = len(tokens)
        self.named = any(token.text in ("=", ":") for token in tokens)
        self.index = 0
        self.depth = 0
        self.bars = 0  # open | | pairs
        self.group = group
        self.listing = listing
        self.words = words

    def peek(self, ahead: int = 0) -> Token:
        return self.tokens[self.index + ahead]

    def take(self, *texts: str) -> bool:
        """Moves over the next token if it is an operator with one of these texts."""
        token = self.tokens[self.index]
        if token.kind == "op" and token.text in texts:
            self.index += 1
            return True
        return False

    def need(self, text: str) -> None:
        if not self.take(text):
            raise Unreadable(f"expected {text!r}, found {self.peek().text!r}")


def scalar(node: Node) -> Node:
    """The node, if arithmetic can be done with it."""
    if node.kind not in SCALARS:
        raise Unreadable(f"a {node.kind} inside an expression")
    return node


def number(value: Any) -> Node:
    return Node("num", (), Fraction(value))


def numeral(text: str) -> Node:
    """A number's node: exact, and for decimals with the count of significant digits."""
    mantissa = text.lower().partition("e")[0]
    if len(mantissa) > DIGITS:
        raise Unreadable(f"a number of more than {DIGITS} digits")
    if "/" in text:
        return number(text)
    if "e" in text.lower() and abs(int(text.lower().partition("e")[2])) > DIGITS:
        raise Unreadable("a decimal exponent beyond 1000")
    if "." not in text and "e" not in text.lower():
        return Node("num", (), Fraction(int(text)))
    digits = len(mantissa.replace(".", "").lstrip("0"))
    return Node("dec", (), (Fraction(text), digits))


def subscript(reader: Reader) -> str:
    """The text of a subscript, a group or one token."""
    if reader.peek().text != "{":
        token = reader.peek()
        if token.kind == "end":
            raise Unreadable("a subscript is missing")
        reader.index += 1
        return token.text
    inside = group_tokens(reader)
    return canonical(inside)


def group_tokens(reader: Reader) -> list[Token]:
    """The tokens of a {..} group; moves past it."""
    start, depth = reader.index, 0
    while True:
        token = reader.peek()
        if token.kind == "end":
            raise Unreadable("a brace is not closed")
        depth += {"{": 1, "}": -1}.get(token.text, 0) if token.kind == "op" else 0
        reader.index += 1
        if depth == 0:
            return reader.tokens[start + 1 : reader.index - 1]


def opaque_text(reader: Reader, start: int) -> Node:
    """What is called but not understood, as one variable named by its own text: moves past the bracket."""
    depth = 0
    while True:
        token = reader.peek()
        if token.kind == "end":
            raise Unreadable("a bracket is not closed")
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        reader.index += 1
        if depth == 0 and token.text == ")":
            return Node("var", (), canonical(reader.tokens[start : reader.index]))
