"""What supervised fine-tuning learns from: the text of each problem's solution."""

import json
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from smallmath_jax.data.problems import load_problems
from smallmath_jax.data.tokens import load_tokens
from smallmath_jax.records import Problem
from smallmath_jax.tasks import sft

CONFIG = ConfigDict({"seed": 0, "prompt": {"grammar": "think_answer"}})
ROW = {"problem": "1 + 1?", "answer": "2", "solution": "One and one.", "template": "add"}


def test_a_file_called_tiny_is_taught_by_its_own_solutions(tmp_path):
    rows = [ROW, {**ROW, "problem": "1 + 1 =", "source": "tiny"}]
    path = tmp_path / "tiny.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = load_problems(str(path))
    assert [problem.source for problem in problems] == ["tiny", "tiny"]
    for problem in problems:
        text = sft.solution_text(problem, CONFIG, terse_share=1.0)
        assert text == "<think>\nOne and one.\n</think>\n<answer>2</answer>"


def test_a_solution_that_cannot_be_taught_names_its_problem():
    stray = Problem("p7", "1 + 1?", "2", solution="so <answer>2</answer> and more")
    with pytest.raises(ValueError, match="problem 'p7': a solution has stray"):
        sft.solution_text(stray, CONFIG, 0.0)
    policy = SimpleNamespace(tokens=load_tokens("tiny"))
    with pytest.raises(ValueError, match="problem 'p7': a solution spells the special token"):
        sft.solution_ids(stray, "so <|im_end|>", policy)


def test_embedded_problems_are_taught_in_a_style():
    (problem,) = load_problems("tiny", limit=1)
    texts = {share: sft.solution_text(problem, CONFIG, share) for share in (0.0, 1.0)}
    assert "Steps:" in texts[0.0] and "Quick" in texts[1.0]
