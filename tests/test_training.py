"""A stage's layout and memory: rows for whatever the sampler brings, and one copy of the fp32 weights."""

import gc
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_configs import load

from smallmath_jax.data.batches import pack
from smallmath_jax.data.tiny import tiny_problems
from smallmath_jax.models.tree import map_named
from smallmath_jax.records import PreferencePair
from smallmath_jax.rollout.engine import Rollout
from smallmath_jax.tasks import grpo, ppm, sft, training
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for
from smallmath_jax.train.loop import StopSignal
from smallmath_jax.train.step import TrainState
from smallmath_jax.verify import rewards


def settings_of(**changes):
    return SimpleNamespace(**(dict(row_length=400, row_patches=32, microbatch_rows=4) | changes))


def test_the_layout_holds_pictures_however_they_pack():
    """64 pictures of 16 patches fill 32 rows of 32 patches, though four of their 100 tokens would share a row."""
    settings = settings_of()
    assert len(pack([100] * 64, [16] * 64, 400, 32)) == 32
    assert training.microbatches_for(64, 100, 16, settings) * settings.microbatch_rows == 32
    assert training.microbatches_for(64, 100, 0, settings) * settings.microbatch_rows == 16
    chance = np.random.default_rng(0)
    for _ in range(200):
        count, longest, most = (int(chance.integers(1, high)) for high in (50, 401, 33))
        lengths = chance.integers(1, longest + 1, count)
        patches = chance.integers(0, most + 1, count) * chance.integers(0, 2, count)
        rows = len(pack(lengths, patches, 400, 32))
        assert rows <= training.microbatches_for(count, longest, most, settings) * 4


def test_a_sequence_that_fits_no_row_is_told_before_anything_is_compiled():
    with pytest.raises(ValueError, match="row_patches 32 .* vision.max_patches"):
        training.microbatches_for(8, 100, 33, settings_of())
    with pytest.raises(ValueError, match="row_length 400 .* prompt.max_tokens"):
        training.microbatches_for(8, 401, 0, settings_of())


# ---- one copy of the fp32 weights


def live_bytes(shapes):
    """Bytes of all arrays of these shapes on the device, whoever holds them; views of a buffer count once."""
    gc.collect()
    alive = [array for array in jax.live_arrays() if array.shape in shapes]
    return sum({one.unsafe_buffer_pointer(): one.nbytes for one in alive}.values())


@pytest.fixture
def stepped(monkeypatch):
    """Steps that add 1 to every weight and note the bytes of weights and moments; the list of what they saw."""
    seen = []

    def make_train_step(*_, **__):
        def step(state, batch):
            model = map_named(lambda _, leaf: leaf + 1, state.model)
            for leaf in jax.tree.leaves(state.model):
                leaf.delete()  # as donation does
            seen.append(live_bytes({leaf.shape for leaf in jax.tree.leaves(model)}))
            return TrainState(state.step + 1, model, state.opt_state), {"loss": 0.0}

        return step

    monkeypatch.setattr(training.steps, "make_train_step", make_train_step)
    return seen


def config_of(task):
    config = load(task, "tiny")
    config.checkpoint.every = 2
    for stage in ("sft", "grpo", "ppm"):
        if stage in config:
            config[stage].optimizer.name = "adamw"
    return config


def is_trained(policy, first, steps):
    """Whether the policy holds readable weights: the first ones, `steps` added."""
    found = np.asarray(jax.tree.leaves(policy.model)[0])
    return np.allclose(found, first + steps, atol=1e-5)


def stage_of(task, policy, config, mesh, folder, monkeypatch):
    """Runs a task's training stage with an engine and problems of no size."""
    problems = tiny_problems("train", 4, 0)
    with StopSignal() as stop:
        if task == "sft":
            config.sft.update({"steps": config.steps, "problems": 4, "rows": 4})
            return sft.fine_tune(policy, config, folder, mesh, stop)
        if task == "ppm":
            config.ppm.update({"steps": config.steps, "pairs": 2, "eval_every": 0, "held_out": 0.0})
            pairs = [PreferencePair(p.id, [], [5, 6], [7], 1, 1, 1.0, "step") for p in problems]
            return ppm.train_judge(policy, problems, pairs, [], config, folder, mesh, stop)
        config.grpo.update({"steps": config.steps, "prompts": 2, "group_size": 2, "updates": 1})
        end = policy.tokens.im_end
        drawn = [Rollout(np.array([5 + n, end]), np.zeros(2), "eos", 0) for n in range(2)]
        monkeypatch.setattr(grpo, "sample_groups", lambda _, asked, *__: [drawn] * len(asked))
        monkeypatch.setattr(grpo.rewards, "reward", paid)
        engine = SimpleNamespace(set_weights=lambda *_: None, counters=dict)
        monkeypatch.setattr(grpo.grpo_metrics, "log_samples", lambda *_: None)
        asked = prompts_for(problems, policy, config)[:2]
        settings = rewards.from_config(config.reward)
        return grpo.improve(policy, engine, asked, [], settings, config, folder, mesh, stop)


def paid(parsed, *_, text, **__):
    """Rewards that differ within a group."""
    return rewards.RewardParts(total=float(ord(text[0])), format=0.0, length=0.0, correct=0.0)


@pytest.mark.parametrize("task", ["sft", "grpo", "ppm"])
def test_the_weights_lie_in_memory_once_while_steps_run(task, tmp_path, stepped, monkeypatch):
    config = config_of(task)
    mesh = make_mesh(config)
    for start, steps in ((0, 2), (2, 4)):  # from the loaded model, then from its checkpoint
        (tmp_path / "done.json").unlink(missing_ok=True)
        policy = load_policy(config, mesh)
        shapes = {leaf.shape for leaf in jax.tree.leaves(policy.model)}
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(policy.model))
        before = live_bytes(shapes) - weights
        first = np.array(jax.tree.leaves(policy.model)[0])
        config.steps = steps
        stepped.clear()
        found = stage_of(task, policy, config, mesh, tmp_path, monkeypatch)
        assert len(stepped) == steps - start
        held = [(alive - before) / weights for alive in stepped]
        assert all(ratio < 3.01 for ratio in held), held  # weights and AdamW's two moments
        assert is_trained(found, first, steps)
        assert (live_bytes(shapes) - before) / weights < 1.01
        del policy, found
