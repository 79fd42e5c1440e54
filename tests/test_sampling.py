"""Sampling against a sort-based restatement, scipy's chi-square, and the laws on draws."""

import jax
import numpy as np
import pytest
from scipy.stats import chisquare

from smallmath_jax.records import draw_key
from smallmath_jax.rollout.sampling import match_stops, sample, support_threshold

VOCABULARY = 61
BANNED = np.zeros(VOCABULARY, bool)
BANNED[[3, 17, 60]] = True
draw = jax.jit(sample)


def _brute_log_probs(logits, temperature, top_k, top_p, banned):
    """Log-probs float64 [V] of one row, by sorting, as Hugging Face's warpers do it in turn."""
    scores = np.where(banned, -np.inf, logits.astype(np.float64)) / (temperature or 1.0)
    if temperature and 0 < top_k < len(scores):
        scores = np.where(scores < np.sort(scores)[-top_k], -np.inf, scores)
    if temperature and top_p < 1:
        order = np.argsort(-scores, kind="stable")
        probs = np.exp(scores[order] - scores.max())
        probs /= probs.sum()
        before = np.cumsum(probs) - probs  # mass above each token
        scores[order[before >= top_p]] = -np.inf
    return scores - scores.max() - np.log(np.exp(scores - scores.max()).sum())


def _rows(rng, batch):
    return dict(
        logits=(rng.normal(size=(batch, VOCABULARY)) * 3).astype(np.float32),
        keys=np.stack([draw_key("rows", row) for row in range(batch)]),
        index=rng.integers(0, 50, batch).astype(np.int32),
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7], batch).astype(np.float32),
        top_k=rng.choice([0, 1, 5, 30, 61, 128], batch).astype(np.int32),
        top_p=rng.choice([1.0, 0.95, 0.5, 0.05], batch).astype(np.float32),
    )


def test_log_probs_and_support_equal_the_sorted_ones():
    rows = _rows(np.random.default_rng(0), 256)
    tokens, log_probs = draw(**rows, banned=BANNED)
    for row in range(256):
        settings = [rows[name][row] for name in ("temperature", "top_k", "top_p")]
        expected = _brute_log_probs(rows["logits"][row], *settings, BANNED)
        assert np.isfinite(expected[tokens[row]]), (row, settings)
        np.testing.assert_allclose(log_probs[row], expected[tokens[row]], atol=2e-6)
        if settings[0] == 0:
            assert tokens[row] == np.argmax(np.where(BANNED, -np.inf, rows["logits"][row]))


def test_the_kept_set_is_exactly_the_sorted_one():
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(64, VOCABULARY)) * 2).astype(np.float32)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    top_k = rng.choice([0, 2, 9, 40], 64).astype(np.int32)
    top_p = rng.uniform(0.05, 0.99, 64).astype(np.float32)
    threshold = np.asarray(jax.jit(support_threshold)(weights, top_k, top_p))
    for row in range(64):
        expected = _brute_log_probs(
            logits[row], 1.0, top_k[row], top_p[row], np.zeros(VOCABULARY, bool)
        )
        np.testing.assert_array_equal(weights[row] >= threshold[row], np.isfinite(expected))


@pytest.mark.parametrize("top_p", [0.0, 1e-9])
def test_a_tiny_top_p_keeps_the_best_token(top_p):
    rows = _rows(np.random.default_rng(2), 32)
    rows.update(
        temperature=np.ones(32, np.float32),
        top_k=np.zeros(32, np.int32),
        top_p=np.full(32, top_p, np.float32),
    )
    tokens, log_probs = draw(**rows, banned=BANNED)
    np.testing.assert_array_equal(
        tokens, np.argmax(np.where(BANNED, -np.inf, rows["logits"]), axis=-1)
    )
    np.testing.assert_array_equal(log_probs, 0.0)


def _many(logits, draws, **settings):
    """`draws` tokens of one distribution, each with an index of its own under one key."""
    rows = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    tokens, _ = draw(
        np.broadcast_to(logits, (draws, len(logits))),
        np.broadcast_to(draw_key("many"), (draws, 2)),
        np.arange(draws, dtype=np.int32),
        np.full(draws, rows["temperature"], np.float32),
        np.full(draws, rows["top_k"], np.int32),
        np.full(draws, rows["top_p"], np.float32),
        banned=np.zeros(len(logits), bool) if len(logits) != VOCABULARY else BANNED,
    )
    return np.asarray(tokens)


def test_banned_tokens_are_never_drawn_at_high_temperature():
    logits = np.zeros(VOCABULARY, np.float32)
    logits[BANNED] = 50.0
    tokens = _many(logits, 10_000, temperature=100.0)
    assert not BANNED[tokens].any()
    assert len(np.unique(tokens)) == VOCABULARY - BANNED.sum()


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.5}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 7, "top_p": 0.9}]
)
def test_frequencies_are_the_stated_distribution(settings):
    logits = np.random.default_rng(3).normal(size=12).astype(np.float32) * 1.3
    rows = dict(temperature=1.0, top_k=0, top_p=1.0) | settings
    expected = np.exp(_brute_log_probs(logits, *rows.values(), np.zeros(12, bool)))
    counts = np.bincount(_many(logits, 20_000, **settings), minlength=12)
    inside = expected > 0
    assert counts[~inside].sum() == 0
    assert chisquare(counts[inside], 20_000 * expected[inside]).pvalue > 1e-3


def test_a_draw_depends_on_its_key_and_index_alone():
    rows = _rows(np.random.default_rng(4), 40)
    order = np.random.default_rng(5).permutation(40)
    tokens, log_probs = draw(**rows, banned=BANNED)
    moved = {name: array[order] for name, array in rows.items()}
    moved_tokens, moved_log_probs = draw(**moved, banned=BANNED)
    np.testing.assert_array_equal(moved_tokens, np.asarray(tokens)[order])
    np.testing.assert_array_equal(moved_log_probs, np.asarray(log_probs)[order])
    other = dict(rows, index=rows["index"] + 1, temperature=np.full(40, 2.0, np.float32))
    same = dict(rows, temperature=other["temperature"])
    assert (np.asarray(draw(**other, banned=BANNED)[0]) != draw(**same, banned=BANNED)[0]).any()


def test_one_program_serves_every_setting_and_never_sorts_the_vocabulary():
    traced = []

    def counted(*arguments):
        traced.append(1)
        return sample(*arguments)

    run = jax.jit(counted)
    for seed in range(3):
        run(*_rows(np.random.default_rng(seed), 8).values(), BANNED)
    assert len(traced) == 1
    program = str(jax.make_jaxpr(sample)(*_rows(np.random.default_rng(0), 8).values(), BANNED))
    assert "sort[" not in program and "top_k[" not in program


def test_stop_sequences_match_at_the_end_only():
    recent = np.array([[-1, -1, 7, 8], [5, 7, 8, 9], [-1, -1, -1, 8], [1, 2, 3, 4]], np.int32)
    stops = np.full((4, 2, 4), -1, np.int32)
    stops[:, 0, 2:] = [7, 8]
    stops[3, 1] = [1, 2, 3, 4]
    np.testing.assert_array_equal(match_stops(recent, stops), [True, False, False, True])
