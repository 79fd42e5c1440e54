"""Whether two answers are equal: structure first, then values.

Lists and sets are unordered, tuples ordered and sensitive to their brackets, relations compared up to a constant
factor and a swap of sides. All functions take (gold, answer) in this order and may raise `Undecided`.
"""

import itertools
from collections.abc import Callable
from fractions import Fraction

from smallmath_jax.verify import regions, units
from smallmath_jax.verify.evaluate import Undecided
from smallmath_jax.verify.policy import Policy
from smallmath_jax.verify.transform import expand_signs, fold_matrices, has_signs
from smallmath_jax.verify.trees import SCALARS, Node, free_variables, number, survey
from smallmath_jax.verify.values import constant, proportional, same_value

ITEMS = 60  # of an unordered list
_FLIPPED = {">": "<", ">=": "<="}


def equal(gold: Node, answer: Node, policy: Policy) -> bool:
    """Whether an answer equals the gold answer under a policy."""
    if gold == answer:
        return True
    gold_name, gold_value = split_name(gold)
    name, value = split_name(answer)
    if gold_name is not None and name is not None:
        if _same_name(gold_name, name):
            return _equal_values(gold_value, value, policy)
        return _equal_relations(gold, answer, policy)
    if (gold_name is None) != (name is None):
        if policy.named_value and _equal_values(gold_value, value, policy):
            return True
        return _equal_values(gold, answer, policy)
    return _equal_values(gold, answer, policy)


def split_name(node: Node) -> tuple[Node | None, Node]:
    """(x, 5) of `x = 5`; (x, the list) of `x = 1, x = 2`; (x, a chain) of `x = 6/2 = 3`; else (None, node)."""
    if node.kind == "list" and len(node.args) > 1:
        pairs = [split_name(item) for item in node.args]
        if pairs[0][0] is not None and all(name == pairs[0][0] for name, _ in pairs):
            return pairs[0][0], Node("list", tuple(value for _, value in pairs), node.value)
        return None, node
    if node.kind != "relation" or set(node.value) - {"=", "~", "in"}:
        return None, node
    sides = node.args
    if node.value == ("=",) and not _is_name(sides[0], sides[1]) and _is_name(sides[1], sides[0]):
        sides = sides[::-1]
    if not _is_name(sides[0], *sides[1:]):
        return None, node
    rest = sides[1] if len(sides) == 2 else Node("relation", sides[1:], node.value[1:])
    return sides[0], rest


def _is_name(side: Node, *others: Node) -> bool:
    """A variable (or a tuple of them) that the other sides do not contain."""
    if side.kind == "tuple":
        return all(part.kind == "var" for part in side.args) and not any(
            free_variables(other) & free_variables(side) for other in others
        )
    if side.kind == "div" and _differential(side):
        return True
    if side.kind == "opaque" and all(arg.kind == "var" for arg in side.args):  # f(x) = ...
        return not any("opaque" in survey(other).traits for other in others)
    return side.kind == "var" and not any(side.value in free_variables(other) for other in others)


def _differential(side: Node) -> bool:
    """`\\frac{dy}{dx}`, which reads as a quotient of products."""
    letters = [sorted(free_variables(part)) for part in side.args]
    return all(len(names) == 2 and "d" in names for names in letters)


def _same_name(first: Node, second: Node) -> bool:
    if first == second:
        return True
    functions = [node for node in (first, second) if node.kind == "opaque"]
    names = [node for node in (first, second) if node.kind == "var"]
    if len(functions) != 1 or len(names) != 1:
        return False
    return names[0].value in ("y", functions[0].value)  # y = .. is f(x) = .., and y(t) = ..


def _equal_values(gold: Node, answer: Node, policy: Policy) -> bool:
    gold, answer = fold_matrices(gold), fold_matrices(answer)
    if gold.kind == "both" or answer.kind == "both":
        return _equal_both(gold, answer, policy)
    if "quantity" in (gold.kind, answer.kind):
        return _equal_quantities(gold, answer, policy)
    if _is_chain(gold) or _is_chain(answer):
        return _equal_chains(gold, answer, policy)
    if gold.kind in SCALARS and answer.kind in SCALARS and "matrix" not in (gold.kind, answer.kind):
        return _equal_scalars(gold, answer, policy)
    handler = _BY_KIND.get(frozenset((gold.kind, answer.kind)))
    if handler is not None and handler(gold, answer, policy):
        return True
    if gold.kind in ("list", "set") or answer.kind in ("list", "set"):
        if _equal_collections(gold, answer, policy):
            return True
    return regions.equal_regions(gold, answer, policy)


def _equal_scalars(gold: Node, answer: Node, policy: Policy) -> bool:
    if not (has_signs(gold) or has_signs(answer)):
        return same_value(gold, answer, policy)
    for golds, answers in itertools.product(expand_signs(gold), expand_signs(answer)):
        if _match(golds, answers, policy):
            return True
    return False


def _equal_both(gold: Node, answer: Node, policy: Policy) -> bool:
    """A gold that says the same twice accepts either; whoever says both must be right in both."""
    if gold.kind == answer.kind:
        return all(equal(g, a, policy) for g, a in zip(gold.args, answer.args, strict=True))
    if gold.kind == "both":
        return any(equal(part, answer, policy) for part in gold.args)
    return all(equal(gold, part, policy) for part in answer.args)


def _equal_quantities(gold: Node, answer: Node, policy: Policy) -> bool:
    """Values with units: where both units are known they must measure the same kind of thing."""
    gold, answer = _with_unit(gold, answer), _with_unit(answer, gold)
    values = [node.args[0] if node.kind == "quantity" else node for node in (gold, answer)]
    if gold.kind == answer.kind and policy.match_units:
        first, second = gold.value, answer.value
        if first.known and second.known:
            if first.powers != second.powers:
                return False
            scale = Fraction(second.scale) / first.scale
            if scale != 1:
                values[1] = Node("mul", (values[1], number(scale)))
    return _equal_values(values[0], values[1], policy)


def _with_unit(node: Node, other: Node) -> Node:
    """`5 m` beside `5 metres`: the letter that ends a product is the unit the other side has."""
    if other.kind != "quantity" or node.kind != "mul" or node.args[-1].kind != "var":
        return node
    unit = units.UNITS.get(node.args[-1].value)
    if unit is None or unit.powers != other.value.powers:
        return node
    rest = node.args[:-1]
    return Node("quantity", (rest[0] if len(rest) == 1 else Node("mul", rest),), unit)


def _is_chain(node: Node) -> bool:
    """`a = b = c`, or an identity between constants (`log_2 32 = 5`): several ways to say one value."""
    if node.kind != "relation" or set(node.value) - {"=", "~"}:
        return False
    if any(side.kind not in SCALARS and side.kind != "quantity" for side in node.args):
        return False
    return len(node.args) > 2 or not any(free_variables(side) for side in node.args)


def _equal_chains(gold: Node, answer: Node, policy: Policy) -> bool:
    if gold.kind == answer.kind == "relation":
        if len(gold.args) == len(answer.args):
            return all(equal(g, a, policy) for g, a in zip(gold.args, answer.args, strict=True))
        return _consistent(answer, policy) and equal(gold.args[-1], answer.args[-1], policy)
    if _is_chain(gold):
        return any(_equal_values(side, answer, policy) for side in gold.args)
    return _consistent(answer, policy) and _equal_values(gold, answer.args[-1], policy)


def _consistent(chain: Node, policy: Policy) -> bool:
    """Whether what a chain says is true: all sides joined by = are equal."""
    pairs = zip(chain.value, itertools.pairwise(chain.args), strict=True)
    return all(sign != "=" or _equal_values(*sides, policy) for sign, sides in pairs)


def _items(node: Node) -> list[Node]:
    """Elements of a list or set, with \\pm written out; duplicates of a set go."""
    items: list[Node] = []
    for item in node.args if node.kind in ("list", "set") else (node,):
        items += expand_signs(item)[0] if has_signs(item) else [item]
    return items


def _equal_collections(gold: Node, answer: Node, policy: Policy) -> bool:
    tuples = "tuple" in (gold.kind, answer.kind)
    if tuples and not policy.sets_as_tuples and not _one_tuple(gold, answer):
        return False
    if tuples and policy.sets_as_tuples and not _one_tuple(gold, answer):
        gold, answer = (Node("set", n.args) if n.kind == "tuple" else n for n in (gold, answer))
    for golds, answers in itertools.product(_readings(gold), _readings(answer)):
        if len(golds) == len(answers) == 1 and gold.kind == answer.kind:
            return equal(golds[0], answers[0], policy)
        alone = len(golds) == 1 and not policy.set_of_one and gold.kind != answer.kind
        if not alone and _match(golds, answers, policy):
            return True
    return False


def _one_tuple(gold: Node, answer: Node) -> bool:
    """Whether a tuple stands against a collection of a single tuple."""
    return any(
        node.kind in ("list", "set") and len(node.args) == 1 and node.args[0].kind == "tuple"
        for node in (gold, answer)
    )


def _readings(node: Node) -> list[list[Node]]:
    """The elements; where there are several \\pm, once with signs that go together and once with free ones."""
    items = node.args if node.kind in ("list", "set") else (node,)
    if not any(has_signs(item) for item in items):
        return [_distinct(list(items)) if node.kind == "set" else list(items)]
    readings = []
    for free in (0, -1):
        expanded: list[Node] = []
        for item in items:
            expanded += expand_signs(item)[free] if has_signs(item) else [item]
        readings.append(expanded)
    return readings


def _distinct(items: list[Node]) -> list[Node]:
    return list(dict.fromkeys(items))


def _match(golds: list[Node], answers: list[Node], policy: Policy) -> bool:
    """Whether the items pair off, in any order."""
    if len(golds) != len(answers) or len(golds) > ITEMS:
        return False
    return _pair_off(golds, answers, lambda gold, answer: equal(gold, answer, policy))


def _pair_off(golds: list, answers: list, same: Callable) -> bool:
    """Whether each gold item finds an answer of its own. One undecided pair does not hide another that is equal."""
    left = list(answers)
    for gold in golds:
        undecided = None
        for index, answer in enumerate(left):
            try:
                if same(gold, answer):
                    del left[index]
                    break
            except Undecided as error:
                undecided = error
        else:
            if undecided is not None:
                raise undecided
            return False
    return True


def _equal_tuples(gold: Node, answer: Node, policy: Policy) -> bool:
    if gold.value != answer.value or len(gold.args) != len(answer.args):
        return False
    return all(equal(g, a, policy) for g, a in zip(gold.args, answer.args, strict=True))


def _equal_tables(gold: Node, answer: Node, policy: Policy) -> bool:
    if gold.kind != answer.kind or [len(row) for row in gold.args] != [
        len(row) for row in answer.args
    ]:
        return False
    cells = zip(itertools.chain(*gold.args), itertools.chain(*answer.args), strict=True)
    return all(equal(g, a, policy) for g, a in cells)


def _vector_and_tuple(gold: Node, answer: Node, policy: Policy) -> bool:
    matrix, row = (gold, answer) if gold.kind == "matrix" else (answer, gold)
    if not policy.vector_as_tuple or row.value not in ("()", "[]"):
        return False
    if any(len(line) != 1 for line in matrix.args) or len(matrix.args) != len(row.args):
        return False
    entries = [line[0] for line in matrix.args]
    pairs = zip(entries, row.args, strict=True)
    return all(equal(*(pair if gold.kind == "matrix" else pair[::-1]), policy) for pair in pairs)


def _equal_relations(gold: Node, answer: Node, policy: Policy) -> bool:
    """Relations of any length as sets of pairwise ones, up to a constant factor, order and direction."""
    golds, answers = _pairwise(gold), _pairwise(answer)
    if len(golds) != len(answers):
        return False
    return _pair_off(golds, answers, lambda one, other: _equal_pair(one, other, policy))


Relation = tuple[str, Node, Node]


def _pairwise(node: Node) -> list[Relation]:
    """(operator, left, right) of each link, with > and >= turned round."""
    if node.kind == "list":
        return [pair for item in node.args if item.kind == "relation" for pair in _pairwise(item)]
    pairs = []
    for sign, (left, right) in zip(node.value, itertools.pairwise(node.args), strict=True):
        if sign in _FLIPPED:
            sign, left, right = _FLIPPED[sign], right, left
        pairs.append(("=" if sign == "~" else sign, left, right))
    return pairs


def _equal_pair(gold: Relation, answer: Relation, policy: Policy) -> bool:
    sign, *sides = gold
    other_sign, *others = answer
    if sign != other_sign:
        return False
    strip = [node.args[0] if node.kind == "quantity" else node for node in (*sides, *others)]
    if sign in ("=", "<", "<=", "!=") and all(node.kind in SCALARS for node in strip):
        varies = any(free_variables(node) for node in strip)
        if varies and all(node.kind != "matrix" and not has_signs(node) for node in strip):
            return proportional(
                _difference(*strip[:2]), _difference(*strip[2:]), sign in ("<", "<=")
            )
    if all(equal(g, a, policy) for g, a in zip(sides, others, strict=True)):
        return True
    if sign not in ("=", "!="):
        return False
    return all(equal(g, a, policy) for g, a in zip(sides, others[::-1], strict=True))


def _difference(left: Node, right: Node) -> Node:
    return Node("add", (left, Node("neg", (right,))))


def _equal_times(gold: Node, answer: Node, policy: Policy) -> bool:
    halves = {gold.value[2], answer.value[2]} - {""}
    return gold.value[:2] == answer.value[:2] and len(halves) < 2


def _time_and_ratio(gold: Node, answer: Node, policy: Policy) -> bool:
    """A clock time may have been meant as a ratio: `1:20` against `1:20.0` or `\\frac{1}{20}`."""
    time, other = (gold, answer) if gold.kind == "time" else (answer, gold)
    if time.value[2]:
        return False
    ratio = Node("ratio", (number(time.value[0]), number(time.value[1])))
    return _equal_ratios(ratio, other, policy) if other.kind == "ratio" else False


def _equal_ratios(gold: Node, answer: Node, policy: Policy) -> bool:
    if len(gold.args) != len(answer.args):
        return False
    crossed = zip(gold.args[1:], answer.args[1:], strict=True)
    return all(
        same_value(Node("mul", (g, answer.args[0])), Node("mul", (a, gold.args[0])), policy)
        for g, a in crossed
    )


def _ratio_and_scalar(gold: Node, answer: Node, policy: Policy) -> bool:
    ratio, scalar = (gold, answer) if gold.kind == "ratio" else (answer, gold)
    if not policy.ratio_as_fraction or len(ratio.args) != 2 or constant(scalar) is None:
        return False
    quotient = Node("div", ratio.args)
    return same_value(quotient, scalar, policy)


def _equal_based(gold: Node, answer: Node, policy: Policy) -> bool:
    return gold.value == answer.value


def _based_and_number(gold: Node, answer: Node, policy: Policy) -> bool:
    based, plain = (gold, answer) if gold.kind == "based" else (answer, gold)
    return policy.base_optional and plain.value == Fraction(int(based.value[0]))


def _equal_builders(gold: Node, answer: Node, policy: Policy) -> bool:
    if len(gold.args) != len(answer.args):
        return False
    return equal(gold.args[0], answer.args[0], policy) and _match(
        list(gold.args[1:]), list(answer.args[1:]), policy
    )


def _nested(gold: Node, answer: Node, policy: Policy) -> bool:
    """Unions, intersections and differences that are no plain regions: part by part."""
    if gold.kind != answer.kind or len(gold.args) != len(answer.args):
        return False
    if gold.kind == "minus":
        return all(equal(g, a, policy) for g, a in zip(gold.args, answer.args, strict=True))
    return _match(list(gold.args), list(answer.args), policy)


def _equal_families(gold: Node, answer: Node, policy: Policy) -> bool:
    return gold.value == answer.value and equal(gold.args[0], answer.args[0], policy)


_BY_KIND = {
    frozenset(("tuple",)): _equal_tuples,
    frozenset(("matrix",)): _equal_tables,
    frozenset(("cases",)): _equal_tables,
    frozenset(("determinant",)): _equal_tables,
    frozenset(("matrix", "tuple")): _vector_and_tuple,
    frozenset(("relation",)): _equal_relations,
    frozenset(("time",)): _equal_times,
    frozenset(("time", "ratio")): _time_and_ratio,
    frozenset(("ratio",)): _equal_ratios,
    frozenset(("ratio", "num")): _ratio_and_scalar,
    frozenset(("ratio", "div")): _ratio_and_scalar,
    frozenset(("ratio", "dec")): _ratio_and_scalar,
    frozenset(("based",)): _equal_based,
    frozenset(("based", "num")): _based_and_number,
    frozenset(("builder",)): _equal_builders,
    frozenset(("union",)): _nested,
    frozenset(("cap",)): _nested,
    frozenset(("minus",)): _nested,
    frozenset(("family",)): _equal_families,
}
