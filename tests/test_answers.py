"""Answer comparison against pairs labelled by hand, and the grading command on a small file."""

import json
import pathlib
import subprocess
import sys

import pytest

from smallmath_jax.records import read_parts
from smallmath_jax.verify.grader import Grader

ROOT = pathlib.Path(__file__).parent.parent
PAIRS = [json.loads(line) for line in open(ROOT / "tests" / "golden" / "answer_pairs.jsonl")]


def test_hand_labelled_pairs():
    """Design targets on hand-made formats: at least 95 % right, at most 2 % false positives."""
    with Grader() as grader:
        verdicts = [grader.grade_answer(pair["gold"], pair["pred"]).verdict for pair in PAIRS]
    right = [
        (verdict == "correct") == pair["equal"]
        for verdict, pair in zip(verdicts, PAIRS, strict=True)
    ]
    unequal = [
        verdict == "correct"
        for verdict, pair in zip(verdicts, PAIRS, strict=True)
        if not pair["equal"]
    ]
    assert len(PAIRS) >= 300
    assert sum(right) / len(right) >= 0.95
    assert sum(unequal) / len(unequal) <= 0.02


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("<think>2+2</think><answer>4</answer>", "correct"),
        ("so \\boxed{4}", "correct"),
        ("<answer>3</answer> or <answer>4</answer>", "correct"),  # the last one counts
        ("<answer>4</answer> or <answer>3</answer>", "wrong"),
        ("the answer is 4", "no_answer"),  # strict: no tag, no box
        ("<answer>9**9**9**9</answer>", "wrong"),
        ("<answer>" + "(" * 100000 + "</answer>", "wrong"),
    ],
)
def test_completions(text, verdict):
    with Grader() as grader:
        found = grader.grade("4", text).verdict
    assert found == verdict or (verdict == "wrong" and found == "no_answer")


def test_the_grading_command(tmp_path):
    rows = [
        {"id": "a", "gold": "1/2", "pred": "<answer>0.5</answer>"},
        {"id": "b", "gold": "1/2", "pred": "<answer>2</answer>"},
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        sys.executable,
        "run.py",
        "--config=configs/grade.py",
        f"--config.pairs={tmp_path}/pairs.jsonl",
    ]
    told = subprocess.run(
        [*words, f"--workdir={tmp_path}/out"], cwd=ROOT, capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    found = list(read_parts(tmp_path / "out"))
    assert [(row["id"], row["verdict"], row["extracted"]) for row in found] == [
        ("a", "correct", "0.5"),
        ("b", "wrong", "2"),
    ]
    (tmp_path / "torn.jsonl").write_text('{"id": "a", "gold": "1"\n')
    words[-1] = f"--config.pairs={tmp_path}/torn.jsonl"
    told = subprocess.run(
        [*words, f"--workdir={tmp_path}/torn"], cwd=ROOT, capture_output=True, text=True
    )
    assert (
        told.returncode != 0
        and "torn.jsonl, line 1" in told.stderr
        and "Traceback" not in told.stderr
    )
