"""Grading completions: verdicts, the second opinion and its limits, threads, death of parents, the grade task."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from ml_collections import ConfigDict

from smallmath_jax.records import Problem
from smallmath_jax.tasks import grade
from smallmath_jax.verify import grader as grading
from smallmath_jax.verify.grader import Graded, Grader, ungradable

INTEGRAL = (r"\int_0^1 x\,dx", r"\int_0^1 t\,dt")  # only math-verify can tell
OTHER_INTEGRAL = (r"\int_0^1 x\,dx", r"\int_0^2 t\,dt + 1")


@pytest.fixture(scope="module")
def grader():
    with Grader(cpu_s=60, wall_s=120) as one:  # a busy machine decides nothing here
        yield one


CASES = [
    ("5", "<think>2+3</think><answer>5</answer>", "correct", "5"),
    ("5", r"<think>2+3</think><answer>\boxed{5}</answer>", "correct", "5"),
    ("5", "<think>2+3</think><answer>6</answer>", "wrong", "6"),
    ("5", r"so \boxed{5.0}", "correct", "5.0"),
    ("5", "the answer is 5", "no_answer", None),
    ("5", "<answer></answer>", "no_answer", None),
    ("", "<answer>5</answer>", "unparsable_gold", "5"),
    ("", "nothing", "unparsable_gold", None),
    (
        "We see that the two sides are never the same number",
        "<answer>5</answer>",
        "unparsable_gold",
        "5",
    ),
    (INTEGRAL[0], f"<answer>{INTEGRAL[1]}</answer>", "correct", INTEGRAL[1]),
    (OTHER_INTEGRAL[0], f"<answer>{OTHER_INTEGRAL[1]}</answer>", "wrong", OTHER_INTEGRAL[1]),
]


@pytest.mark.parametrize("gold, text, verdict, extracted", CASES)
def test_verdicts(grader, gold, text, verdict, extracted):
    graded = grader.grade(gold, text)
    assert (graded.verdict, graded.extracted) == (verdict, extracted)
    assert graded.fallback == ("int" in gold)


def test_prefix_and_mode_reach_extraction(grader):
    assert grader.grade("5", r"\boxed{5}", prefix="<think>").verdict == "no_answer"
    assert grader.grade("5", "2+3</think><answer>5</answer>", prefix="<think>").verdict == "correct"
    lenient = grader.grade("5", "the answer is 5.", mode="lenient")
    assert (lenient.verdict, lenient.rule) == ("correct", "phrase")
    boxes = grader.grade("{1, 2}", r"\boxed{1} and \boxed{2}", mode="lenient")
    assert (boxes.verdict, boxes.rule) == ("correct", "boxes")


def test_bare_answers(grader):
    assert grader.grade_answer("5", " 5 ").verdict == "correct"
    assert grader.grade_answer("5", r"\boxed{5}").verdict == "correct"
    assert grader.grade_answer("5", "  ").verdict == "no_answer"
    assert grader.grade_answer("5", "$x = 5$").extracted == "$x = 5$"


PROSE = "We see that the two sides are never the same number"


@pytest.mark.parametrize(
    "golds, answer, verdict",
    [
        (("3", "-3"), "-3", "correct"),
        (("3", "-3"), "4", "wrong"),
        (("3", INTEGRAL[0]), INTEGRAL[1], "correct"),
        (("3", PROSE), "3", "correct"),
        (("3", PROSE), "4", "unparsable_gold"),  # it may say what the prose says
        (("", ""), "4", "unparsable_gold"),
        (("3", ""), None, "no_answer"),
    ],
)
def test_any_of_several_golds_is_right(grader, golds, answer, verdict):
    before = grader.counters()["graded"]
    text = "nothing" if answer is None else f"<answer>{answer}</answer>"
    assert grader.grade(golds, text).verdict == verdict
    assert grader.grade_many([(golds, text)])[0].verdict == verdict
    assert grader.counters()["graded"] - before == 2  # an answer counts once
    if answer is not None:
        assert grader.grade_answer(golds, answer).verdict == verdict


def test_a_timeout_against_one_gold_outweighs_wrong_against_another():
    with Grader(cpu_s=0.001, wall_s=60) as short:
        assert short.grade_answer(("5", INTEGRAL[0]), INTEGRAL[1]).verdict == "timeout"
        assert short.grade_answer((INTEGRAL[0], INTEGRAL[1]), INTEGRAL[1]).verdict == "correct"


def test_accepted_answers_of_a_problem():
    assert Problem("a", "x^2 = 9", "3", meta={"accepted": ["3", "-3"]}).accepted == ("3", "-3")
    assert Problem("a", "1 + 1", "2").accepted == ("2",)


def test_many_keep_their_order_and_are_counted(grader):
    before = grader.counters()
    pairs = [("5", f"<answer>{n}</answer>") for n in range(10)]
    verdicts = [graded.verdict for graded in grader.grade_many(pairs)]
    assert verdicts == ["wrong"] * 5 + ["correct"] + ["wrong"] * 4
    after = grader.counters()
    assert after["graded"] - before["graded"] == 10 and after["correct"] - before["correct"] == 1
    assert after["fallback"] == before["fallback"]


def test_any_thread_may_grade(grader):
    results: dict[int, Graded] = {}

    def work(number):
        results[number] = grader.grade(INTEGRAL[0], f"<answer>{INTEGRAL[1]} + {number}</answer>")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number].verdict for number in range(6)] == ["correct"] + ["wrong"] * 5
    assert grader.counters()["restarts"] == 0


def test_what_is_out_of_time_is_a_timeout_and_the_next_opinion_is_fine():
    with Grader(cpu_s=0.001, wall_s=60) as short:
        told = short.grade_answer(*INTEGRAL)
        assert (told.verdict, told.fallback) == ("timeout", True)
        assert short.grade_answer("1/2", "0.5").verdict == "correct"
        assert short.grade_answer(*INTEGRAL).verdict == "timeout"  # remembered nowhere, asked again
        assert short.counters()["restarts"] == 0
        short._limits = {"cpu_s": 60, "wall_s": 60}
        assert short.grade_answer(*INTEGRAL).verdict == "correct"


IGNORING = """
import signal
from smallmath_jax.verify.grader import Grader
signal.signal(signal.SIGPROF, signal.SIG_IGN)
with Grader(cpu_s=0.001, wall_s=60) as short:
    print(short.grade_answer(r"\\int_0^1 x\\,dx", r"\\int_0^1 t\\,dt").verdict)
"""


def test_cpu_limit_holds_where_the_host_process_ignores_its_signal():
    """As libtpu makes it. In a process of its own: libtpu, once loaded here, may be counting on being ignored."""
    told = subprocess.run([sys.executable, "-c", IGNORING], capture_output=True, text=True)
    assert told.stdout == "timeout\n", told.stderr


PROGRAM = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("second_opinion", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.cap_resources(600)
for told in (lambda g, a: "equal", lambda g, a: pow(9, 9**9), lambda g, a: time.sleep(60),
             lambda g, a: bytearray(10**10), lambda g, a: module.os.abort(), lambda g, a: 1 / 0,
             lambda g, a: open("written", "w").write("x"), lambda g, a: "different"):
    module.opinion = told
    start = time.monotonic()
    print(module.ask_in_fork({"gold": "", "answer": "", "cpu_s": 0.3, "wall_s": 4.0}), time.monotonic() - start)
"""


def test_long_c_calls_sleep_memory_and_crashes_end_where_they_are(tmp_path):
    script = str(grading._SCRIPT)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, script], capture_output=True, text=True, cwd=tmp_path
    )
    rows = [line.split() for line in run.stdout.splitlines()]
    assert [row[0] for row in rows] == [
        "equal", "timeout", "timeout", "error", "error", "error", "error", "different"
    ], run.stderr  # fmt: skip
    assert all(float(row[1]) < 10 for row in rows)
    assert (tmp_path / "written").exists() is False or (tmp_path / "written").read_text() == ""


def fake_process(monkeypatch, tmp_path, program):
    script = tmp_path / "process.py"
    script.write_text(textwrap.dedent(program))
    monkeypatch.setattr(grading, "_SCRIPT", script)


def test_without_math_verify_undecided_is_wrong_and_counted(monkeypatch, tmp_path):
    fake_process(monkeypatch, tmp_path, "print('missing', flush=True)")
    with Grader() as plain:
        told = plain.grade_answer(*INTEGRAL)
        assert (told.verdict, told.fallback) == ("wrong", True)
        assert plain.grade_answer("5", "5").verdict == "correct"
        assert plain.counters()["missing"] == 1


def test_a_process_that_is_lost_is_replaced(monkeypatch, tmp_path):
    fake_process(monkeypatch, tmp_path, "print('ready', flush=True)\ninput()")
    with Grader() as unlucky:
        assert unlucky.grade_answer(*INTEGRAL).verdict == "timeout"
        assert unlucky.grade_answer(*OTHER_INTEGRAL).verdict == "timeout"
        assert unlucky.counters()["restarts"] == 2


def test_a_closed_grader_says_so():
    closed = Grader()
    process = closed._idle.queue[0].result()._process
    closed.close()
    closed.close()
    assert process.poll() is not None
    assert closed.grade_answer("5", "5").verdict == "correct"  # our own comparison needs no process
    with pytest.raises(RuntimeError, match="closed"):
        closed.grade_answer(*INTEGRAL)


PARENT = """
import os, threading, time
from smallmath_jax.verify.grader import Grader
made = []
starter = threading.Thread(target=lambda: made.append(Grader()))
starter.start(); starter.join()  # the thread that made it is gone, the process must live on
process = made[0]._idle.queue[0].result()._process
print(process.pid, process.poll(), flush=True)
time.sleep(120)
"""


def alive(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().split(")")[-1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_process_outlives_the_thread_that_made_it_and_dies_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    pid, state = parent.stdout.readline().split()
    assert state == "None" and alive(pid)
    maps = pathlib.Path(f"/proc/{pid}/maps").read_text()
    assert "jaxlib" not in maps and "torch" not in maps
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 30
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(pid)


def test_golds_to_look_at():
    golds = [
        "5",
        "",
        r"\frac12",
        "It is the plane through the origin and the given line",
        "no solution",
    ]
    assert ungradable(golds) == [1, 3]


def write_pairs(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config_of(pairs, bare=False, mode="strict"):
    return ConfigDict({"task": "grade", "mode": mode, "pairs": pairs, "bare": bare})


def verdicts_of(workdir):
    return [json.loads(line) for line in (workdir / "verdicts.jsonl").read_text().splitlines()]


def test_the_grade_task_writes_verdicts_in_order(tmp_path, capsys):
    rows = [
        {"id": "b", "gold": "1/2", "pred": r"so \boxed{0.5}"},
        {"id": "a", "gold": "7", "pred": "<answer>8</answer>"},
        {"id": 3, "gold": 7, "pred": "seven", "more": "ignored"},
        {"id": "ü", "gold": "5", "pred": "it's\u2028<answer>√25</answer>"},
    ]
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    grade.run(config_of(path), str(tmp_path / "out"))
    assert verdicts_of(tmp_path / "out") == [
        {"id": "b", "verdict": "correct", "extracted": "0.5"},
        {"id": "a", "verdict": "wrong", "extracted": "8"},
        {"id": 3, "verdict": "no_answer", "extracted": None},
        {"id": "ü", "verdict": "correct", "extracted": "√25"},
    ]
    told = capsys.readouterr().out
    assert (
        "4 pairs: correct 2 (50.0%), wrong 1 (25.0%), no_answer 1 (25.0%)" in told
        and "asked for 0" in told
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["verdicts.jsonl"]


def test_the_grade_task_bare_and_lenient(tmp_path):
    rows = [
        {"id": 1, "gold": "7", "pred": "7.0"},
        {"id": 2, "gold": "7", "pred": "The answer is 7."},
    ]
    path = write_pairs(tmp_path / "pairs.jsonl", rows)
    for bare, mode, expected in ((False, "strict", 0), (True, "strict", 2), (False, "lenient", 2)):
        grade.run(config_of(path, bare, mode), str(tmp_path / "out"))
        assert sum(row["verdict"] == "correct" for row in verdicts_of(tmp_path / "out")) == expected


@pytest.mark.parametrize(
    "line, told",
    [
        ('{"id": 1, "gold": "5", "pred": "5"', "line 2: not a JSON object"),
        ("[1, 2]", "line 2: a JSON object with id, gold and pred"),
        ('{"id": 1, "gold": "5"}', "line 2: field 'pred' is missing"),
        ('{"id": 1, "gold": null, "pred": "5"}', "line 2: field 'gold' is None"),
        ('{"id": 1, "gold": ["5"], "pred": "5"}', "line 2: field 'gold'"),
        ('{"id": 1, "gold": "5", "pred": true}', "line 2: field 'pred' is True"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, told):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"id": 0, "gold": "5", "pred": "5"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:
        grade.run(config_of(str(path)), str(tmp_path / "out"))
    assert told in str(caught.value) and "pairs.jsonl" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_half_a_surrogate_pair_costs_no_verdicts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"id": 1, "gold": "5", "pred": "\\\\boxed{\\ud83d}"}\n{"id": 2, "gold": "5", "pred": "\\\\boxed{5}"}\n'
    )
    grade.run(config_of(str(path)), str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "verdicts.jsonl").open()]
    assert [(row["verdict"], row["extracted"]) for row in rows] == [
        ("wrong", "\ud83d"),
        ("correct", "5"),
    ]


def test_a_missing_file_or_name_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl"):
        grade.run(config_of(str(tmp_path / "nowhere.jsonl")), str(tmp_path))
    with pytest.raises(ValueError, match="--config.pairs"):
        grade.run(config_of(""), str(tmp_path))


def test_the_command(tmp_path):
    root = pathlib.Path(grade.__file__).parents[2]
    path = write_pairs(tmp_path / "pairs.jsonl", [{"id": 1, "gold": "5", "pred": "5"}])
    words = [
        "--config=configs/grade.py",
        f"--config.pairs={path}",
        "--config.bare=true",
        f"--workdir={tmp_path}/out",
    ]
    run = subprocess.run(
        [sys.executable, "run.py", *words], cwd=root, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert verdicts_of(tmp_path / "out") == [{"id": 1, "verdict": "correct", "extracted": "5"}]
