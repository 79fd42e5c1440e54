"""Losses against torch, hand-computed values and the statements of law 1, 2 and 9."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.extend.core import jaxprs_in_params

from smallmath_jax.train import losses
from smallmath_jax.train.losses import Largest, Mean, Smallest, TokenScores, Total

B, T, D, V = 3, 10, 8, 37
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def head_inputs(rng, dtype=np.float32):
    hidden = rng.normal(size=(B, T, D)).astype(dtype)
    head = rng.normal(size=(V, D)).astype(dtype)
    tokens = rng.integers(0, V - 5, (B, T)).astype(np.int32)
    return hidden, head, tokens


def torch_scores(hidden, head, tokens, temperature, banned):
    """log-probs and entropy [B, T - 1] of tokens[:, 1:] in float64, and the leaves to differentiate."""
    hidden = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    head = torch.tensor(head, dtype=torch.float64, requires_grad=True)
    logits = (hidden @ head.T)[:, :-1] / torch.tensor(temperature[:, 1:, None])
    logits[..., banned] = -torch.inf
    log_probs = torch.log_softmax(logits, -1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    targets = torch.tensor(tokens[:, 1:, None], dtype=torch.long)
    return log_probs.gather(2, targets)[..., 0], entropy, hidden, head


@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_token_scores_equal_torch_forward_and_backward(rng, chunk):
    hidden, head, tokens = head_inputs(rng)
    temperature = rng.uniform(0.5, 2.0, (B, T))
    banned = [V - 1, V - 3]
    expected, entropy, torch_hidden, torch_head = torch_scores(
        hidden, head, tokens, temperature, banned
    )
    weights = rng.normal(size=(B, T))
    (expected * torch.tensor(weights[:, 1:])).sum().backward()

    def weighted(hidden, head):
        log_probs, entropy = losses.token_log_probs(
            hidden, head, tokens, temperature=temperature, banned_ids=banned, chunk=chunk
        )
        return (log_probs * weights).sum(), (log_probs, entropy)

    gradient, (found, found_entropy) = quick(jax.grad(weighted, (0, 1), has_aux=True))(hidden, head)
    assert (found[:, 0] == 0).all() and (found_entropy[:, 0] == 0).all()
    np.testing.assert_allclose(found[:, 1:], expected.detach(), atol=2e-5)
    np.testing.assert_allclose(found_entropy[:, 1:], entropy.detach(), atol=2e-5)
    np.testing.assert_allclose(gradient[0], torch_hidden.grad, atol=3e-5)
    np.testing.assert_allclose(gradient[1], torch_head.grad, atol=3e-5)


def test_scores_of_chosen_tokens_do_not_depend_on_what_else_is_scored(rng):
    hidden, head, tokens = head_inputs(rng)
    chosen = rng.random((B, T)) < 0.3
    chosen[1] = False  # a row without any
    run = quick(losses.score_tokens, static_argnames="chunk")
    whole = run(hidden, head, tokens)
    for chunk in (6, 1000):
        some = run(hidden, head, tokens, scored=chosen, chunk=chunk)
        for full, part in zip(whole, some, strict=True):
            np.testing.assert_allclose(part, np.where(chosen, full, 0), atol=1e-5)


def test_greedy_temperature_reads_as_one_and_hits_are_argmax(rng):
    hidden, head, tokens = head_inputs(rng)
    run = quick(losses.score_tokens)
    one = run(hidden, head, tokens, temperature=1.0)
    greedy = run(hidden, head, tokens, temperature=0.0)
    np.testing.assert_array_equal(one.log_probs, greedy.log_probs)
    best = np.argmax(hidden @ head.T, -1)[:, :-1]
    np.testing.assert_array_equal(one.hit[:, 1:], best == tokens[:, 1:])
    assert not one.hit[:, 0].any()


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for variable in itertools.chain(equation.invars, equation.outvars):
            yield getattr(variable.aval, "shape", ())
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_in(inner)


def test_no_array_of_all_logits_exists(rng):
    hidden, head, tokens = head_inputs(rng)
    loss = lambda hidden, head: losses.token_log_probs(hidden, head, tokens, chunk=6)[0].sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, head).jaxpr
    largest = max((s for s in shapes_in(jaxpr) if V in s and len(s) == 3), key=np.prod)
    assert 0 < np.prod(largest) <= 6 * V < B * T * V


def test_head_gradient_accumulates_in_float32(rng):
    hidden, head, tokens = head_inputs(rng)
    loss = lambda head, hidden: losses.token_log_probs(hidden, head, tokens, chunk=3)[0].sum()
    slope = quick(jax.grad(loss))
    exact = slope(head, hidden)
    rounded = slope(head.astype(jnp.bfloat16), hidden.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    assert np.linalg.norm(rounded - exact) / np.linalg.norm(exact) < 0.02


def scores_of(log_probs):
    log_probs = jnp.asarray(log_probs, jnp.float32)
    return TokenScores(log_probs, jnp.ones_like(log_probs), jnp.ones(log_probs.shape, bool))


def value(metric):
    return float(losses.reduce_metric(metric))


def test_sft_is_torch_cross_entropy(rng):
    hidden, head, tokens = head_inputs(rng)
    mask = rng.random((B, T)) < 0.5
    mask[:, 0] = False
    weights = mask / mask.sum()
    loss, metrics = losses.sft(
        quick(losses.score_tokens)(hidden, head, tokens), {"weights": jnp.asarray(weights)}
    )
    logits = torch.tensor(hidden @ head.T)[:, :-1]
    labels = torch.tensor(np.where(mask, tokens, -100)[:, 1:], dtype=torch.long)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert value(metrics["trained_tokens"]) == mask.sum()


def grpo_batch(rng):
    weights = rng.uniform(0.1, 1.0, (B, T)) * (rng.random((B, T)) < 0.7)
    return {
        "weights": weights.astype(np.float32),
        "advantages": np.repeat(rng.normal(size=(B, 1)), T, 1).astype(np.float32),
        "old_log_probs": rng.normal(-1, 0.4, (B, T)).astype(np.float32),
        "sampler_log_probs": rng.normal(-1, 0.4, (B, T)).astype(np.float32),
        "reference_log_probs": rng.normal(-1, 0.4, (B, T)).astype(np.float32),
    }


def test_grpo_equals_torch_with_every_option(rng):
    batch = grpo_batch(rng)
    log_probs = rng.normal(-1, 0.4, (B, T)).astype(np.float32)
    run = lambda x: losses.grpo(
        scores_of(x), batch, epsilon_low=0.2, epsilon_high=0.28, importance_cap=2.0, kl_beta=0.04
    )
    (loss, metrics), gradient = quick(jax.value_and_grad(run, has_aux=True))(log_probs)

    x = torch.tensor(log_probs, requires_grad=True)
    t = {name: torch.tensor(field) for name, field in batch.items()}
    ratio = torch.exp(x - t["old_log_probs"])
    pg = torch.min(ratio * t["advantages"], ratio.clamp(0.8, 1.28) * t["advantages"])
    pg = pg * torch.exp(t["old_log_probs"] - t["sampler_log_probs"]).clamp(max=2.0)
    gap = t["reference_log_probs"] - x
    kl = torch.exp(gap) - gap - 1
    expected = -(t["weights"] * (pg - 0.04 * kl)).sum()
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    np.testing.assert_allclose(gradient, x.grad, atol=1e-6)
    counted = batch["weights"] != 0
    assert value(metrics["kl"]) == pytest.approx(kl[counted].mean().item(), rel=1e-5)
    assert value(metrics["policy_loss"]) == pytest.approx(-(t["weights"] * pg).sum().item(), 1e-5)
    gaps = np.abs(batch["old_log_probs"] - batch["sampler_log_probs"])[counted]
    assert value(metrics["sampling/sampling_logp_difference/mean"]) == pytest.approx(gaps.mean())
    assert value(metrics["sampling/sampling_logp_difference/max"]) == pytest.approx(gaps.max())
    assert value(metrics["sampling/importance_sampling_ratio/max"]) <= 2.0


def test_first_step_has_ratio_one_and_the_reinforce_gradient(rng):
    # What the sampler recorded is there, and is not pi_old.
    fields = ("weights", "advantages", "sampler_log_probs")
    batch = {name: grpo_batch(rng)[name] for name in fields}
    log_probs = rng.normal(-1, 0.4, (B, T)).astype(np.float32)
    run = lambda x: losses.grpo(scores_of(x), batch)
    (loss, metrics), gradient = quick(jax.value_and_grad(run, has_aux=True))(log_probs)
    np.testing.assert_allclose(gradient, -batch["weights"] * batch["advantages"], atol=1e-7)
    assert float(loss) == pytest.approx(-(batch["weights"] * batch["advantages"]).sum(), rel=1e-5)
    clips = [value(metric) for name, metric in metrics.items() if name.startswith("clip_ratio/")]
    assert len(clips) == 5 and clips == [0] * 5
    assert "kl" not in metrics  # no reference, no reference forward


def test_clip_metrics_count_low_only_for_losers_and_high_only_for_winners():
    old = np.zeros((1, 6), np.float32)
    log_probs = np.log([[0.5, 0.5, 2.0, 2.0, 2.0, 1.0]]).astype(np.float32)
    batch = {
        "weights": np.array([[1, 1, 1, 1, 1, 0]], np.float32),
        "advantages": np.array([[-1, 1, 1, -1, 0, 1]], np.float32),
        "old_log_probs": old,
    }
    _, metrics = losses.grpo(scores_of(log_probs), batch)
    assert value(metrics["clip_ratio/low_mean"]) == pytest.approx(1 / 5)
    assert value(metrics["clip_ratio/high_mean"]) == pytest.approx(1 / 5)
    assert value(metrics["clip_ratio/region_mean"]) == pytest.approx(2 / 5)


@pytest.mark.parametrize("poison", [np.nan, -np.inf, np.inf, -1e30])
def test_a_token_without_weight_contributes_exactly_nothing(rng, poison):
    batch = grpo_batch(rng)
    counted = batch["weights"] != 0
    clean = rng.normal(-1, 0.4, (B, T)).astype(np.float32)
    loss = lambda x, batch: losses.grpo(scores_of(x), batch, importance_cap=2.0, kl_beta=0.1)[0]
    run = quick(jax.value_and_grad(loss))
    expected = run(clean, batch)
    dirty = {
        name: np.where(counted, x, poison) for name, x in batch.items() if name != "weights"
    } | {"weights": batch["weights"]}
    found = run(np.where(counted, clean, poison), dirty)
    assert float(found[0]) == float(expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert (np.asarray(found[1])[~counted] == 0).all()


def test_a_far_ratio_is_clamped_and_an_empty_batch_is_zero(rng):
    batch = grpo_batch(rng) | {"old_log_probs": np.full((B, T), -500.0, np.float32)}
    loss, _ = losses.grpo(scores_of(np.zeros((B, T))), batch)
    assert np.isfinite(float(loss))
    nothing = batch | {"weights": np.zeros((B, T), np.float32)}
    run = lambda x: losses.grpo(scores_of(x), nothing, importance_cap=2.0, kl_beta=0.1)
    (loss, metrics), gradient = jax.value_and_grad(run, has_aux=True)(np.zeros((B, T)))
    assert float(loss) == 0 and (np.asarray(gradient) == 0).all()
    assert all(np.isfinite(value(metric)) for metric in metrics.values())


def test_importance_weights_need_sampler_log_probs(rng):
    batch = grpo_batch(rng)
    del batch["sampler_log_probs"]
    with pytest.raises(ValueError, match="sampler_log_probs"):
        losses.grpo(scores_of(np.zeros((B, T))), batch, importance_cap=2.0)


def test_ppm_is_bradley_terry_over_weighted_pairs():
    values = jnp.array([0.3, -0.2, 0.9, 0.3])
    batch = {
        "pairs": np.array([[0, 1], [2, 1], [0, 3], [0, 0]]),
        "pair_weights": np.array([0.25, 0.5, 0.25, 0.0]),
    }
    loss, metrics = losses.ppm(values, batch)
    margins = torch.tensor([0.5, 1.1, 0.0])
    expected = -(torch.tensor([0.25, 0.5, 0.25]) * torch.nn.functional.logsigmoid(margins)).sum()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-6)
    assert value(metrics["accuracy"]) == pytest.approx(2 / 3)
    equal, _ = losses.ppm(
        jnp.zeros(2), {"pairs": np.array([[0, 1]]), "pair_weights": np.array([1.0])}
    )
    assert float(equal) == pytest.approx(np.log(2))


def test_swapping_a_pair_flips_the_gradient_at_equal_scores():
    slope = lambda pairs: jax.grad(
        lambda v: losses.ppm(v, {"pairs": np.array(pairs), "pair_weights": np.ones(1)})[0]
    )(jnp.zeros(2))
    np.testing.assert_array_equal(slope([[0, 1]]), -slope([[1, 0]]))
    np.testing.assert_allclose(slope([[0, 1]]), [-0.5, 0.5])
    squashed, _ = losses.ppm(
        jnp.array([9.0, -9.0]),
        {"pairs": np.array([[0, 1]]), "pair_weights": np.ones(1)},
        tanh=True,
    )
    assert float(squashed) == pytest.approx(np.log1p(np.exp(-2)), rel=1e-4)


def test_pqm_and_orm_equal_torch(rng):
    values = rng.normal(size=5).astype(np.float32)
    weights = np.array([0.2, 0.3, 0.1, 0.4, 0.0], np.float32)
    q = rng.uniform(-1, 1, 5).astype(np.float32)
    loss, _ = losses.pqm(jnp.asarray(values), {"targets": q, "end_weights": weights})
    assert float(loss) == pytest.approx((weights * (np.tanh(values) - q) ** 2).sum(), rel=1e-5)
    right = np.array([1, 0, 0, 1, 1], np.float32)
    loss, metrics = losses.orm(jnp.asarray(values), {"targets": right, "end_weights": weights})
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        torch.tensor(values), torch.tensor(right), weight=torch.tensor(weights), reduction="sum"
    )
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    judged = ((values > 0) == (right > 0))[:4]
    assert value(metrics["accuracy"]) == pytest.approx(judged.mean())


def test_metrics_of_microbatches_reduce_by_their_kind():
    stack = lambda *numbers: jnp.asarray(numbers)
    assert value(Mean(stack(2.0, 1.0), stack(4, 0))) == 0.75
    assert value(Mean(stack(0.0), stack(0))) == 0
    assert value(Total(stack(2.0, 1.0))) == 3
    assert value(Smallest(stack(2.0, 1.0))) == 1 and value(Largest(stack(2.0, 1.0))) == 2
    assert value(Smallest(stack(jnp.inf, jnp.inf))) == 0
