"""Finding the final answer: tags and boxes strictly, more rules only when asked, never out of the thinking."""

import time

import pytest

from smallmath_jax.verify.extract import ANSWER, TAIL, extract, find_answer

STRICT = [
    ("<think>a</think><answer>5</answer>", "5"),
    ("<answer>4</answer> no, <answer>5</answer>", "5"),
    ("<answer>\n  5\n</answer>", "5"),
    ("<answer>4<answer>5</answer>", "5"),
    ("<answer>5</answer><answer>6", "5"),
    (r"<answer>it is \boxed{5} m</answer>", "5"),
    (r"<answer>\boxed{4}, or rather \boxed{5}</answer>", "5"),
    (r"so \boxed{5}.", "5"),
    (r"\boxed{4} hence \boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    (r"\boxed{\boxed{\fbox{5}}}", "5"),
    (r"\fbox{5}", "5"),
    (r"\boxed {5}", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"{ \boxed{5}", "5"),
    (r"\boxed{4} and \boxed{5", "4"),
    (r"x \\\boxed{5}", "5"),
    (r"<answer> \boxed{5} <end_of_answer>", "5"),
    ("<answer>5<end_of_answer>", "5"),
    (r"<think>\boxed{4}</think> \boxed{5}", "5"),
    (r"<think>4</think><answer>\text{even}</answer>", r"\text{even}"),
]


@pytest.mark.parametrize("text, answer", STRICT)
def test_strict_extraction(text, answer):
    assert extract(text) == answer
    assert extract(text, "lenient") is not None


NOTHING = [
    "",
    "the answer is 5",
    "$5$",
    "5",
    "#### 5",
    "<answer></answer>",
    r"<answer>  </answer> \boxed{5}",
    "<answer>5",
    r"<think>\boxed{5}</think>",
    r"<think>so \boxed{5}",
    "<think><answer>5</answer></think>",
    r"\boxed{}",
    r"\boxed{5",
    "<Answer>5</Answer>",
]


@pytest.mark.parametrize("text", NOTHING)
def test_strict_extraction_finds_nothing_else(text):
    assert extract(text) is None


def test_a_forced_prefix_is_part_of_what_was_written():
    assert extract(r"so \boxed{5}", prefix="<think>") is None
    assert extract(r"so</think> \boxed{5}", prefix="<think>") == "5"
    assert extract("5</answer>", prefix="<think>x</think><answer>") == "5"


LENIENT = [
    (r"so \boxed{1} and \boxed{2}", "1, 2", "boxes"),
    (r"$\boxed{1}$, $\boxed{2}$", "1, 2", "boxes"),
    (r"first \boxed{1}. After a long remark about the other case we see \boxed{2}", "2", "box"),
    (r"<think>\boxed{5}</think>", "5", "box"),
    ("Adding up: 18 + 2 = 20\n#### 20", "20", "hashes"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "$\\frac{1}{2}$", "phrase"),
    ("Therefore, the answer is 12.", "12", "phrase"),
    ("Answer: C", "C", "phrase"),
    ("We get $x=3$ and then $y = 4$", "y = 4", "math"),
    (r"Thus \[ x^2 \] holds", "x^2", "math"),
    ("there are 3 cats and 4 dogs, 7 in all", "7", "number"),
    ("that makes 1,200 in total", "1,200", "number"),
]


@pytest.mark.parametrize("text, answer, rule", LENIENT)
def test_lenient_extraction_says_by_which_rule(text, answer, rule):
    found = find_answer(text, "lenient")
    assert (found.answer.strip(), found.rule) == (answer, rule)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match="strict, lenient"):
        extract("5", "loose")


def test_only_the_tail_is_searched_and_long_answers_are_cut():
    assert extract(r"\boxed{5}" + " " * TAIL) is None
    assert extract("x" * 10 * TAIL + r"\boxed{5}") == "5"
    assert len(extract(r"\boxed{" + "1" * 3 * ANSWER + "}")) == ANSWER + 1


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{" * 20_000,
        "{" * 10**6,
        "\\(" * 10_000,
        "$" * 20_000,
        "answer" + " " * 10**5,
        "the answer is " * 5_000,
        "<answer>" * 50_000,
        "</answer>" * 50_000,
        "1," * 10_000,
        "\\" * 10**5,
    ],
)
@pytest.mark.parametrize("mode", ["strict", "lenient"])
def test_extraction_is_quick_on_hostile_text(text, mode):
    start = time.process_time()
    find_answer(text, mode)
    assert time.process_time() - start < 1.0
