"""Benchmark problems are kept out of training data: by runs of words, by pictures, and in a run that is told to."""

import dataclasses
import io
import json

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from smallmath_jax.data import converters
from smallmath_jax.data.decontaminate import decontaminate
from smallmath_jax.data.problems import Rows
from smallmath_jax.data.rows import to_problem
from smallmath_jax.records import Problem, write_part
from smallmath_jax.tasks.sources import name_of, training_problems


def ids(problems):
    return [problem.id for problem in problems]


def picture(seed, kind="PNG"):
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


TILES = Problem("h", "Find the number of ways to tile a 2 by 10 board with dominoes.", "89")


def test_a_run_of_words_is_a_shared_problem():
    benchmarks = {"boards": [TILES, Problem("s", "1+1?", "2")], "sums": [Problem("t", "1+1=", "2")]}
    problems = [
        Problem("a", "Alice asks: find the NUMBER of ways to tile a $2$ by 10 board!", "89"),
        Problem("b", "Find the number of ways to walk home.", "3"),
        Problem("c", "1 + 1 ?", "2"),
        Problem("d", "1+2?", "3"),
        Problem("e", "", "3"),
    ]
    kept, shared = decontaminate(problems, benchmarks)
    assert ids(kept) == ["b", "d", "e"]
    assert shared == {"boards": 2, "sums": 1}  # c is in both
    assert decontaminate(problems, {}) == (problems, {})


def test_the_same_picture_is_found_however_it_is_stored():
    held_out = [Problem("h", "<image>Find x.", "5", (picture(0),))]
    problems = [
        Problem("same", "What is the area?", "7", (picture(1), picture(0, "BMP"))),
        Problem("other", "<image> Find x.", "9", (picture(1),)),  # the short text says nothing
        Problem("text", "Find x.", "9"),
    ]
    kept, shared = decontaminate(problems, {"figures": held_out})
    assert ids(kept) == ["other", "text"] and shared == {"figures": 1}


@pytest.fixture
def run(tmp_path):
    """(config, folder) of a run with two training problems, one of them planted from the benchmark."""
    problem = lambda name, text: {"id": name, "problem": text, "answer": "1"}
    write_part(tmp_path, "bench.jsonl", [problem("h", TILES.problem)])
    planted = problem("planted", "Hint: 89. " + TILES.problem.lower())
    write_part(tmp_path, "train.jsonl", [problem("good", "What is 5 - 4?"), planted])
    (tmp_path / "config.json").write_text('{"config": {}}')
    config = ConfigDict(
        {
            "seed": 0,
            "data": {"decontaminate": (str(tmp_path / "bench.jsonl"),), "fields": {}},
            "sources": (),
        }
    )
    config.sources = (str(tmp_path / "train.jsonl"),)
    return config, tmp_path


@pytest.mark.parametrize("stage", [".", "sft"])
def test_a_planted_problem_is_left_out_and_told(run, stage, capsys):
    config, folder = run
    assert ids(training_problems(config.sources, 0, config, folder / stage)) == ["good"]
    assert "1 of 2 training problems" in (told := capsys.readouterr().out)
    assert "bench (1)" in told
    noted = json.loads((folder / "config.json").read_text())["training_data"]
    counts = {"problems": 2, "kept": 1, "dropped": {"shared with bench": 1}}
    assert noted == {
        config.sources[0]: counts | {"licence": {"not stated": 1}, "origin": {"train": 1}}
    }


def test_without_benchmarks_all_are_kept(run, capsys):
    config, folder = run
    config.data.decontaminate = ()
    assert len(training_problems(config.sources, 0, config, folder)) == 2
    assert not capsys.readouterr().out


def test_what_a_run_is_measured_on_is_left_out_too(run, capsys):
    config, folder = run
    held_out = config.data.decontaminate
    config.data.decontaminate = ()
    config.eval = ConfigDict({"problems": (*held_out, "tiny:test")})
    assert ids(training_problems(config.sources, 0, config, folder)) == ["good"]
    assert "they share text or pictures with bench (1)" in capsys.readouterr().out
    config.eval.problems = ("tiny:train",)  # an embedded source is no benchmark
    assert len(training_problems(("tiny:train",), 5, config, folder)) == 5


def test_counts_by_source_licence_and_reason(run, monkeypatch):
    config, folder = run
    rows = [{"problem": f"{n}?", "answer": n or None, "licence": "no"} for n in (0, 1, 2)]
    rows.append(rows[-1] | {"problem": TILES.problem})
    where = lambda n: f"row {n + 1}"
    monkeypatch.setattr(converters, "hub_rows", lambda *_: Rows(4, rows.__getitem__, where))
    plain = converters.PublicSet(("o/set",), "CC-BY", lambda row: _with_origin(row))
    monkeypatch.setitem(converters.CONVERTERS, "set", plain)
    sources = ("convert:set", config.sources[0])
    assert len(training_problems(sources, 0, config, folder)) == 3
    told = json.loads((folder / "config.json").read_text())["training_data"]
    assert told["convert:set"] == {
        "problems": 3,
        "kept": 2,
        "dropped": {"bad_row": 1, "shared with bench": 1},
        "licence": {"CC-BY": 2},
        "origin": {"contest": 2},
    }
    assert told[config.sources[0]]["licence"] == {"not stated": 1}


def _with_origin(row):
    return dataclasses.replace(to_problem(row), meta={"source": "contest"})


def test_training_on_the_benchmark_itself_is_refused(run):
    config, folder = run
    with pytest.raises(ValueError, match=r"bench.jsonl: all 1 problems share .* with bench"):
        training_problems(config.data.decontaminate, 0, config, folder)


def test_short_names():
    assert name_of("gs://bucket/math500.jsonl") == "math500" and name_of("math500") == "math500"
