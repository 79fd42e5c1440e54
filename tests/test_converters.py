"""Public sets: rows written by hand in each set's published schema, and what becomes of them."""

import base64
import io
import logging

import pytest
from PIL import Image

from smallmath_jax.data import converters, problems
from smallmath_jax.data.converters import (
    BENCHMARKS,
    CONVERTERS,
    final_answer,
    last_boxed,
    split_thinking,
)
from smallmath_jax.data.problems import Rows, load_problems


def png():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), (0, 120, 0)).save(buffer, "PNG")
    return buffer.getvalue()


PICTURE = {"bytes": png(), "path": None}


@pytest.fixture
def hub(monkeypatch):
    """Serves rows as the hub would: hub[name] = rows."""
    tables = {}

    def rows(name, split, source):
        table = tables[name]
        return Rows(len(table), table.__getitem__, lambda index: f"row {index + 1}")

    monkeypatch.setattr(converters, "hub_rows", rows)
    return tables


def load(hub, name, rows):
    kinds = CONVERTERS if name in CONVERTERS else BENCHMARKS
    hub.update(
        {source: rows if place == 0 else [] for place, source in enumerate(kinds[name].rows)}
    )
    return load_problems(f"convert:{name}" if name in CONVERTERS else name)


def test_last_boxed_matches_braces():
    assert (
        last_boxed(r"so $\boxed{\frac{1}{2}}$, no: \boxed{\{x : x_{1} > 0\}}.")
        == r"\{x : x_{1} > 0\}"
    )
    assert last_boxed(r"\boxed{3} then \boxed{4") == "3"  # the last complete one
    assert last_boxed(r"\boxed{\text{a \} b}}") == r"\text{a \} b}"
    assert last_boxed(r"\fbox{7}") == "7" and last_boxed(r"$\boxed 5$.") == "5"
    assert last_boxed("none") is None and last_boxed(r"\boxed{}") is None
    assert last_boxed(r"\boxed{" * 3000) is None


def test_thinking_and_answers_are_taken_apart():
    assert split_thinking("<think>\na\n</think>\n\nb") == ("a", "b")
    for bad in (
        "no tags",
        "<think>a",
        "x<think>a</think>b",
        "<think>a<think></think>",
        "<think>a</think></think>",
    ):
        assert split_thinking(bad) is None
    assert final_answer("x <answer> \\boxed{3} cm</answer>") == "3"
    assert final_answer("x <answer> B </answer>") == "B"
    assert final_answer("thus $\\boxed{12}$") == "12"
    assert (
        final_answer("**Final Answer:** C.") == "C" and final_answer("The answer is: 4.5") == "4.5"
    )
    assert final_answer("nothing stated") is None


def test_math_train(hub):
    rows = [
        {
            "problem": "What is $1+\\frac12$?",
            "level": "Level 2",
            "type": "Prealgebra",
            "solution": "It is $\\boxed{\\frac{3}{2}}.$",
        },
        {"problem": "Prove it.", "level": "Level ?", "type": "Geometry", "solution": "Clear."},
    ]
    (problem,) = load(hub, "math_train", rows)
    assert (problem.answer, problem.level, problem.subject) == ("\\frac{3}{2}", 2, "Prealgebra")
    assert problem.solution == (
        "<think>\nIt is $\\boxed{\\frac{3}{2}}.$\n</think>\n<answer>\\frac{3}{2}</answer>"
    )
    assert (problem.id, problem.licence) == ("math_train-0", "MIT")
    assert problem.source == "EleutherAI/hendrycks_math:algebra:train"


def test_all_seven_parts_of_math_are_read(hub):
    row = {"level": "Level 1", "type": "Algebra", "solution": "\\boxed{1}"}
    for place, source in enumerate(CONVERTERS["math_train"].rows):
        hub[source] = [{**row, "problem": f"{place} {index}"} for index in range(place)]
    problems = load_problems("convert:math_train")
    assert len(problems) == sum(range(7)) and len({problem.id for problem in problems}) == 21
    assert load_problems("convert:math_train", limit=5, seed=1) == load_problems(
        "convert:math_train", limit=5, seed=1
    )


def test_geometry3k(hub):
    rows = [
        {
            "images": [PICTURE],
            "problem": "<image>Find x.",
            "answer": "5",
            "id": 0,
            "choices": ["1", "5"],
            "ground_truth": "B",
        }
    ]
    (problem,) = load(hub, "geometry3k", rows)
    assert (problem.problem, problem.answer, problem.options) == ("<image>Find x.", "5", ())
    assert problem.images == (PICTURE["bytes"],) and problem.solution is None


def openr1_row(**changes):
    right = "<think>\nA long way to 42.\n</think>\n\nThe sum is \\boxed{42}."
    row = {
        "problem": "6 * 7?",
        "solution": "42",
        "answer": "42",
        "problem_type": "Number Theory",
        "question_type": "math-word-problem",
        "source": "olympiads",
        "uuid": "f3e0",
        "is_reasoning_complete": [True, True, True, False],
        "generations": [
            "<think>41</think>\\boxed{41}",
            right,
            "<think>6*7=42</think>\\boxed{42}",
            "<think>4",
        ],
        "correctness_math_verify": [False, True, True, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 3,
        "messages": [],
    }
    return row | changes


def test_openr1_takes_the_shortest_verified_solution(hub, caplog):
    rows = [
        openr1_row(),
        openr1_row(problem="b", correctness_math_verify=[False] * 4),
        openr1_row(problem="c", answer="proof"),
        openr1_row(problem="d", correctness_math_verify=None),
        openr1_row(problem="e", generations=["<think>x</answer></think>1"] * 4),
        openr1_row(),
        openr1_row(problem="stop <|im_end|>"),
    ]
    with caplog.at_level(logging.INFO):
        (problem,) = load(hub, "openr1_math", rows)
    assert problem.solution == "<think>\n6*7=42\n</think>\n<answer>42</answer>"
    assert (problem.answer, problem.subject, problem.licence) == (
        "42",
        "Number Theory",
        "Apache-2.0",
    )
    for reason in (
        "no_verified_solution 2",
        "no_answer 1",
        "broken_solution 1",
        "duplicate 1",
    ):
        assert reason in caplog.text


def test_r1_onevision(hub):
    encoded = base64.b64encode(PICTURE["bytes"]).decode()
    reply = "<think>\nTwo shapes and three.\n</think>\n\n**Final Answer:** 5"
    turns = lambda text, sender="gpt": [
        {"from": "human", "value": "<image>\nHow many shapes?"},
        {"from": sender, "value": text},
    ]
    rows = [
        {"id": "a", "image": encoded, "conversations": turns(reply)},
        {"id": "b", "image": encoded, "conversations": turns("It is 5.")},
        {
            "id": "c",
            "image": encoded,
            "conversations": turns("<think>x</think> who knows", "assistant"),
        },
        {"id": "d", "image": None, "conversations": turns(reply)},
    ]
    (problem,) = load(hub, "r1_onevision", rows)
    assert (problem.problem, problem.answer) == ("How many shapes?", "5")
    assert problem.images == (f"data:image/png;base64,{encoded}",)
    assert problem.solution == "<think>\nTwo shapes and three.\n</think>\n<answer>5</answer>"


def test_multimodal_open_r1(hub):
    rows = [
        {
            "image": PICTURE,
            "problem": "How long is AB?",
            "solution": "<think>3 and 4 give 5.</think>\n\n<answer>5 cm</answer>",
            "original_question": "?",
            "original_answer": "The answer is 5",
        },
        {
            "image": PICTURE,
            "problem": "b",
            "solution": "5",
            "original_question": "",
            "original_answer": "",
        },
    ]
    (problem,) = load(hub, "multimodal_open_r1", rows)
    assert problem.solution == "<think>\n3 and 4 give 5.\n</think>\n<answer>5 cm</answer>"
    assert problem.images == (PICTURE["bytes"],)


def numina_row(problem, **changes):
    row = {
        "problem": problem,
        "solution": "We see \\boxed{3}.",
        "answer": "3",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "source": "olympiads",
        "synthetic": False,
    }
    return row | changes


def test_numina_keeps_the_competition_part(hub):
    rows = [
        numina_row("a"),
        numina_row("b", source="orca_math"),
        numina_row("c", source="amc_aime"),
        numina_row("d", answer="notfound"),
        numina_row("e", question_type="proof", answer="proof"),
        numina_row("f", problem_is_valid="Incomplete"),
        numina_row("g", synthetic=True),
    ]
    kept = load(hub, "numina_competition", rows)
    assert [problem.problem for problem in kept] == ["a", "c"]
    assert kept[0].meta == {"source": "olympiads"} and kept[0].solution.endswith(
        "<answer>3</answer>"
    )
    (problem,) = load(hub, "numina_amc_aime", rows)
    assert (problem.problem, problem.origin) == ("c", "amc_aime")


def test_metamath_drops_the_elementary_part(hub):
    rows = [
        {
            "type": "MATH_AnsAug",
            "query": "What is 2+2?",
            "original_question": "What is 2+2?",
            "response": "2+2=4.\n#### 4\nThe answer is: $4$",
        },
        {
            "type": "GSM_Rephrased",
            "query": "q",
            "original_question": "q",
            "response": "The answer is: 1",
        },
        {"type": "MATH_SV", "query": "r", "original_question": "r", "response": "unfinished"},
    ]
    (problem,) = load(hub, "metamath", rows)
    assert (problem.answer, problem.licence, problem.origin) == ("$4$", "MIT", "MATH")
    assert problem.solution == "<think>\n2+2=4.\n</think>\n<answer>$4$</answer>"


BENCHMARK_ROWS = {
    "math500": (
        {
            "problem": "p",
            "solution": "s \\boxed{2}",
            "answer": "2",
            "subject": "Algebra",
            "level": 4,
            "unique_id": "test/algebra/1.json",
        },
        ("p", "2", 4, "Algebra"),
    ),
    "math": (
        {"problem": "p", "level": "Level 5", "type": "Algebra", "solution": "\\boxed{2}"},
        ("p", "2", 5, "Algebra"),
    ),
    "aime2024": (
        {"id": 60, "problem": "p", "solution": "s", "answer": "204", "url": "u", "year": "2024"},
        ("p", "204", None, None),
    ),
    "amc23": ({"id": 0, "question": "p", "answer": "27", "url": "u"}, ("p", "27", None, None)),
    "olympiadbench": (
        {
            "id": 1606,
            "question": "p",
            "solution": ["s"],
            "final_answer": ["2", "3"],
            "context": "Let x.",
            "image_1": None,
            "modality": "Text-only",
            "subfield": "Algebra",
            "is_multiple_answer": True,
        },
        ("Let x.\n\np", "2, 3", None, "Algebra"),
    ),
    "college_math": (
        {
            "data_source": "book",
            "question_number": "1.1",
            "question": "p",
            "answer": "2",
            "license": "x",
        },
        ("p", "2", None, None),
    ),
    "gsm8k": ({"question": "p", "answer": "1+1=<<1+1=2>>2\n#### 2"}, ("p", "2", None, None)),
    "gaokao2023en": ({"question": "p", "answer": "$-1$"}, ("p", "$-1$", None, None)),
    "math_vision": (
        {
            "id": "4",
            "question": "p\n<image1>",
            "options": ["1", "2"],
            "image": "images/4.jpg",
            "decoded_image": PICTURE,
            "answer": "B",
            "solution": None,
            "level": 2,
            "subject": "graph theory",
        },
        ("p\n<image>", "B", 2, "graph theory"),
    ),
}


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_benchmarks(hub, name):
    row, expected = BENCHMARK_ROWS[name]
    (problem,) = load(hub, name, [row])
    assert (problem.problem, problem.answer, problem.level, problem.subject) == expected
    assert problem.id == f"{name}-0" and problem.licence and "/" in problem.source
    assert len(problem.images) == (name == "math_vision")


def test_a_changed_schema_is_told(hub):
    with pytest.raises(
        ValueError,
        match=r"math_train .*no problems in it .*bad_row': 2.*row 1: KeyError 'solution'",
    ):
        load(hub, "math_train", [{"problem": "p", "answer": "1"}] * 2)


def test_no_hub_is_told(monkeypatch):
    import datasets

    def unreachable(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(problems, "reachable", lambda endpoint: True)
    with pytest.raises(
        ValueError, match="hf:HuggingFaceH4/MATH-500::test: no route.*check the name, the network"
    ):
        load_problems("math500")
