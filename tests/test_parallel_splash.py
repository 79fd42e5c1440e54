"""The TPU kernel's arithmetic (interpreted) against plain attention, and which attention a machine gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smallmath_jax.models.attention import einsum_attention
from smallmath_jax.parallel import splash
from smallmath_jax.parallel.mesh import make_mesh

LENGTH = 256


def case(heads, kv_heads, width, rows=1):
    random = np.random.default_rng(0)
    draw = lambda count: jnp.asarray(random.normal(size=(rows, LENGTH, count, width)), jnp.float32)
    segments = np.zeros((rows, LENGTH), np.int32)
    segments[:, :100] = 1
    segments[:, 100:-20] = 2  # the last 20 are padding
    return draw(heads), draw(kv_heads), draw(kv_heads), jnp.asarray(segments), draw(heads)


@functools.partial(jax.jit, static_argnums=(0, 2, 3))
def value_and_gradient(attention, arrays, causal, window):
    q, k, v, segments, probe = arrays
    probe = jnp.where((segments > 0)[..., None, None], probe, 0)

    def total(q, k, v):
        scale = q.shape[-1] ** -0.5
        out = attention(q, k, v, segments, scale=scale, causal=causal, window=window)
        return (out * probe).sum()

    return jax.value_and_grad(total, (0, 1, 2))(q, k, v)


@pytest.mark.parametrize(
    "heads, kv_heads, width, causal, window",
    [(4, 2, 128, True, None), (2, 2, 80, False, None), (2, 1, 96, True, 47)],
    ids=["decoder", "vision tower", "sliding window"],
)
def test_the_kernel_equals_plain_attention(heads, kv_heads, width, causal, window):
    arrays = case(heads, kv_heads, width)
    kernel = splash.attention_for(make_mesh(devices=jax.devices()[:1]), interpret=True)
    want, want_gradient = value_and_gradient(einsum_attention, arrays, causal, window)
    found, found_gradient = value_and_gradient(kernel, arrays, causal, window)
    np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-3)
    for mine, other in zip(found_gradient, want_gradient, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-5)


def test_the_machine_decides(monkeypatch):
    mesh = make_mesh(devices=jax.devices()[:1])
    names = ("einsum_attention", "blocked_attention")
    for name in names:
        monkeypatch.setattr(splash.portable, name, lambda *_, name=name, **__: name)
    monkeypatch.setattr(splash, "splash_attention", lambda *_, **__: "splash")
    pick = lambda platform, length: splash.attention_for(mesh, platform)(
        np.zeros((1, length, 2, 8)), None, None, None
    )
    assert pick("tpu", 4096) == "splash"
    assert pick("tpu", 4000) == "blocked_attention"  # not a multiple of 128
    assert pick("tpu", 64) == "einsum_attention"
    assert pick("gpu", 4096) == "blocked_attention"
    assert pick("cpu", 256) == "einsum_attention"


def test_a_length_the_kernel_cannot_take_is_named():
    q = jnp.zeros((1, 100, 2, 8))
    with pytest.raises(ValueError, match="row length 100 is not a multiple of 128"):
        splash.splash_attention(q, q, q, None, mesh=make_mesh(devices=jax.devices()[:1]), scale=1.0)
