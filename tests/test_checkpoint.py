"""Checkpoints: what comes back, what is kept, what a kill or a bad disk leaves."""

import errno
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import step_case as case

from smallmath_jax.train import checkpoint
from smallmath_jax.train import step as steps
from smallmath_jax.train.checkpoint import Checkpoints


@pytest.fixture(scope="module")
def state():
    """A state whose every leaf differs from a fresh one."""
    optimizer, _ = case.optimizer()
    empty = jax.eval_shape(lambda m: steps.init_state(m, optimizer), case.make_model())
    rng = np.random.default_rng(1)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 9, leaf.dtype)
    return jax.tree.map(draw, empty)


def assert_same(found, expected):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert jax.tree.structure(found) == jax.tree.structure(expected)


def marked(state, step):
    """The state with a step number of its own."""
    return steps.TrainState(jnp.asarray(step, jnp.int32), state.model, state.opt_state)


def abstract(state):
    return jax.eval_shape(lambda x: x, state)


def test_save_and_restore_bit_for_bit(tmp_path, state):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.latest_step() is None
        checkpoints.save(3, state, {"epoch": 1, "config": "ab12"})
    with Checkpoints(tmp_path / "c") as checkpoints:
        found, cursor = checkpoints.restore(abstract(state))
        assert_same(found, state)
        assert cursor == {"step": 3, "epoch": 1, "config": "ab12"}
        assert_same(checkpoints.restore_model(abstract(state.model)), state.model)
        checkpoints.save(3, state)  # there already: nothing to do
        with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are \[3\]"):
            checkpoints.restore_model(state.model, step=5)


def test_newest_and_best_are_kept(tmp_path, state):
    options = dict(keep=2, best_metric="reward", asynchronous=False)
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, reward in ((1, 0.1), (2, 0.9), (3, 0.3), (4, 0.2), (5, 0.4)):
            checkpoints.save(step, marked(state, step), metrics={"reward": np.float32(reward)})
        assert sorted(path.name for path in tmp_path.glob("0*")) == [
            "00000002",
            "00000004",
            "00000005",
        ]
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (5, 2)
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() == 2


def test_a_checkpoint_being_cut_off_is_ignored_and_removed(tmp_path, state, capsys):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    torn = tmp_path / "00000006.orbax-checkpoint-tmp"
    (torn / "model").mkdir(parents=True)
    (torn / "model" / "manifest").write_text("half")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.restore_model(state.model)
        assert torn.exists()  # reading another run's weights changes nothing there
        found, cursor = checkpoints.restore(state)
        assert cursor["step"] == 3 and not torn.exists()
        assert "00000006" in capsys.readouterr().err
        checkpoints.save(6, state)
        checkpoints.wait()
        assert checkpoints.latest_step() == 6


def test_a_damaged_checkpoint_is_set_aside_with_a_message(tmp_path, state, capsys):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, marked(state, 3))
        checkpoints.save(6, marked(state, 6))
    for data in (tmp_path / "00000006" / "model").rglob("d/*"):
        data.write_bytes(b"")
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        found, cursor = checkpoints.restore(state)
        assert cursor["step"] == 3 and int(found.step) == 3
        message = capsys.readouterr().err
        assert "00000006 cannot be read" in message and "continuing from step 3" in message
        assert (tmp_path / "damaged-00000006").exists()
        checkpoints.save(6, marked(state, 6))
        assert checkpoints.latest_step() == 6


def failing(checkpoints, monkeypatch, *errors):
    """Reading raises these errors first, one a call, then reads. Returns the steps tried."""
    read, tried, left = checkpoints._read, [], list(errors)

    def attempt(step, wanted):
        tried.append(step)
        error = left.pop(0) if left else None
        if error is not None:
            raise error
        return read(step, wanted)

    monkeypatch.setattr(checkpoints, "_read", attempt)
    return tried


@pytest.fixture
def two_steps(tmp_path, state, monkeypatch):
    monkeypatch.setattr(checkpoint, "RETRY_PAUSES", (0.0, 0.0))
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, marked(state, 3))
        checkpoints.save(6, marked(state, 6))
        yield checkpoints
    assert (tmp_path / "00000006").exists() and not list(tmp_path.glob("damaged*"))


def test_what_is_out_of_reach_for_a_moment_is_read_again(two_steps, state, monkeypatch):
    busy = ValueError("Error reading gs://b/c: HTTP response code: 503")
    tried = failing(two_steps, monkeypatch, busy, OSError("connection reset"))
    assert two_steps.restore(state)[1]["step"] == 6 and tried == [6, 6, 6]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (OSError("503 backend error"), 3),
        (PermissionError("denied"), 3),
        (MemoryError("host"), 1),
        (RuntimeError("RESOURCE_EXHAUSTED: out of memory allocating 9 bytes"), 1),
    ],
)
def test_a_whole_checkpoint_is_never_set_aside(two_steps, state, monkeypatch, error, attempts):
    tried = failing(two_steps, monkeypatch, *[error] * 9)
    with pytest.raises(OSError if attempts > 1 else type(error), match=str(error)):
        two_steps.restore(state)
    assert tried == [6] * attempts


def test_hosts_accept_or_set_aside_a_checkpoint_together(two_steps, state, monkeypatch):
    """What one host alone finds damaged, and what one host alone cannot reach, is no host's checkpoint."""
    for mine, other in (
        (None, ["damaged", "truncated"]),
        (None, ["out of reach", "503"]),
        (ValueError("DATA_LOSS: truncated"), ["read", "read"]),
    ):
        with monkeypatch.context() as patch:
            both = lambda value, other=other: [value, other if isinstance(value[0], str) else value]
            patch.setattr(checkpoint.hosts, "gather", both)
            patch.setattr(checkpoint.hosts, "broadcast", lambda value: value)
            failing(two_steps, patch, *[mine] * 9)
            with pytest.raises(OSError, match="00000006 is not read by every host: .*Nothing was"):
                two_steps.restore(state)


def test_no_readable_checkpoint_is_an_error(tmp_path, state):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, state)
    for data in tmp_path.rglob("d/*"):
        data.write_bytes(b"")
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(RuntimeError, match=r"none of the checkpoints \[3\] can be read"):
            checkpoints.restore(state)
    assert (tmp_path / "00000003").exists()


def test_another_model_is_named_and_nothing_is_moved(tmp_path, state):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, state)
        smaller = jax.tree.map(lambda leaf: leaf, state)
        smaller.model.text.norm = type(state.model.text.norm)(jnp.ones(7))
        with pytest.raises(ValueError, match=r"model text/norm has shape \(32,\) .* and \(7,\)"):
            checkpoints.restore(smaller)
        with pytest.raises(ValueError, match="text/norm"):
            checkpoints.restore_model(smaller.model)
        assert checkpoints.restore(state)[1]["step"] == 3


def test_a_full_disk_is_one_clear_message(tmp_path, state, monkeypatch):
    checkpoints = Checkpoints(tmp_path, asynchronous=False)
    checkpoints.save(3, state)
    full = lambda *_, **__: (_ for _ in ()).throw(ValueError("DATA_LOSS: No space left on device"))
    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        OSError, match="the disk is full: checkpoint of step 4 in .* GiB are free"
    ) as caught:
        checkpoints.save(4, state)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    checkpoints.close()


ONTO_A_MESH = """
import sys, jax, numpy as np
import step_case as case
from smallmath_jax.parallel import mesh as meshes, rules
from smallmath_jax.train import checkpoint
from smallmath_jax.train import step as steps
from smallmath_jax.train.checkpoint import Checkpoints

optimizer, _ = case.optimizer()
like = jax.eval_shape(lambda m: steps.init_state(m, optimizer), case.make_model())
mesh = meshes.make_mesh(2, 2, 2)
places = rules.shardings(like, mesh)
with Checkpoints(sys.argv[1], asynchronous=False) as checkpoints:
    state, cursor = checkpoints.restore(like, places)
    assert cursor["step"] == 3
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    assert not state.model.text.layers.q.kernel[...].is_fully_replicated
    checkpoints.save(4, state, cursor)
"""


def test_restore_onto_another_mesh_and_back(tmp_path, state):
    with Checkpoints(tmp_path, asynchronous=False) as checkpoints:
        checkpoints.save(3, state)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(case.__file__), *sys.path]),
    }
    command = [sys.executable, "-c", ONTO_A_MESH, str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    with Checkpoints(tmp_path) as checkpoints:
        found, cursor = checkpoints.restore(state)
        assert cursor["step"] == 4
        assert_same(found, state)
        assert checkpoints.latest_step() == 4
