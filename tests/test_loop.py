"""Metric parts, resume by dropping, progress lines, signals; and law 6: a training process killed at random moments."""

import concurrent.futures
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import google_crc32c
import jax.numpy as jnp
import numpy as np
import pytest
import step_case as case
from tensorboardX.proto import event_pb2

from smallmath_jax.records import read_parts, write_part
from smallmath_jax.train import loop
from smallmath_jax.train.loop import MetricWriter, Progress, StopSignal, part_name


def names(folder):
    return sorted(path.name for path in folder.glob("*"))


def test_one_object_a_step_in_immutable_parts(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 121):
        writer.write(step, {"loss": jnp.float32(0.5), "reward": np.float64(step), "note": "x"})
    assert names(tmp_path / "metrics") == [part_name(50, 0), part_name(100, 0)]
    writer.close()
    writer.flush()  # nothing left: no empty part
    assert names(tmp_path / "metrics") == [part_name(step, 0) for step in (50, 100, 120)]
    rows = list(read_parts(tmp_path / "metrics"))
    assert [row["step"] for row in rows] == list(range(1, 121))
    assert rows[3] == {"step": 4, "loss": 0.5, "reward": 4.0, "note": "x"}


def test_hosts_write_their_own_parts_and_only_the_first_events(tmp_path):
    for host in (0, 1):
        writer = MetricWriter(tmp_path, host=host)
        writer.write(1, {"loss": 1.0})
        writer.close()
    assert names(tmp_path / "metrics") == ["00000001-host0.jsonl", "00000001-host1.jsonl"]
    assert len(names(tmp_path / "tensorboard")) == 1


def test_resume_drops_every_later_record_on_every_host(tmp_path):
    for host in (0, 1, 2):
        for first in (1, 4, 7):
            steps = range(first, first + 3)
            rows = [{"step": step, "host": host} for step in steps]
            write_part(tmp_path / "metrics", part_name(steps[-1], host), rows)
        for step in range(1, 10):
            row = {"step": step, "text": "a\u2028b\x85"}  # a model may write what text splits at
            write_part(tmp_path / "completions", part_name(step, host), [row])
    MetricWriter(tmp_path, host=1).drop_after(5)  # as a host of two: its own
    assert part_name(9, 0) in names(tmp_path / "metrics")
    writer = MetricWriter(tmp_path, host=0)
    writer.drop_after(5)
    assert max(row["step"] for row in read_parts(tmp_path / "metrics")) == 5
    assert sum(1 for _ in read_parts(tmp_path / "metrics")) == 15
    assert [row["step"] for row in read_parts(tmp_path / "completions")] == sorted(
        [1, 2, 3, 4, 5] * 3
    )
    assert part_name(5, 2) in names(tmp_path / "metrics")  # the straddling part, cut
    before = names(tmp_path / "metrics")
    writer.drop_after(5)
    assert names(tmp_path / "metrics") == before
    writer.write(6, {"loss": 1.0})
    writer.close()
    assert max(row["step"] for row in read_parts(tmp_path / "metrics")) == 6


def test_a_foreign_file_among_the_parts_is_named(tmp_path):
    write_part(tmp_path / "metrics", "notes-hostX.jsonl", [{}])
    with pytest.raises(ValueError, match="notes-hostX.jsonl: not a log part"):
        MetricWriter(tmp_path).drop_after(3)


def read_events(path):
    """The events of a TensorBoard file by protobuf and a CRC-32C that are not ours."""
    data, place, found = path.read_bytes(), 0, []
    while place < len(data):
        head = data[place : place + 8]
        length = int.from_bytes(head, "little")
        body = data[place + 12 : place + 12 + length]
        for part, start in ((head, place + 8), (body, place + 12 + length)):
            crc = google_crc32c.value(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert int.from_bytes(data[start : start + 4], "little") == masked
        found.append(event_pb2.Event.FromString(body))
        place += 16 + length
    return found


def test_tensorboard_events_are_parts_dropped_with_the_metrics(tmp_path):
    writer = MetricWriter(tmp_path)
    before = time.time()
    for step in range(1, 301):
        writer.write(step, {"clip_ratio/low_mean": step / 8, "n": step, "note": "x", "bad": np.nan})
    writer.close()
    folder = tmp_path / "tensorboard"
    assert len(names(folder)) == 6
    events = [read_events(folder / name) for name in names(folder)]
    assert all(part[0].file_version == "brain.Event:2" for part in events)
    values = [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for part in events
        for event in part[2:]
    ]
    assert values == [
        (step, {"clip_ratio/low_mean": step / 8, "n": step}) for step in range(1, 301)
    ]
    assert before <= events[0][2].wall_time <= time.time()

    writer.drop_after(120)  # in the middle of a part
    last = [event.step for name in names(folder) for event in read_events(folder / name)][-1]
    assert last == 120 and len(names(folder)) == 3
    writer.write(121, {"loss": 1.0})
    writer.close()
    restart = read_events(folder / names(folder)[-1])[1]
    assert restart.session_log.status == event_pb2.SessionLog.START and restart.step == 121


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    with Progress(total=100, description="grpo", initial=90, every_s=0.05) as progress:
        for _ in range(10):
            progress.advance(reward=0.5, accuracy=0.25, length=28.4, tokens_per_second=12345.0)
            time.sleep(0.02)
        progress.say("--- a sample")
    lines = capsys.readouterr().err.splitlines()
    # The first step compiled, and says nothing about the others
    assert lines[0] == (
        "grpo 91/100 reward 0.5 accuracy 0.25 length 28.4 tokens_per_second 12,345 ETA after the next"
    )
    assert " ETA 00:00:" in lines[1]
    assert lines[-2].startswith("grpo 100/100") and lines[-1] == "--- a sample"
    assert 3 <= len(lines) < 11
    with Progress(total=2, description="sft", quiet=True) as progress:
        progress.advance(loss=1.0)
        progress.say("nothing")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_only_set_a_flag(number, code, capsys):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested and stop.exit_code == 0
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stop.requested and stop.exit_code == code
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
    assert signal.getsignal(number) is before
    assert "saving" in capsys.readouterr().err


# A whole training run, as the tasks are built: state from the newest checkpoint, data from the step number alone.
TRAIN = """
import sys, time
import jax, numpy as np
import step_case as case
from smallmath_jax.train import step as steps
from smallmath_jax.train.checkpoint import Checkpoints
from smallmath_jax.train.loop import MetricWriter, StopSignal

workdir, total, every = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
optimizer, schedule = case.optimizer()
sequences = [s for s in case.make_sequences(33) if not s.patches]
init = lambda: steps.init_state(case.make_model(), optimizer)
step_fn = steps.make_train_step("sft", optimizer, schedule=schedule)

def batch_of(step):
    order = np.random.default_rng(step).permutation(len(sequences))[:6]
    return case.layout([sequences[i] for i in order], 24, 2, rows=6, packed=False, row_patches=0)

with StopSignal() as stop, Checkpoints(workdir + "/checkpoints") as checkpoints:
    writer = MetricWriter(workdir)
    found = checkpoints.restore(jax.eval_shape(init))
    state, cursor = found or (jax.device_put(init()), {"step": 0})
    writer.drop_after(cursor["step"])
    print("started at", cursor["step"], flush=True)
    for step in range(cursor["step"], total):
        state, metrics = step_fn(state, batch_of(step))
        writer.write(step + 1, metrics)
        time.sleep(0.03)  # a step's length, so that kills fall everywhere
        print("step", step + 1, flush=True)
        if (step + 1) % every == 0 or step + 1 == total or stop.requested:
            writer.flush()
            checkpoints.save(step + 1, state)
        if stop.requested:
            checkpoints.wait()
            sys.exit(stop.exit_code)
    checkpoints.wait()
    writer.close()
    np.savez(workdir + "/end.npz", *jax.tree.leaves(state))
"""


def start(workdir, total, every, cache):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",  # a quick compile
        "PYTHONPATH": os.pathsep.join([os.path.dirname(case.__file__), *sys.path]),
    }
    command = [sys.executable, "-c", TRAIN, str(workdir), str(total), str(every)]
    with open(f"{workdir}.err", "a") as errors:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def result(workdir):
    with np.load(workdir / "end.npz") as arrays:
        leaves = [arrays[name] for name in arrays.files]
    return leaves, [json.dumps(row) for row in read_parts(workdir / "metrics")]


def kill_at_random(workdir, total, every, cache, kills, seed):
    """Runs to the end, killing the process `kills` times at random moments; returns the steps it started from.

    The last kill waits for a complete checkpoint, so that at least one start is a continuation.
    """
    rng, starts = random.Random(seed), []
    for remaining in range(kills, -1, -1):
        process = start(workdir, total, every, cache)
        line = process.stdout.readline()
        assert line.startswith("started at"), (workdir.parent / f"{workdir.name}.err").read_text()
        starts.append(int(line.split()[-1]))
        if remaining:
            kill_at = rng.randint(starts[-1], min(starts[-1] + 2 * every, total - 1))
            for line in process.stdout:
                saved = remaining > 1 or any((workdir / "checkpoints").glob("0" + "[0-9]" * 7))
                if int(line.split()[-1]) >= kill_at and saved:
                    break
            time.sleep(rng.random() * 0.1)
            process.kill()
        process.communicate()
    assert process.returncode == 0, (workdir.parent / f"{workdir.name}.err").read_text()
    return starts


def check_kills(tmp_path, total, every, kills, seed=0):
    cache = tmp_path / "cache"
    whole = start(tmp_path / "whole", total, every, cache)
    whole.communicate()
    assert whole.returncode == 0, (tmp_path / "whole.err").read_text()
    starts = kill_at_random(tmp_path / "killed", total, every, cache, kills, seed)
    expected, logs = result(tmp_path / "whole")
    found, killed_logs = result(tmp_path / "killed")
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert killed_logs == logs and len(logs) == total
    return starts


def test_killed_at_random_moments_it_ends_bit_identically(tmp_path):
    starts = check_kills(tmp_path, total=20, every=4, kills=2)
    assert starts[0] == 0 and starts[-1] > 0


@pytest.mark.full
@pytest.mark.parametrize("seed", range(3))
def test_killed_many_times_it_ends_bit_identically(tmp_path, seed):
    check_kills(tmp_path, total=60, every=5, kills=10, seed=seed)


def test_sigterm_finishes_the_step_saves_and_exits_143(tmp_path):
    process = start(tmp_path / "run", 1000, 400, tmp_path / "cache")
    while process.stdout.readline() not in ("", "step 3\n"):
        continue
    process.send_signal(signal.SIGTERM)
    rest = process.communicate()[0].splitlines()
    assert process.returncode == 143
    done = int(rest[-1].split()[-1]) if rest else 3
    assert (tmp_path / "run" / "checkpoints" / f"{done:08d}").exists()
    assert [row["step"] for row in read_parts(tmp_path / "run" / "metrics")] == list(
        range(1, done + 1)
    )


# ---- several hosts


class Host(threading.local):
    index = 0


@pytest.mark.parametrize("work", [(3, 40), (40, 3), (0, 40), (25, 25)])
@pytest.mark.parametrize("signalled", [None, 0, 1])
def test_hosts_with_unequal_work_leave_their_loops_together(monkeypatch, work, signalled):
    """Two threads stand for hosts; a collective that only one of them calls breaks the barrier."""
    here, meeting, told = Host(), threading.Barrier(2), [None, None]

    def gather(value):
        told[here.index] = value
        meeting.wait(5)
        both = list(told)
        meeting.wait(5)
        return both

    monkeypatch.setattr(loop.hosts, "gather", gather)
    monkeypatch.setattr(loop.hosts, "host_count", lambda: 2)
    monkeypatch.setattr(loop, "EXCHANGE_SECONDS", 0.01)

    def run(index):
        here.index = index
        stop = SimpleNamespace(requested=False, exit_code=143)
        together = loop.StopTogether(stop)
        left = work[index]
        while left and not together.asked():
            left -= 1
            time.sleep(0.002 * (1 + index))
            if signalled == index and left == work[index] - 2:
                stop.requested = True
        return together.finish(done=not left), left

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        (first, left), (second, other) = pool.map(run, range(2))
    assert first == second
    assert (first == 0) == (left == other == 0)
    if signalled is None:
        assert first == 0
    elif work[signalled] == 40:
        assert first == 143


def test_one_host_leaves_at_once_and_only_with_work_left():
    stop = SimpleNamespace(requested=False, exit_code=143)
    together = loop.StopTogether(stop)
    assert not together.asked() and together.finish(done=True) == 0
    stop.requested = True
    assert together.asked() and together.finish(done=False) == 143
    assert together.finish(done=True) == 0
    assert not loop.StopTogether(None).asked()
    assert loop.agreed_exit(stop) == 143
