"""Answers are equal when mathematics says so: hand-written pairs, every policy switch both ways, symmetry."""

import dataclasses
import json
import pathlib

import pytest

from smallmath_jax.verify.answers import Policy, compare, find_answer, gradable, read

PAIRS = pathlib.Path(__file__).parent / "golden" / "answer_pairs.jsonl"


def load_pairs():
    return [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]


def answer_of(text):
    return find_answer(text).answer or text


def test_every_pair_written_by_hand():
    pairs = load_pairs()
    assert len(pairs) >= 300
    wrong = []
    for pair in pairs:
        verdict = compare(pair["gold"], answer_of(pair["pred"]))
        if (verdict == "correct") != pair["equal"] or verdict == "undecided":
            wrong.append((verdict, pair))
    assert wrong == []


def test_every_gold_equals_itself_however_it_is_wrapped():
    for gold in {pair["gold"] for pair in load_pairs()}:
        for form in (
            "{}",
            "${}$",
            " {} ",
            "{}.",
            r"\[ {} \]",
            r"\( {} \)",
            "**{}**",
            r"$\displaystyle {}$.",
        ):
            assert compare(gold, form.replace("{}", gold)) == "correct", (gold, form)


def test_equality_is_symmetric_on_the_pairs():
    """Only what the gold decides may depend on the side: a choice letter's text, a gold that gives several forms."""
    one_sided = ("letter", "word before", "chain", "form")
    for pair in load_pairs():
        gold, answer = pair["gold"], answer_of(pair["pred"])
        if any(word in pair["note"] for word in one_sided):
            continue
        assert (compare(answer, gold) == "correct") == pair["equal"], pair


SWITCHES = [
    ("percent_as_number", r"28\%", "28", True),
    ("decimal_digits", r"\sqrt{2}", "1.41421356", True),
    ("degrees_as_radians", r"60^\circ", r"\frac{\pi}{3}", False),
    ("match_units", "5 \\text{ m}", "5 \\text{ kg}", False),
    ("named_value", "x=5", "5", True),
    ("sets_as_tuples", r"\{1,2\}", "(1,2)", False),
    ("vector_as_tuple", r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)", True),
    ("interval_as_inequality", "(-\\infty,3)", "x<3", True),
    ("ratio_as_fraction", "1:2", r"\frac12", True),
    ("base_optional", "204_5", "204", False),
    ("choice_with_text", "A", "(A) 5", True),
    ("set_of_one", r"\{2\}", "2", True),
]


@pytest.mark.parametrize("name, gold, answer, equal", SWITCHES)
def test_each_policy_switch_both_ways(name, gold, answer, equal):
    assert (compare(gold, answer) == "correct") == equal
    default = getattr(Policy(), name)
    other = dataclasses.replace(Policy(), **{name: 0 if name == "decimal_digits" else not default})
    assert (compare(gold, answer, other) == "correct") == (not equal)


def test_every_switch_is_tested():
    assert {row[0] for row in SWITCHES} == {field.name for field in dataclasses.fields(Policy)}


@pytest.mark.parametrize(
    "digits, equal", [("3.1415", False), ("3.14159", True), ("3.14158", False)]
)
def test_a_decimal_stands_for_an_irrational_from_six_digits_on(digits, equal):
    assert (compare(r"\pi", digits) == "correct") == equal
    assert compare("3.14159", "3.1415926") == "wrong"  # two decimals are two numbers


@pytest.mark.parametrize("factor", [100, 0.01, 1.0001, 1 + 1e-9])
def test_no_factor_and_no_tolerance_between_plain_numbers(factor):
    for gold in (7, 28, 1234, 26000):
        assert compare(str(gold), f"{gold * factor:.12f}".rstrip("0").rstrip(".")) == "wrong"


def test_prose_is_told_apart_from_answers():
    prose = "The matrix is not invertible since its determinant is 0"
    assert not gradable(prose) and not gradable("") and not gradable("   ")
    assert gradable(r"\frac{1}{2}") and gradable(r"\text{Evelyn}") and gradable("no solution")
    assert compare(prose, prose + ".") == "correct"
    assert compare(prose, "it is singular") == "unparsable_gold"
    assert compare("", "5") == "unparsable_gold"
    assert compare("5", "") == "wrong"


def test_readings_are_kept_and_say_why_they_failed():
    assert read("5") is read("5")
    assert read(r"\frac{1}{").nodes == () and read(r"\frac{1}{").error
    assert len(read("312,123,231").nodes) == 2  # one number, or three


def test_what_we_cannot_read_is_left_to_the_second_opinion():
    assert compare(r"\int_0^1 x\,dx", r"\int_0^1 t\,dt + 0") == "undecided"
    assert compare(r"\int_0^1 x\,dx", r"\int_0^2 x\,dx") == "wrong"  # the same but for a number
    assert compare("5", r"\int_0^5 1\,dx") == "wrong"  # an integral the gold does not have
