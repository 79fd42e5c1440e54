"""export, solve and evaluate as commands, on a short run of the embedded problems and the folders it is exported to."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from smallmath_jax.records import read_parts

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.full

SHORT_RUN = (
    "--config.sft.problems=80",
    "--config.sft.steps=4",
    "--config.sft.worked_steps=2",
    "--config.sft.optimizer.warmup_steps=0",
    "--config.checkpoint.every=2",
    "--config.eval.before=False",
    "--config.eval.after=False",
    "--config.export=False",
)


def run(*words, fails=False):
    """What a command printed, its error output if it is to fail."""
    done = subprocess.run(
        [sys.executable, "run.py", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's workdir with checkpoints of steps 2 and 4, and the second as a folder."""
    place = tmp_path_factory.mktemp("commands")
    run("--config=configs/sft.py:tiny", f"--workdir={place / 'run'}", *SHORT_RUN)
    export(place, "newest")
    return place


def export(place, name, *words):
    source = f"--config.init_from={place / 'run'}"
    out = f"--config.out={place / name}"
    work = f"--workdir={place / 'work' / name}"
    return run("--config=configs/export.py:tiny", source, out, work, *words)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_a_chosen_step_is_exported_and_is_not_the_newest(trained):
    assert str(trained / "second") in export(trained, "second", "--config.step=2")
    export(trained, "last", "--config.step=4")
    newest, last, second = (tensors(trained / name) for name in ("newest", "last", "second"))
    assert newest.keys() == last.keys() == second.keys()
    for name, array in newest.items():
        np.testing.assert_array_equal(array, last[name], err_msg=name)
    assert any(not np.array_equal(array, second[name]) for name, array in newest.items())
    config = json.loads((trained / "newest" / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"


def solved(trained, source, *words):
    return run("--config=configs/solve.py:tiny", source, "--config.sampling.max_tokens=12", *words)


def test_one_problem_is_solved_alike_from_a_run_and_its_folder(trained, tmp_path):
    Image.new("RGB", (56, 56), (200, 30, 30)).save(tmp_path / "red.png")
    question = "--config.problem=How many squares are there?"
    image = f"--config.image={tmp_path / 'red.png'}"
    folder, workdir = (
        f"--config.model={trained / 'newest'}",
        f"--config.init_from={trained / 'run'}",
    )
    told = solved(trained, folder, question, image)
    assert "<think>" in told and "\nanswer: " in told
    assert solved(trained, workdir, question, image) == told
    missing = run(
        "--config=configs/solve.py:tiny", folder, question, "--config.image=no.png", fails=True
    )
    assert missing.startswith("solve: ") and "no.png" in missing
    long = run("--config=configs/solve.py:tiny", folder, question + " Or so?" * 40, fails=True)
    assert "prompt_too_long (raise prompt.max_tokens)" in long


def evaluated(trained, name, source, *words):
    return run(
        "--config=configs/evaluate.py:tiny",
        f"--workdir={trained / name}",
        source,
        "--config.eval.limit=4",
        "--config.eval.problems=('tiny:test',)",
        *words,
    )


def test_evaluations_stand_side_by_side(trained):
    workdir, folder = (
        f"--config.init_from={trained / 'run'}",
        f"--config.model={trained / 'newest'}",
    )
    evaluated(trained, "a/eval", workdir)
    evaluated(trained, "b/eval", folder)
    others = f"--config.compare=('{trained}/a/eval', '{trained}/b/eval')"
    evaluated(trained, "own", "--config.model=tiny", others)
    record = json.loads((trained / "own" / "report" / "report.json").read_text())
    names = {"evaluation", "a/eval: evaluation", "b/eval: evaluation"}
    assert set(record["evaluations"]) == names
    page = (trained / "own" / "report" / "index.html").read_text()
    assert all(name in page for name in names)
    rows = [
        [(row["problem_id"], row["text"]) for row in read_parts(trained / name / "completions")]
        for name in ("a/eval", "b/eval", "own")
    ]
    assert rows[0] == rows[1] and rows[0] != rows[2] and len(rows[0]) == 8
    identities = [
        json.loads((trained / name / "policy.json").read_text()) for name in ("a/eval", "b/eval")
    ]
    assert identities[0]["source"] == f"{trained / 'run' / 'checkpoints'}, step 4"
    assert identities[0]["weights"] == identities[1]["weights"]
