r"""Tokens to expression trees: a bounded recursive-descent reader of LaTeX and plain mathematics.

Nothing is evaluated here and no name is looked up in Python. What the grammar does not cover raises `Unreadable`.
Depth is limited, and the number of tokens before that, so time is linear in practice and recursion cannot run away.
"""

from collections.abc import Callable

from smallmath_jax.verify.normalise import Token, Unreadable, canonical
from smallmath_jax.verify.spelling import NUMBER_WORDS, WORDS
from smallmath_jax.verify.trees import (
    DEPTH,
    END,
    SCALARS,
    Node,
    Reader,
    group_tokens,
    number,
    numeral,
    opaque_text,
    scalar,
    subscript,
)
from smallmath_jax.verify.units import UNITS


def expression(reader: Reader) -> Node:
    """Sum := term ((+ | - | \\pm | \\mp) term)*, with a leading sign allowed."""
    reader.depth += 1
    if reader.depth > DEPTH:
        raise Unreadable(f"nested more than {DEPTH} deep")
    node = _signed_term(reader)
    parts = [node]
    while reader.peek().kind == "op" and reader.peek().text in ("+", "-", "pm", "mp"):
        sign = reader.peek().text
        reader.index += 1
        right = scalar(_signed_term(reader) if reader.peek().text in "+-" else _term(reader))
        scalar(parts[-1])
        if sign in ("pm", "mp"):
            parts = [Node(sign, (_sum(parts), right))]
        else:
            parts.append(Node("neg", (right,)) if sign == "-" else right)
    reader.depth -= 1
    return _sum(parts)


def _sum(parts: list[Node]) -> Node:
    return parts[0] if len(parts) == 1 else Node("add", tuple(parts))


def _signed_term(reader: Reader) -> Node:
    token = reader.peek()
    if token.kind == "op" and token.text in ("-", "+", "pm", "mp"):
        reader.index += 1
        node = _signed_term(reader) if reader.peek().text in ("-", "+") else _term(reader)
        if node.kind == "based" and token.text == "-":
            return node._replace(value=("-" + node.value[0], node.value[1]))
        scalar(node)
        if token.text == "-":
            return Node("neg", (node,))
        return node if token.text == "+" else Node(token.text, (number(0), node))
    return _term(reader)


def _term(reader: Reader) -> Node:
    """Product := factor ((* | / | nothing) factor)*; what stands side by side is multiplied."""
    first = _mixed(reader, _factor(reader))
    if not _continues(reader, first):
        return first
    factors = [scalar(first)]
    while _continues(reader, factors[-1]):
        token = reader.peek()
        if token.kind == "op" and token.text in ("*", "/"):
            reader.index += 1
            right = scalar(_signed_factor(reader))
            factors = (
                [Node("div", (_product(factors), right))]
                if token.text == "/"
                else [*factors, right]
            )
            continue
        if token.kind == "let" and token.text in "xX" and _is_times(reader):
            reader.index += 1
        factors.append(scalar(_factor(reader)))
    return _product(factors)


def _product(factors: list[Node]) -> Node:
    return factors[0] if len(factors) == 1 else Node("mul", tuple(factors))


def _continues(reader: Reader, last: Node) -> bool:
    """Whether the product goes on after its last factor."""
    token = reader.peek()
    if token.kind == "op" and token.text in ("*", "/"):
        return True
    if token.kind == "num" and reader.tokens[reader.index - 1].kind == "num":
        return False
    return last.kind in SCALARS and starts_factor(reader)


def _is_times(reader: Reader) -> bool:
    """Whether a letter x between two numbers is a multiplication sign: `3 x 10^5`."""
    before = reader.tokens[reader.index - 1]
    return before.kind == "num" and reader.peek(1).kind == "num"


def _signed_factor(reader: Reader) -> Node:
    if reader.take("-"):
        return Node("neg", (scalar(_signed_factor(reader)),))
    reader.take("+")
    return _factor(reader)


def starts_factor(reader: Reader) -> bool:
    """Whether the next token can begin a factor."""
    token = reader.peek()
    if token.kind in ("num", "let", "fn"):
        return True
    if token.kind == "word":
        return len(token.text) == 1 and _letter_word(reader)
    if token.kind != "op":
        return False
    if token.text in ("|", "mid", "norm"):
        return reader.bars == 0 and _closing_bar(reader, token.text)
    return token.text in _OPENERS


def _letter_word(reader: Reader) -> bool:
    """A single letter of \\mathrm or \\text after an operator is a variable; after a number it is a unit."""
    before = reader.tokens[reader.index - 1] if reader.index else END
    return reader.peek().text in "ei" or (before.kind in ("let", "word") and before.text != "pi")


def _closing_bar(reader: Reader, bar: str) -> bool:
    return any(token.text == bar for token in reader.tokens[reader.index + 1 :])


def _mixed(reader: Reader, node: Node) -> Node:
    """`1\\frac{4}{5}` and `1 1/2`: a whole number followed by a proper fraction is their sum."""
    if node.kind != "num" or node.value.denominator != 1 or reader.peek().kind == "end":
        return node
    if reader.tokens[reader.index - 1].kind != "num":
        return node
    start = reader.index
    if reader.peek().text == "frac":
        fraction = _factor(reader)
        if fraction.kind == "div" and all(part.kind == "num" for part in fraction.args):
            top, bottom = (part.value for part in fraction.args)
            if top.denominator == bottom.denominator == 1 and 0 < top < bottom:
                return Node("add", (node, fraction))
        reader.index = start
        return node
    if reader.peek().kind == "num":
        top, slash, bottom = reader.peek(), reader.peek(1), reader.peek(2)
        whole = top.text.isdigit() and bottom.text.isdigit() and slash.text == "/"
        if not (whole and 0 < int(top.text) < int(bottom.text)):
            raise Unreadable("two numbers side by side")
        reader.index += 3
        return Node("add", (node, Node("div", (number(int(top.text)), number(int(bottom.text))))))
    return node


def _factor(reader: Reader) -> Node:
    """Primary with what follows it: powers, factorials, percent and degree signs."""
    node = _primary(reader)
    while True:
        token = reader.peek()
        if token.kind != "op":
            return node
        if token.text == "^":
            reader.index += 1
            node = Node("pow", (scalar(node), _exponent(reader)))
        elif token.text == "!":
            reader.index += 1
            double = reader.take("!")
            node = Node("fact", (scalar(node),), 2 if double else 1)
        elif token.text == "%":
            reader.index += 1
            node = Node("pct", (scalar(node),))
        elif token.text == "deg" or (token.text == "{" and reader.peek(1).text == "deg"):
            node = _degrees(reader, scalar(node))
        elif token.text == "_" and node.kind in ("num", "dec"):
            return _based(reader)
        elif node.kind in ("var", "const") and (token.text == "_" or token.text.startswith("'")):
            reader.index += 1
            mark = "_" + subscript(reader) if token.text == "_" else token.text
            node = Node("var", (), node.value + mark)
        else:
            return node


def _degrees(reader: Reader, node: Node) -> Node:
    """An angle, with its minutes and seconds where they follow."""
    braced = reader.take("{")
    reader.need("deg")
    if braced:
        reader.need("}")
    for mark, share in (("'", 60), ("''", 3600)):
        if reader.peek().kind == "num" and reader.peek(1).text == mark:
            node = Node("add", (node, Node("div", (numeral(reader.peek().text), number(share)))))
            reader.index += 2
    return Node("deg", (node,))


def _exponent(reader: Reader) -> Node:
    """What follows ^: a group, a whole number (`x^10` is meant, not x^1 0), a sign and one factor."""
    if reader.take("-"):
        return Node("neg", (_exponent(reader),))
    reader.take("+")
    node = scalar(_primary(reader))
    if reader.take("^"):
        return Node("pow", (node, _exponent(reader)))
    return node


def _based(reader: Reader) -> Node:
    """`204_5`: digits and base, kept apart from every ordinary number."""
    digits = reader.tokens[reader.index - 1].text
    reader.need("_")
    base = subscript(reader)
    base = NUMBER_WORDS.get(base.lower(), base)
    if not (base.isdigit() and 2 <= int(base[:3]) <= 36):
        raise Unreadable("a number with a subscript that is no base")
    return Node("based", (), (digits.lstrip("0"), int(base)))


def _primary(reader: Reader) -> Node:
    token = reader.peek()
    if token.kind == "num":
        reader.index += 1
        return numeral(token.text)
    if token.kind == "let" or (token.kind == "word" and len(token.text) == 1):
        return _variable(reader)
    if token.kind == "fn":
        return _function(reader)
    if token.kind == "op" and token.text in _OPENERS:
        return _OPENERS[token.text](reader)
    if token.kind == "word":
        return _named_call(reader)
    raise Unreadable(f"unexpected {token.text or 'end'!r}")


_CONSTANTS = {"pi": "pi", "e": "e", "i": "i"}
_OPAQUE = ("f", "g", "F", "G")  # letters that name functions when a bracket follows


def _variable(reader: Reader) -> Node:
    """A letter with its subscripts and primes; f(..) and g(..) are unknown functions, e, i and pi constants."""
    start = reader.index
    name = reader.peek().text
    reader.index += 1
    if name == "C" and (chosen := _combination(reader)):
        return chosen
    if reader.take("_"):
        name += "_" + subscript(reader)
    if _inverse_applied(reader):  # f^{-1}(x)
        name += "^-1"
        reader.index += 5 if reader.peek(1).text == "{" else 3
    while reader.peek().kind == "op" and reader.peek().text.startswith("'"):
        name += reader.peek().text
        reader.index += 1
    if reader.peek().text == "^" and reader.peek(1).text == "*":
        reader.index += 2
        name += "*"
    if reader.peek().text == "(" and name.rstrip("'") in _OPAQUE:
        inside = reader.group(reader, "(")
        args = inside.args if inside.kind == "tuple" else (inside,)
        return Node("opaque", tuple(scalar(arg) for arg in args), name)
    if _applied(reader, name):
        reader.index += 3
        return Node("opaque", (Node("var", (), reader.tokens[reader.index - 2].text),), name)
    if reader.peek().text == "(" and _holds_relation(reader):
        return opaque_text(reader, start)
    return Node("const", (), name) if name in _CONSTANTS else Node("var", (), name)


def _applied(reader: Reader, name: str) -> bool:
    """`P(X)`, `y(t)`: one letter in brackets after another letter is an argument."""
    inner = reader.peek(1)
    if reader.peek().text != "(" or inner.kind != "let" or reader.peek(2).text != ")":
        return False
    return (
        inner.text not in _CONSTANTS
        and name not in ("x", "X", inner.text)
        and name not in _CONSTANTS
    )


def _inverse_applied(reader: Reader) -> bool:
    texts = [reader.peek(ahead).text for ahead in range(8)]
    if texts[:5] == ["^", "{", "-", "1", "}"]:
        return texts[5] == "(" and texts[7] == ")" and reader.peek(6).kind == "let"
    return texts[:4] == ["^", "-", "1", "("] and texts[5] == ")" and reader.peek(4).kind == "let"


def _combination(reader: Reader) -> Node | None:
    """`C_{400}^{40}` with numbers in both places: a binomial coefficient."""
    start = reader.index
    found = {}
    for _ in range(2):
        mark = reader.peek().text
        if mark not in ("_", "^") or mark in found:
            break
        reader.index += 1
        found[mark] = subscript(reader)
    if set(found) == {"_", "^"} and all(
        text.isdigit() and len(text) < 7 for text in found.values()
    ):
        top, bottom = (number(int(found[mark])) for mark in "_^")
        return Node("call", (top, bottom), "binom")
    reader.index = start
    return None


def _holds_relation(reader: Reader) -> bool:
    """Whether the bracket that opens here holds a relation or a list: P(X = 4), Cov(Z, W)."""
    depth = 0
    for token in reader.tokens[reader.index :]:
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        if token.text in ("=", "<", ">", "<=", ">=", ",", "mid", "{{"):
            return True
        if depth == 0:
            return False
    return False


def _named_call(reader: Reader) -> Node:
    """A word before a bracket names a quantity: Area(ABC), \\operatorname{Cov}(Z, W)."""
    if reader.peek(1).text == "(":
        start = reader.index
        reader.index += 1
        return opaque_text(reader, start)
    word = reader.peek().text
    if len(word) == 2 and reader.size > 1 and word.lower() not in WORDS and word not in UNITS:
        reader.index += 1  # \\mathrm{ab}: two variables
        return Node("mul", tuple(Node("var", (), letter) for letter in word))
    raise Unreadable(f"the word {word!r}")


def argument(reader: Reader, digits: bool = False) -> Node:
    """A command's argument: a group, or what follows; with `digits` one digit of a number (`\\frac12`)."""
    token = reader.peek()
    if token.kind == "num" and digits and len(token.text) > 1 and token.text.isdigit():
        reader.tokens = list(reader.tokens)  # the number is split; other readings keep theirs
        reader.tokens[reader.index : reader.index + 1] = [
            Token("num", token.text[0], token.gap),
            Token("num", token.text[1:]),
        ]
    if reader.peek().text == "-":
        return _signed_factor(reader)
    return scalar(_primary(reader))


def _fraction(reader: Reader) -> Node:
    reader.index += 1
    top = argument(reader, digits=True)
    return Node("div", (top, argument(reader, digits=True)))


def _binomial(reader: Reader) -> Node:
    reader.index += 1
    top = argument(reader, digits=True)
    return Node("call", (top, argument(reader, digits=True)), "binom")


def _root(reader: Reader) -> Node:
    reader.index += 1
    index = number(2)
    if reader.take("["):
        index = scalar(expression(reader))
        reader.need("]")
    return Node("call", (argument(reader), index), "root")


def _accented(reader: Reader) -> Node:
    """A bar, hat, tilde or dot: part of a variable's name, a conjugate over anything longer."""
    accent = reader.peek().text
    start = reader.index
    reader.index += 1
    inner = argument(reader)
    if inner.kind in ("var", "const") or accent != "overline":
        name = canonical(reader.tokens[start : reader.index]).replace("{", "").replace("}", "")
        if reader.take("_"):
            name += "_" + subscript(reader)
        return Node("var", (), name)
    return Node("opaque", (inner,), accent)


def _braces(reader: Reader) -> Node:
    return reader.group(reader, "{")


def _bracketed(reader: Reader) -> Node:
    return reader.group(reader, reader.peek().text)


def _absolute(reader: Reader) -> Node:
    closing = {"|": "|", "mid": "mid", "lvert": "rvert", "lVert": "rVert", "norm": "norm"}[
        reader.peek().text
    ]
    reader.index += 1
    reader.bars += 1
    inner = scalar(expression(reader))
    reader.need(closing)
    reader.bars -= 1
    return Node("call", (inner,), "abs")


def _rounded(reader: Reader) -> Node:
    name = {"lfloor": "floor", "lceil": "ceil"}[reader.peek().text]
    reader.index += 1
    inner = scalar(expression(reader))
    reader.need("rfloor" if name == "floor" else "rceil")
    return Node("call", (inner,), name)


def _infinite(reader: Reader) -> Node:
    reader.index += 1
    return Node("const", (), "inf")


def _function(reader: Reader) -> Node:
    """A function with power, base and argument in any usual arrangement: \\sin^2 x, \\log_2(3), \\sin^{-1} x."""
    name = reader.peek().text
    reader.index += 1
    power = base = None
    for _ in range(2):
        if reader.take("^"):
            power = _exponent(reader)
        elif reader.take("_"):
            base = argument(reader, digits=False)
    node = Node("call", (_function_argument(reader, name),), name)
    if name in ("max", "min", "gcd", "lcm", "binom") and node.args[0].kind in ("tuple", "list"):
        node = Node("call", tuple(scalar(arg) for arg in node.args[0].args), name)
    else:
        scalar(node.args[0])
    if base is not None:
        if name != "log":
            raise Unreadable(f"a subscript on {name}")
        node = Node("call", (*node.args, base), "log")
    if power == Node("neg", (number(1),)) and name in INVERSE:
        return Node("call", node.args, INVERSE[name])
    return node if power is None else Node("pow", (node, power))


INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan", "cot": "arccot", "sec": "arcsec", "csc": "arccsc",
           "sinh": "arcsinh", "cosh": "arccosh", "tanh": "arctanh"}  # fmt: skip


def _function_argument(reader: Reader, name: str) -> Node:
    """A bracket, or the factors that follow up to the next function, bracket, operator or slash."""
    if reader.peek().text in ("(", "[", "{"):
        return _primary(reader)
    if reader.peek().kind == "fn":
        return _function(reader)
    node = scalar(_signed_factor(reader))
    while starts_factor(reader):
        token = reader.peek()
        exponential = token.text == "e" and reader.peek(1).text == "^"
        if token.kind == "fn" or token.text in ("(", "[") or token.kind == "num" or exponential:
            break
        node = Node("mul", (node, scalar(_factor(reader))))
    return node


def _environment(reader: Reader) -> Node:
    return reader.group(reader, "beg")


def _blackboard(reader: Reader) -> Node:
    """\\mathbb{R} and its like: a set with a name."""
    reader.index += 1
    token = reader.peek()
    name = canonical(group_tokens(reader)) if token.text == "{" else token.text
    reader.index += 0 if token.text == "{" else 1
    return Node("named_set", (), name)


def _dots(reader: Reader) -> Node:
    """An ellipsis: whatever it stands for, the same in both answers."""
    reader.index += 1
    return Node("var", (), "...")


def _figure(reader: Reader) -> Node:
    """\\angle ABC, \\triangle ABC: a name."""
    start = reader.index
    reader.index += 1
    while reader.peek().kind in ("let", "word"):
        reader.index += 1
        if reader.take("_"):
            subscript(reader)
    return Node("var", (), canonical(reader.tokens[start : reader.index]))


def _series(reader: Reader) -> Node:
    """\\sum_{k=a}^{b} body: args (body, a, b), value (sum or prod, k)."""
    name = reader.peek().text
    reader.index += 1
    reader.need("_")
    if reader.peek().text != "{" or reader.peek(2).text != "=":
        raise Unreadable("a sum without an index")
    index = reader.peek(1).text
    reader.index += 3
    low = scalar(expression(reader))
    reader.need("}")
    reader.need("^")
    high = _exponent(reader)
    return Node("series", (scalar(_term(reader)), low, high), (name, index))


def _empty(reader: Reader) -> Node:
    reader.index += 1
    return Node("set")


_OPENERS: dict[str, Callable[[Reader], Node]] = {
    "(": _bracketed, "[": _bracketed, "{": _braces, "{{": _bracketed, "langle": _bracketed, "frac": _fraction,
    "binom": _binomial, "sqrt": _root, "overline": _accented, "hat": _accented, "tilde": _accented, "dot": _accented,
    "|": _absolute, "lvert": _absolute, "lVert": _absolute, "norm": _absolute, "lfloor": _rounded, "lceil": _rounded,
    "mid": _absolute, "angle": _figure, "triangle": _figure, "...": _dots, "sum": _series, "prod": _series,
    "infty": _infinite, "mathbb": _blackboard, "emptyset": _empty,
    **{f"beg:{name}": _environment for name in ("pmatrix", "bmatrix", "matrix", "vmatrix", "Bmatrix", "smallmatrix",
                                               "array", "cases")},
}  # fmt: skip
