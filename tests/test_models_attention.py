"""The attention functions against a loop over queries in numpy, and against each other."""

import functools

import jax
import jax.numpy as jnp
import models_case as case
import numpy as np
import pytest

from smallmath_jax.models.attention import blocked_attention, einsum_attention, local_attention

SCALE = 0.3


def inputs(length=43, batch=2, heads=4, kv_heads=2, width=8, runs=6, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    make = lambda key, count: jax.random.normal(key, (batch, length, count, width))
    segments = jnp.sort(jax.random.randint(keys[3], (batch, length), 0, runs), axis=-1)
    return make(keys[0], heads), make(keys[1], kv_heads), make(keys[2], kv_heads), segments


def loop_attention(q, k, v, segments, causal, window):
    """One query and head at a time, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for row, place, head in np.ndindex(q.shape[:3]):
        seen = [
            other
            for other in range(q.shape[1])
            if segments[row, other] == segments[row, place]
            and (not causal or other <= place)
            and (window is None or place - other < window)
        ]
        logits = k[row, seen, head // group] @ q[row, place, head] * SCALE
        weights = np.exp(logits - logits.max())
        out[row, place, head] = weights @ v[row, seen, head // group] / weights.sum()
    return out


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 7), (False, None)])
def test_einsum_attention_equals_a_loop(causal, window):
    q, k, v, segments = inputs()
    out = einsum_attention(q, k, v, segments, scale=SCALE, causal=causal, window=window)
    real = np.asarray(segments) > 0
    expected = loop_attention(q, k, v, np.asarray(segments), causal, window)
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=2e-6)
    assert np.isfinite(out).all()  # padding too: a NaN there would spread through gradients


def value_and_gradients(attention, q, k, v, segments):
    def loss(q, k, v):
        out = attention(q, k, v, segments, scale=SCALE)
        return (jnp.where((segments > 0)[..., None, None], out, 0) ** 2).sum()

    return case.quick_jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 7), (False, None)])
def test_blocked_attention_has_equal_values_and_gradients(causal, window):
    settings = {"causal": causal, "window": window}
    plain = functools.partial(einsum_attention, **settings)
    blocked = functools.partial(blocked_attention, block=16, **settings)  # 43 = 2 * 16 + 11
    expected = value_and_gradients(plain, *inputs())
    found = value_and_gradients(blocked, *inputs())
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_blocked_attention_is_bounded_in_memory():
    arrays = jax.eval_shape(lambda: inputs(length=2048, batch=1))
    temporary = {}
    for name, attention in (("plain", einsum_attention), ("blocked", blocked_attention)):
        loss = lambda q, k, v, s, attention=attention: attention(q, k, v, s, scale=SCALE).sum()
        compiled = jax.jit(jax.grad(loss)).lower(*arrays).compile()
        temporary[name] = compiled.memory_analysis().temp_size_in_bytes
    assert temporary["blocked"] < temporary["plain"] / 3


def test_local_attention_has_equal_values_and_gradients():
    q, k, v, segments = inputs(length=203, runs=20)
    longest = int(np.bincount(np.asarray(segments).ravel() + 20 * np.repeat([0, 1], 203)).max())
    plain = functools.partial(einsum_attention, causal=False)
    expected = value_and_gradients(plain, q, k, v, segments)
    found = value_and_gradients(
        functools.partial(local_attention, reach=longest), q, k, v, segments
    )
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_softmax_is_fp32_under_bf16():
    """Many nearly equal logits: a bf16 sum of 4096 weights would stop at 256."""
    length = 4096
    q = jnp.zeros((1, length, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, length, 1, 8), jnp.bfloat16)
    out = blocked_attention(q, q, v, jnp.ones((1, length), jnp.int32), scale=1.0, causal=False)
    np.testing.assert_allclose(np.asarray(out[0, 0, 0], np.float32), 1.0, rtol=0.01)
