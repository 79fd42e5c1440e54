"""Law 6 on the real command: killed at random moments and started again, a run ends as if it had never been killed."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from smallmath_jax.records import read_parts

ROOT = pathlib.Path(__file__).parent.parent
SHORT = (
    "--config.sft.problems=600",
    "--config.sft.steps=24",
    "--config.sft.optimizer.warmup_steps=4",
    "--config.grpo.problems=64",
    "--config.grpo.prompts=8",
    "--config.grpo.steps=6",
    "--config.eval.limit=24",
    "--config.checkpoint.every=5",
    "--config.export=False",
)
KILLS = 4
CLOCKS = ("time/", "step_time", "tokens_per_second", "engine/", "recompile/")


def command(workdir):
    return [
        sys.executable,
        "run.py",
        "--config=configs/grpo.py:tiny",
        f"--workdir={workdir}",
        *SHORT,
    ]


def environment():
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


def logged(folder):
    rows = sorted(read_parts(folder / "metrics"), key=lambda row: row["step"])
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in rows]


def newest_arrays(folder):
    import orbax.checkpoint as ocp

    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((folder / f"{steps[-1]:08d}" / "model").resolve())
    flat = {}

    def visit(prefix, node):
        for name, value in node.items():
            visit(f"{prefix}/{name}", value) if isinstance(value, dict) else flat.update(
                {f"{prefix}/{name}": value}
            )

    visit("", tree)
    return flat


def start(workdir):
    """The command in a session of its own, so that a kill takes its children along."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        command(workdir),
        cwd=ROOT,
        env=environment(),
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
    )


def file_count(workdir):
    """How far a run is: files it has published, of whatever kind."""
    return sum(len(files) for _, _, files in os.walk(workdir))


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_runs_end_bit_identically(tmp_path, seed):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(command(whole), cwd=ROOT, check=True, env=environment(), capture_output=True)
    chance = random.Random(seed)
    # Kills follow what is on disk and not the clock: a warm compile cache makes the second run much the faster one.
    moments = sorted(chance.uniform(0.05, 0.9) * file_count(whole) for _ in range(KILLS))
    for moment in moments:
        process = start(broken)
        while file_count(broken) < moment and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.random() / 2)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(broken).wait() == 0
    for stage in (".", "sft"):
        assert logged(broken / stage) == logged(whole / stage)
        ours, theirs = (
            newest_arrays(broken / stage / "checkpoints"),
            newest_arrays(whole / stage / "checkpoints"),
        )
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    for folder in ("completions", "eval/before/completions", "eval/after/completions"):
        key = lambda row: (
            row["step"],
            row["problem_id"],
            str(row["extra"].get("decoding")),
            row["sample"],
        )
        assert sorted(read_parts(broken / folder), key=key) == sorted(
            read_parts(whole / folder), key=key
        )
