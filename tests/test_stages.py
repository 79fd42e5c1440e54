"""What a training stage does around its steps: logs before checkpoints, and nothing kept of what will be run again."""

import contextlib
import signal
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from smallmath_jax.records import read_parts, write_part
from smallmath_jax.tasks import stages
from smallmath_jax.train.loop import part_name

MODEL = np.zeros(2)


class Keeper:
    """Checkpoints that keep only, for each step saved, which steps' logs were published by then."""

    def __init__(self, folder, restored=None):
        self.folder, self.restored, self.saved, self.waited = folder, restored, {}, 0

    def latest_step(self):
        return self.restored[1]["step"] if self.restored else None

    def restore(self, like, shardings):
        return self.restored

    def save(self, step, state, metrics=None):
        self.saved[step] = steps_logged(self.folder)

    def wait(self):
        assert not (self.folder / "done.json").exists()  # done only when all is on disk
        self.waited += 1

    def close(self):
        pass


def steps_logged(folder):
    return [row["step"] for row in read_parts(folder / "metrics")]


def open_stage(folder, monkeypatch, restored=None, total=7, stop=None):
    keeper = Keeper(folder, restored)
    monkeypatch.setattr(stages, "Checkpoints", lambda *_, **__: keeper)
    trainer = SimpleNamespace(
        init_fn=lambda model: model, policy=SimpleNamespace(model=MODEL), state_shardings=None
    )
    config = ConfigDict({"checkpoint": {"every": 3, "keep": 2}, "watchdog_s": 60.0})
    stop = stop or SimpleNamespace(requested=False, exit_code=0)
    return stages.Stage(folder, config, trainer, total, "sft", stop), keeper


def test_a_checkpoint_never_runs_ahead_of_its_logs(tmp_path, monkeypatch):
    stage, keeper = open_stage(tmp_path, monkeypatch)
    with stage:
        state = stage.restore_or_start(MODEL)
        for step in range(stage.first, 7):
            stage.log(step + 1, {"loss": 1.0})
            stage.advance(step + 1, state)
            assert stages.is_done(tmp_path) == (step == 6)
    assert keeper.saved == {3: [1, 2, 3], 6: [*range(1, 7)], 7: [*range(1, 8)]}
    assert keeper.waited == 1


def test_what_will_be_run_again_is_dropped_before_it_is(tmp_path, monkeypatch):
    for folder in ("metrics", "completions"):
        write_part(tmp_path / folder, part_name(3, 0), [{"step": step} for step in (1, 2, 3)])
        write_part(tmp_path / folder, part_name(5, 0), [{"step": step} for step in (4, 5)])
    stage, _ = open_stage(tmp_path, monkeypatch, restored=("state", {"step": 3}))
    with stage:
        assert stage.restore_or_start(()) == "state" and stage.first == 3
        for folder in ("metrics", "completions"):
            assert [row["step"] for row in read_parts(tmp_path / folder)] == [1, 2, 3]
        stage.keep_completions(4, [{"step": 4}])
    assert [row["step"] for row in read_parts(tmp_path / "completions")] == [1, 2, 3, 4]


def test_a_stop_signal_saves_this_step_and_leaves(tmp_path, monkeypatch, capsys):
    stop = SimpleNamespace(requested=True, exit_code=128 + signal.SIGTERM)
    stage, keeper = open_stage(tmp_path, monkeypatch, stop=stop)
    with stage, pytest.raises(SystemExit) as left:
        state = stage.restore_or_start(MODEL)
        stage.log(1, {"loss": 1.0})
        stage.advance(1, state)
    assert left.value.code == 143 and keeper.saved == {1: [1]} and keeper.waited == 1
    assert not stages.is_done(tmp_path) and "the same command continues" in capsys.readouterr().out


def test_a_stage_is_watched_and_every_step_is_progress(tmp_path, monkeypatch):
    events = []

    @contextlib.contextmanager
    def watchdog(limit_s):
        events.append(limit_s)
        yield
        events.append("off")

    monkeypatch.setattr(stages.hosts, "watchdog", watchdog)
    monkeypatch.setattr(stages.hosts, "beat", events.append)
    stage, _ = open_stage(tmp_path, monkeypatch, total=2)
    with stage:
        state = stage.restore_or_start(MODEL)
        for step in (1, 2):
            stage.log(step, {"loss": 1.0})
            stage.advance(step, state)
    assert events == [60.0, "sft step 1", "sft step 2", "off"]
