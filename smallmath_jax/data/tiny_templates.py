"""The templates of the embedded problems: five subjects, five levels, texts and pictures.

A template is data: a text with holes, ranges of the numbers drawn, and the steps that solve it as Python expressions.
Worked solutions, programs, answers and the canonical form of a problem are all derived from the steps (data/tiny.py).
"""

import dataclasses

WHO = ("Tom", "Ana", "Ben", "Mia")
THINGS = ("apples", "pens", "books", "coins")
SUBJECTS = ("Prealgebra", "Algebra", "Geometry", "Number Theory", "Counting & Probability")

Range = tuple[str, int, int]  # a number's name, smallest and largest value
Step = tuple[str, str] | tuple[str, str, str]  # name, Python expression, how it is shown ("" hides)


@dataclasses.dataclass(frozen=True)
class Template:
    """One kind of problem.

    `draw` names the numbers drawn; `given` derives others from them (name, expression). `inputs` are the numbers a
    reader is told, in the text or by the picture: a program begins by assigning them. `steps` compute the answer,
    which is the last step's value (without steps: the last input), or `fraction` = (numerator, denominator) names,
    drawn in lowest terms. `scene` names the picture: squares, rectangle, bars, point. `unseen` templates never appear
    in training.
    """

    name: str
    subject: str
    level: int
    text: str
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    draw: tuple[Range, ...] = ()
    given: tuple[tuple[str, str], ...] = ()
    scene: str | None = None
    fraction: tuple[str, str] | None = None
    unseen: bool = False


PREALGEBRA, ALGEBRA, GEOMETRY, NUMBERS, COUNTING = SUBJECTS
LEFT, NOW = "How many {things} are left?", "How many {things} now?"
# A remainder: the quotient is found in the head, the multiple and the difference are written down.
MULTIPLE = ("m", "q*k", "{k}*{q}={m}")


def _remainder(dividend: str) -> tuple[Step, ...]:
    return (("q", f"{dividend}//k", ""), MULTIPLE, ("r", f"{dividend}-m"))


_PREALGEBRA = (
    Template(
        "buy", PREALGEBRA, 1, "{who} has {a} {things} and buys {b} more. " + NOW,
        ("a", "b"), (("s", "a+b"),), (("a", 2, 12), ("b", 2, 9)),
    ),
    Template(
        "lose", PREALGEBRA, 1, "{who} has {a} {things} and loses {b}. " + LEFT,
        ("a", "b"), (("s", "a-b"),), (("a", 8, 18), ("b", 2, 9)),
    ),
    Template(
        "buy_lose", PREALGEBRA, 2, "{who} has {a} {things}, buys {b} more and loses {c}. " + LEFT,
        ("a", "b", "c"), (("s", "a+b"), ("t", "s-c")), (("a", 2, 12), ("b", 2, 9), ("c", 2, 9)),
    ),
    Template(
        "bags_lose", PREALGEBRA, 3, "{who} buys {n} bags of {k} {things} and loses {c}. " + LEFT,
        ("n", "k", "c"), (("s", "n*k"), ("t", "s-c")), (("n", 3, 9), ("k", 2, 7), ("c", 2, 9)),
    ),
    Template(
        "share", PREALGEBRA, 5,
        "{who} has {a} {things}, buys {n} bags of {k} {things} and shares all with {m} friends. "
        "How many {things} for each?",
        ("a", "n", "k", "m"), (("s", "n*k"), ("t", "a+s"), ("u", "t//m")),
        (("m", 2, 9), ("x", 4, 12), ("n", 2, 7), ("k", 3, 9)), (("a", "m*x-n*k"),),
    ),
    Template(
        "bars_ends", PREALGEBRA, 1, "What is the sum of the first bar and the last bar?",
        ("a", "d"), (("s", "a+d"),), scene="bars",
    ),
    Template(
        "bars_sum", PREALGEBRA, 3, "What is the sum of all bars?",
        ("a", "b", "c", "d"), (("s", "a+b+c+d"),), scene="bars",
    ),
    Template(
        "lose_buy", PREALGEBRA, 2, "{who} has {a} {things}, loses {b} and buys {c} more. " + NOW,
        ("a", "b", "c"), (("s", "a-b"), ("t", "s+c")), (("a", 8, 18), ("b", 2, 9), ("c", 2, 9)),
        unseen=True,
    ),
    Template(
        "bars_more", PREALGEBRA, 2, "What is the sum of the last bar and {c}?",
        ("d", "c"), (("s", "d+c"),), (("c", 2, 9),), scene="bars", unseen=True,
    ),
)  # fmt: skip

_ALGEBRA = (
    Template(
        "solve_sum", ALGEBRA, 1, "Solve x+{a}={b}.",
        ("a", "b"), (("x", "b-a"),), (("a", 2, 9), ("y", 2, 12)), (("b", "a+y"),),
    ),
    Template(
        "solve_product", ALGEBRA, 2, "Solve {k}x={p}.",
        ("k", "p"), (("x", "p//k"),), (("k", 2, 9), ("y", 2, 9)), (("p", "k*y"),),
    ),
    Template(
        "solve_two", ALGEBRA, 3, "Solve {k}x+{a}={b}.",
        ("k", "a", "b"), (("s", "b-a"), ("x", "s//k")),
        (("k", 2, 9), ("y", 2, 9), ("a", 2, 9)), (("b", "k*y+a"),),
    ),
    Template(
        "function", ALGEBRA, 4, "Let f(x)={k}x+{a}. Find f({m})-{c}.",
        ("k", "a", "m", "c"), (("s", "k*m"), ("t", "s+a"), ("u", "t-c")),
        (("k", 2, 9), ("a", 2, 9), ("m", 2, 9), ("c", 2, 9)),
    ),
    Template(
        "solve_both", ALGEBRA, 5, "Solve {k}x+{a}={j}x+{b}.",
        ("k", "a", "j", "b"), (("s", "b-a"), ("t", "k-j"), ("x", "s//t")),
        (("j", 2, 7), ("i", 2, 7), ("a", 2, 9), ("y", 2, 9)), (("k", "j+i"), ("b", "i*y+a")),
    ),
    Template(
        "point_sum", ALGEBRA, 1, "Find x+y for the point.",
        ("x", "y"), (("s", "x+y"),), scene="point",
    ),
    Template(
        "point_one", ALGEBRA, 2, "Find {k}x+y for the point.",
        ("x", "y", "k"), (("s", "k*x"), ("t", "s+y")), (("k", 2, 9),), scene="point",
    ),
    Template(
        "solve_less", ALGEBRA, 3, "Solve {k}x-{a}={b}.",
        ("k", "a", "b"), (("s", "b+a"), ("x", "s//k")),
        (("k", 2, 9), ("y", 2, 9), ("a", 2, 9)), (("b", "k*y-a"),), unseen=True,
    ),
    Template(
        "point_less", ALGEBRA, 2, "Find {k}x-y for the point.",
        ("x", "y", "k"), (("s", "k*x"), ("t", "s-y")), (("k", 2, 9),), scene="point", unseen=True,
    ),
)  # fmt: skip

_GEOMETRY = (
    Template(
        "square", GEOMETRY, 1, "A square has side {s}. What is its perimeter?",
        ("s",), (("p", "s*4"),), (("s", 2, 7),),
    ),
    Template(
        "height", GEOMETRY, 2, "A rectangle has area {p} and width {w}. What is its height?",
        ("p", "w"), (("h", "p//w"),), (("w", 2, 9), ("y", 2, 9)), (("p", "w*y"),),
    ),
    Template(
        "triangle", GEOMETRY, 2, "A triangle has sides {a}, {b} and {c}. What is its perimeter?",
        ("a", "b", "c"), (("s", "a+b"), ("p", "s+c")), (("a", 2, 9), ("b", 2, 9), ("c", 2, 9)),
    ),
    Template(
        "half", GEOMETRY, 4, "A rectangle has perimeter {p} and width {w}. What is its height?",
        ("p", "w"), (("s", "p//2"), ("h", "s-w")), (("w", 2, 7), ("y", 2, 7)),
        (("p", "2*w+2*y"),),
    ),
    Template(
        "half_area", GEOMETRY, 5, "A rectangle has perimeter {p} and width {w}. What is its area?",
        ("p", "w"), (("s", "p//2"), ("h", "s-w"), ("t", "h*w")), (("w", 2, 9), ("y", 2, 9)),
        (("p", "2*w+2*y"),),
    ),
    Template(
        "sides", GEOMETRY, 1, "What is the width plus the height?",
        ("w", "h"), (("s", "w+h"),), scene="rectangle",
    ),
    Template(
        "area", GEOMETRY, 2, "What is the area?", ("w", "h"), (("t", "w*h"),), scene="rectangle",
    ),
    Template(
        "told_perimeter", GEOMETRY, 3,
        "A rectangle has width {w} and height {h}. What is its perimeter?",
        ("w", "h"), (("s", "w+h"), ("p", "s*2")), (("w", 2, 7), ("h", 2, 7)), unseen=True,
    ),
    Template(
        "grow", GEOMETRY, 3, "What is the area plus {c}?",
        ("w", "h", "c"), (("s", "w*h"), ("t", "s+c")), (("c", 2, 9),),
        scene="rectangle", unseen=True,
    ),
)  # fmt: skip

_NUMBERS = (
    Template(
        "multiple", NUMBERS, 2, "What is the largest multiple of {k} up to {a}?",
        ("k", "a"), (("q", "a//k", ""), MULTIPLE), (("k", 3, 9), ("a", 6, 20)),
    ),
    Template(
        "remainder", NUMBERS, 3, "What is the remainder of {a} divided by {k}?",
        ("a", "k"), _remainder("a"), (("k", 3, 9), ("a", 6, 20)),
    ),
    Template(
        "remainder_sum", NUMBERS, 4, "What is the remainder of {a}+{b} divided by {k}?",
        ("a", "b", "k"), (("s", "a+b"), *_remainder("s")), (("k", 3, 9), ("a", 2, 12), ("b", 2, 9)),
    ),
    Template(
        "remainder_both", NUMBERS, 5, "What is the remainder of {a}*{b}+{c} divided by {k}?",
        ("a", "b", "c", "k"), (("s", "a*b"), ("t", "s+c"), *_remainder("t")),
        (("k", 3, 9), ("a", 2, 9), ("b", 2, 9), ("c", 2, 9)),
    ),
    Template(
        "remainder_less", NUMBERS, 4, "What is the remainder of {a}-{b} divided by {k}?",
        ("a", "b", "k"), (("s", "a-b"), *_remainder("s")),
        (("k", 3, 9), ("a", 8, 18), ("b", 2, 9)), unseen=True,
    ),
)  # fmt: skip

_PAIRS = "{n}*{o}/2={p}"

_COUNTING = (
    Template(
        "outfits", COUNTING, 1, "{who} has {a} hats and {b} shirts. How many outfits?",
        ("a", "b"), (("s", "a*b"),), (("a", 2, 9), ("b", 2, 9)),
    ),
    Template(
        "outfits_three", COUNTING, 3, "{who} has {a} hats, {b} shirts and {c} shoes. How many outfits?",
        ("a", "b", "c"), (("s", "a*b"), ("t", "s*c")), (("a", 2, 6), ("b", 2, 6), ("c", 2, 6)),
    ),
    Template(
        "pairs", COUNTING, 4, "How many pairs can {n} friends form?",
        ("n",), (("o", "n-1", ""), ("p", "n*o//2", _PAIRS)), (("n", 3, 14),),
    ),
    Template(
        "same_color", COUNTING, 5, "A bag has {a} red and {b} blue balls. How many pairs of one color?",
        ("a", "b"),
        (
            ("c", "a-1", ""), ("s", "a*c//2", "{a}*{c}/2={s}"),
            ("d", "b-1", ""), ("t", "b*d//2", "{b}*{d}/2={t}"), ("u", "s+t"),
        ),
        (("a", 3, 10), ("b", 3, 10)),
    ),
    Template(
        "squares", COUNTING, 1, "How many squares are there?", ("n",), (),
        scene="squares",
    ),
    Template(
        "squares_gap", COUNTING, 3, "How many more red squares than blue squares?",
        ("r", "b"), (("s", "r-b"),), scene="squares",
    ),
    Template(
        "squares_price", COUNTING, 2, "Each square costs {k} coins. How many coins for all?",
        ("n", "k"), (("s", "n*k"),), (("k", 2, 9),), scene="squares",
    ),
    Template(
        "squares_red", COUNTING, 1, "How many red squares are there?", ("r",), (),
        scene="squares", unseen=True,
    ),
    Template(
        "squares_more", COUNTING, 2, "How many squares with {c} more squares?",
        ("n", "c"), (("s", "n+c"),), (("c", 2, 9),), scene="squares", unseen=True,
    ),
)  # fmt: skip

TEMPLATES = {
    template.name: template
    for template in (*_PREALGEBRA, *_ALGEBRA, *_GEOMETRY, *_NUMBERS, *_COUNTING)
}
