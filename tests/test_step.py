"""The train step: law 1 (how the batch is cut changes no gradient), law 2 (pi_old), what trains and what does not."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import step_case as case

from smallmath_jax.models import lora
from smallmath_jax.models.tree import named_leaves
from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.train import losses
from smallmath_jax.train import step as steps


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("float64", 1e-10)])
def test_packing_padding_and_microbatches_change_no_gradient(dtype, limit):
    with jax.enable_x64(dtype == "float64"):
        model = case.make_model(dtype=dtype)
        sequences = case.make_sequences()
        compute = lambda **options: steps.Compute(
            dtype=jnp.dtype(dtype), banned_ids=case.BANNED, **options
        )
        # One a row, mostly padding; packed into three microbatches of one row, the head in chunks, layers recomputed.
        alone = case.layout(sequences, 70, packed=False)
        cut = case.layout(sequences, 64, microbatches=3)
        expected, metrics = case.gradient(model, alone, compute=compute())
        found, same = case.gradient(model, cut, compute=compute(head_chunk=20, remat="full"))
        assert case.distance(found, expected) <= limit
        for name in metrics.keys() - {"clip_ratio/low_min", "clip_ratio/high_max"}:
            assert float(same[name]) == pytest.approx(float(metrics[name]), rel=1e-5), name
        used = [name for name, x in expected.items() if np.any(x)]
        assert len(used) == len(expected)  # the vision tower too


ON_EIGHT_DEVICES = """
import jax, jax.numpy as jnp, sys
jax.config.update("jax_enable_x64", True)
import step_case as case
from smallmath_jax.parallel import hosts, mesh as meshes, rules
from smallmath_jax.train import step as steps

assert jax.device_count() == 8
model, sequences = case.make_model(dtype=jnp.float64), case.make_sequences()
batch = case.layout(sequences, 64, microbatches=2, rows=16)
compute = steps.Compute(dtype=jnp.float64, banned_ids=case.BANNED, head_chunk=192)
expected, metrics = case.gradient(model, batch, compute=compute)
for shape in eval(sys.argv[1]):
    mesh = meshes.make_mesh(*shape)
    placed = jax.device_put(model, rules.shardings(model, mesh))
    cut = hosts.global_batch(batch, mesh, leading=1)
    compute = steps.Compute(
        dtype=jnp.float64, banned_ids=case.BANNED, head_chunk=192,
        constrain=rules.constrain(mesh), constrain_head=rules.constrain_head(mesh),
    )
    found, same = case.gradient(placed, cut, compute=compute)
    gap = case.distance(found, expected)
    assert gap <= 1e-10, (shape, gap)
    assert abs(float(same["loss"] - metrics["loss"])) < 1e-10
    print(shape, gap)
"""


def on_eight_devices(shapes):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(case.__file__), *sys.path]),
    }
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, repr(shapes)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.full
def test_every_mesh_of_eight_gives_the_gradient_of_one_in_float64():
    on_eight_devices([(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 4, 2), (1, 1, 8)])


def text_batch(microbatches=2, row_length=64, **changes):
    """Sequences without images, no vision arrays."""
    sequences = [sequence for sequence in case.make_sequences(9) if not sequence.patches]
    return case.layout(sequences, row_length, microbatches, row_patches=0) | changes


@pytest.fixture(scope="module")
def trained():
    """Three SFT updates with the vision tower and one matrix frozen."""
    optimizer, schedule = case.optimizer(schedule="constant", warmup_steps=0)
    state = jax.jit(lambda m: steps.init_state(m, optimizer, FREEZE))(case.make_model())
    start = jax.device_get(state)
    step = steps.make_train_step(
        "sft", optimizer, trainable=FREEZE, schedule=schedule, compute=COMPUTE
    )
    history = []
    for _ in range(3):
        old, (state, metrics) = state, step(state, text_batch())
        history.append(jax.device_get(metrics))
    return start, state, history, old


FREEZE = r"(?!vision/.*|text/layers/up/kernel).*"
COMPUTE = steps.Compute(banned_ids=case.BANNED)


def test_training_lowers_the_loss_and_reports(trained):
    start, state, history, _ = trained
    losses_seen = [float(metrics["loss"]) for metrics in history]
    assert losses_seen[2] < losses_seen[1] < losses_seen[0]
    assert int(state.step) == 3
    assert history[0].keys() == {
        "loss",
        "entropy",
        "mean_token_accuracy",
        "trained_tokens",
        "grad_norm",
        "param_norm",
        "learning_rate",
    }
    parameters = steps.split_trainable(state.model, FREEZE)
    norm = np.sqrt(sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in parameters.values()))
    assert history[2]["param_norm"] == pytest.approx(norm, rel=1e-5)
    assert history[0]["learning_rate"] == pytest.approx(1e-2)


def test_frozen_parameters_keep_their_bits_and_have_no_moments(trained):
    start, state, _, _ = trained
    frozen = lambda name: name.startswith("vision/") or name == "text/layers/up/kernel"
    for (name, before), (_, after) in zip(
        named_leaves(start.model), named_leaves(state.model), strict=True
    ):
        assert np.array_equal(before, after) == frozen(name), name
    moments = [name for name, _ in named_leaves(state.opt_state)]
    assert any(name.endswith("mu/text/embed") for name in moments)
    assert not any("vision/" in name or name.endswith("up/kernel") for name in moments)


def test_the_old_state_is_donated(trained):
    *_, old = trained
    assert old.model.text.embed[...].is_deleted()


def test_one_update_equals_optax_on_the_whole_gradient():
    optimizer, _ = case.optimizer(clip_norm=0.01)
    model = case.make_model()
    state = jax.jit(lambda m: steps.init_state(m, optimizer))(model)
    batch = text_batch()
    gradient, _ = case.gradient(model, batch, compute=COMPUTE)

    @functools.partial(jax.jit, compiler_options=case.QUICK)
    def update(gradient, state):
        parameters = steps.split_trainable(state.model, None)
        updates, _ = optimizer.update(gradient, state.opt_state, parameters)
        return optax.apply_updates(parameters, updates)

    expected = update(gradient, state)
    step = steps.make_train_step(
        "grpo", optimizer, compute=COMPUTE, loss_settings=case.GRPO, donate=False
    )
    found, metrics = step(state, batch)
    for name, leaf in named_leaves(found.model):
        np.testing.assert_allclose(leaf, expected[name], atol=1e-5)
    norm = np.sqrt(sum((np.asarray(x) ** 2).sum() for x in gradient.values()))
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)  # before clipping


def test_lora_trains_only_its_own_leaves():
    model = lora.add_lora(case.make_model(), 2, 4.0, r"text/layers/.*", jax.random.key(0))
    batch = text_batch()
    names = steps.split_trainable(model, r".*/lora_[ab]")
    assert names and all(name.rsplit("/", 1)[1] in ("lora_a", "lora_b") for name in names)
    optimizer, _ = case.optimizer()
    state = jax.eval_shape(lambda m: steps.init_state(m, optimizer, r".*/lora_[ab]"), model)
    assert all("lora" in name for name, leaf in named_leaves(state.opt_state) if leaf.shape)
    found, _ = case.gradient(model, batch, "sft", COMPUTE, r".*/lora_[ab]")
    assert found.keys() == names.keys()
    assert np.any(found["text/layers/q/lora_b"])  # a's gradient is 0 while b is 0


def test_pi_old_recomputed_before_the_update_gives_ratio_one():
    model, batch = case.make_model(), text_batch(microbatches=1)
    flat = jax.tree.map(lambda x: x[0], batch)
    old = np.asarray(jax.jit(lambda m, b: steps.score_batch(m, b, COMPUTE).log_probs)(model, flat))
    recomputed = batch | {"old_log_probs": old[None]}
    _, metrics = case.gradient(model, recomputed, compute=COMPUTE, settings={})
    assert float(metrics["clip_ratio/region_mean"]) == 0
    expected = -(flat["weights"] * flat["advantages"]).sum()  # every ratio is 1
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    gaps = np.abs(old - flat["sampler_log_probs"])[flat["weights"] != 0]
    found = float(metrics["sampling/sampling_logp_difference/max"])
    assert found == pytest.approx(gaps.max(), rel=1e-5)
    assert (old[flat["weights"] == 0] == 0).all()


def judged_batch(plan, model_rows):
    """Sequences as rows of a value batch: `plan` lists the sequences of each microbatch, which hold whole pairs."""
    sequences = [s for s in case.make_sequences(9) if not s.patches]
    parts = []
    for members in plan:
        chosen = [sequences[i] for i in members]
        part = case.layout(chosen, 64, rows=model_rows, packed=len(plan) == 1, row_patches=0)
        tokens, ends = part["tokens"][0], []
        for sequence in chosen:
            length = len(sequence.token_ids)
            places = [
                (row, start)
                for row in range(len(tokens))
                for start in range(tokens.shape[1] - length + 1)
                if np.array_equal(tokens[row, start : start + length], sequence.token_ids)
            ]
            ends.append((places[0][0], places[0][1] + length - 1))
        pairs = np.array([[0, 1], [0, 0]] if len(plan) > 1 else [[0, 1], [2, 3]], np.int32)
        part |= {
            "ends": np.array([ends], np.int32),
            "dropout_keys": np.array([[[7, i] for i in members]], np.uint32),
            "pairs": pairs[None],
            "pair_weights": np.array([[0.5, 0.0 if len(plan) > 1 else 0.5]], np.float32),
        }
        parts.append(part)
    return jax.tree.map(lambda *x: np.concatenate(x), *parts)


def test_ppm_gradient_does_not_depend_on_microbatches_or_packing():
    model = add_value_head(case.make_model(), jax.random.key(1))
    options = dict(loss="ppm", compute=steps.Compute(), value_dropout=0.5)
    whole, metrics = case.gradient(model, judged_batch([[0, 1, 2, 3]], 2), **options)
    cut, same = case.gradient(model, judged_batch([[0, 1], [2, 3]], 3), **options)
    assert case.distance(cut, whole) <= 1e-5
    assert np.any(whole["value_head/kernel"]) and np.any(whole["text/layers/q/kernel"])
    assert float(same["loss"]) == pytest.approx(float(metrics["loss"]), rel=1e-5)
    assert float(same["accuracy"]) == float(metrics["accuracy"])


def test_gradients_stay_float32_when_computing_in_bfloat16():
    compute = steps.Compute(dtype=jnp.bfloat16, banned_ids=case.BANNED, remat="full")
    objective = steps.make_objective("sft", compute)
    model = case.make_model()
    run = lambda model, batch: steps.accumulate(
        objective, steps.split_trainable(model, None), model, batch
    )
    gradient, metrics = jax.eval_shape(run, model, text_batch())
    assert {x.dtype for x in gradient.values()} == {jnp.dtype("float32")}
    assert metrics["loss"].dtype == jnp.float32


def test_mistakes_are_named():
    optimizer, _ = case.optimizer()
    with pytest.raises(ValueError, match="known: sft, grpo, ppm, pqm, orm"):
        steps.make_train_step("dpo", optimizer)
    with pytest.raises(ValueError, match="matches the whole name of no parameter"):
        steps.init_state(case.make_model(), optimizer, "vision")
    with pytest.raises(ValueError, match="no value head"):
        jax.eval_shape(
            steps.make_objective("ppm", steps.Compute()),
            {},
            case.make_model(),
            {**jax.tree.map(lambda x: x[0], text_batch()), "ends": np.zeros((1, 2), np.int32)},
        )
    assert set(losses.TOKEN_LOSSES) | set(losses.VALUE_LOSSES) == {
        "sft",
        "grpo",
        "ppm",
        "pqm",
        "orm",
    }
