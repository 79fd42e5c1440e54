"""AdamW against torch, schedules against their formulas."""

from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
import torch

from smallmath_jax.train.optim import decays, make_optimizer, make_schedule

SETTINGS = dict(
    name="adamw",
    learning_rate=0.01,
    schedule="constant",
    warmup_steps=0,
    final_fraction=0.0,
    b1=0.9,
    b2=0.99,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,
)


def settings(**changes):
    return SimpleNamespace(**(SETTINGS | changes))


def rates(steps, **changes):
    schedule = make_schedule(settings(**changes), steps)
    return np.array([float(schedule(step)) for step in range(steps)]) / SETTINGS["learning_rate"]


def test_schedules():
    np.testing.assert_allclose(rates(5), 1)
    np.testing.assert_allclose(rates(6, warmup_steps=4), [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(rates(4, warmup_steps=1), 1)
    linear = rates(8, schedule="linear", warmup_steps=3, final_fraction=0.1)
    np.testing.assert_allclose(linear[3:], 1 - 0.9 * np.arange(5) / 5, rtol=1e-6)
    cosine = rates(8, schedule="cosine", warmup_steps=3)
    np.testing.assert_allclose(cosine[3:], (1 + np.cos(np.pi * np.arange(5) / 5)) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="constant, linear, cosine"):
        make_schedule(settings(schedule="step"), 3)


def test_adamw_with_clipping_equals_torch():
    rng = np.random.default_rng(0)
    start = {name: rng.normal(size=(4, 3)).astype(np.float32) for name in ("o/kernel", "norm")}
    gradients = [
        {name: rng.normal(size=(4, 3)).astype(np.float32) for name in start} for _ in range(5)
    ]
    optimizer, schedule = make_optimizer(
        settings(weight_decay=0.1, clip_norm=1.0, schedule="linear", warmup_steps=2), 5
    )

    @jax.jit
    def update(parameters, state, gradient):
        updates, state = optimizer.update(gradient, state, parameters)
        return optax.apply_updates(parameters, updates), state

    parameters, state = start, optimizer.init(start)
    for gradient in gradients:
        parameters, state = update(parameters, state, gradient)

    leaves = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    theirs = torch.optim.AdamW(
        [
            {"params": [leaves["o/kernel"]], "weight_decay": 0.1},
            {"params": [leaves["norm"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        eps=1e-8,
    )
    for step, gradient in enumerate(gradients):
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
        for group in theirs.param_groups:
            group["lr"] = float(schedule(step))
        theirs.step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(parameters[name], leaf.detach(), atol=2e-6)


def test_norms_and_biases_do_not_decay():
    names = [
        "text/embed",
        "text/layers/q/kernel",
        "vision/merger/fc1/kernel",
        "text/layers/q/lora_a",
    ]
    still = [
        "text/norm",
        "text/layers/input_norm",
        "text/layers/q/bias",
        "vision/blocks/norm1",
        "vision/merger/ln_q",
    ]
    found = decays(dict.fromkeys(names + still))
    assert [name for name, decay in found.items() if decay] == names


def test_muon_orthogonalises_each_layers_kernel_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    shapes = {
        "q/kernel": (2, 6, 4),
        "norm": (6,),
        "text/embed": (9, 6),
        "value_head/kernel": (6, 1),
    }
    draw = lambda: {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()
    }
    start, gradient = draw(), draw()

    def first(optimizer):
        run = lambda gradient: optimizer.update(gradient, optimizer.init(start), start)[0]
        return jax.device_get(jax.jit(run)(gradient))

    muon = first(make_optimizer(settings(name="muon", muon_learning_rate=0.02), 5)[0])
    for layer in range(2):
        left, _, right = np.linalg.svd(gradient["q/kernel"][layer], full_matrices=False)
        turned = (
            -left.T @ muon["q/kernel"][layer] @ right.T
        )  # diagonal: the gradient's own directions
        sizes = np.diag(turned)
        assert (
            sizes.min() > 0.5 * sizes.max() > 0
        )  # all about as far, however small their singular value
        assert np.abs(turned - np.diag(sizes)).max() < 0.05 * sizes.max()
    adam = first(optax.adamw(0.01, b2=0.99, weight_decay=0.0, nesterov=True))
    for name in ("norm", "text/embed", "value_head/kernel"):
        np.testing.assert_allclose(muon[name], adam[name], rtol=1e-5)
    with pytest.raises(ValueError, match="known: adamw, muon"):
        make_optimizer(settings(name="adam"), 5)
