"""Adapters and the value head: what they add, what they leave alone."""

import functools

import jax
import jax.numpy as jnp
import models_case as case
import numpy as np
import pytest

from smallmath_jax.models.lora import add_lora, merge_lora
from smallmath_jax.models.qwen_vl import QwenVL, abstract_model
from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.models.value_head import add_value_head, last_hidden, values

TARGETS = r"text/layers/(q|v|down)|vision/blocks/proj|vision/merger/fc1"
GRID = (1, 4, 6)


@functools.cache
def model() -> QwenVL:
    return case.our_model(case.torch_model("qwen2_5_vl"))


@functools.cache
def batch() -> dict:
    random = np.random.default_rng(0)
    ids = case.words(random, 3) + case.image_text(random, GRID) + case.words(random, 5)
    pixels = case.pixels_for(random, [GRID])
    return case.make_batch([{"ids": ids, "grids": [GRID], "pixels": pixels}], 20, 32)


logits_of = case.quick_jit(case.our_logits)


def adapted() -> QwenVL:
    return add_lora(model(), rank=3, alpha=6.0, targets=TARGETS, key=jax.random.key(1))


def trained() -> QwenVL:
    """An adapter whose second matrix is no longer zero."""
    draw = lambda leaf: 0.3 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    return map_named(lambda name, leaf: draw(leaf) if "lora_b" in name else leaf, adapted())


def test_fresh_adapters_change_nothing():
    np.testing.assert_array_equal(logits_of(adapted(), batch()), logits_of(model(), batch()))


def test_adapters_are_where_they_were_asked_for():
    shapes = {name: leaf.shape for name, leaf in named_leaves(adapted()) if "lora" in name}
    assert len(shapes) == 2 * 5
    assert shapes["text/layers/q/lora_a"] == (2, 64, 3)
    assert shapes["text/layers/down/lora_b"] == (2, 3, 64)
    assert shapes["vision/merger/fc1/lora_a"] == (128, 3)
    assert not any("lora" in name for name, _ in named_leaves(model()))  # the original is untouched


def test_merged_equals_unmerged_and_is_a_plain_model():
    merged = merge_lora(trained())
    assert jax.tree.structure(merged) == jax.tree.structure(model())
    found, expected = logits_of(merged, batch()), logits_of(trained(), batch())
    np.testing.assert_allclose(found, expected, atol=5e-5)
    assert np.abs(expected - logits_of(model(), batch())).max() > 0.1
    kernel = model().text.layers.q.kernel[...]
    update = trained().text.layers.q
    by_hand = kernel + 2.0 * jnp.einsum("lir,lro->lio", update.lora_a[...], update.lora_b[...])
    np.testing.assert_allclose(merged.text.layers.q.kernel[...], by_hand, atol=1e-5)


def test_merging_a_plain_model_keeps_its_bits():
    for (_, a), (_, b) in zip(
        named_leaves(merge_lora(model())), named_leaves(model()), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_gradients_reach_the_adapter():
    loss = lambda model: (case.our_logits(model, batch()) ** 2).sum()
    gradient = dict(named_leaves(case.quick_jit(jax.grad(loss))(adapted())))
    assert jnp.abs(gradient["text/layers/q/lora_b"]).max() > 0
    assert jnp.abs(gradient["text/layers/q/lora_a"]).max() == 0  # lora_b is still zero


def test_adapters_of_an_abstract_model():
    add = lambda model: add_lora(model, 2, 4.0, "text/layers/.*", jax.random.key(0))
    abstract = jax.eval_shape(add, abstract_model(model().config))
    assert sum("lora_a" in name for name, _ in named_leaves(abstract)) == 7


def test_wrong_targets_and_rank_are_named():
    with pytest.raises(ValueError, match="match no linear map; there are text/layers/down"):
        add_lora(model(), 2, 4.0, "layers.q_proj", jax.random.key(0))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_lora(model(), 0, 4.0, ".*", jax.random.key(0))


def test_value_of_the_last_token():
    judge = add_value_head(model(), jax.random.key(2))
    names = {name: leaf.shape for name, leaf in named_leaves(judge) if "value_head" in name}
    assert names == {"value_head/bias": (1,), "value_head/kernel": (64, 1)}
    hidden = jax.random.normal(jax.random.key(5), (3, 7, 64))
    last = last_hidden(hidden, jnp.asarray([7, 1, 4]))
    np.testing.assert_array_equal(last, hidden[jnp.arange(3), jnp.asarray([6, 0, 3])])
    raw = values(judge, last)
    kernel, bias = judge.value_head.kernel[...], judge.value_head.bias[...]
    np.testing.assert_allclose(raw, (last @ kernel + bias)[:, 0], rtol=1e-6)
    np.testing.assert_allclose(values(judge, last, squash=5.0), np.tanh(raw / 5), rtol=1e-6)
    assert values(judge, last.astype(jnp.bfloat16)).dtype == jnp.float32


def test_value_dropout_is_keyed_and_unbiased():
    judge = add_value_head(model(), jax.random.key(3))
    hidden = jnp.broadcast_to(jax.random.normal(jax.random.key(4), (64,)), (4000, 64))
    drop = lambda key: values(judge, hidden, dropout=0.25, key=jax.random.key(key))
    np.testing.assert_array_equal(drop(0), drop(0))
    assert not np.array_equal(drop(0), drop(1))
    plain = values(judge, hidden[0])
    spread = drop(0).std() / 4000**0.5
    assert abs(drop(0).mean() - plain) < 4 * spread and spread > 0


def test_missing_head_and_missing_key_are_named():
    with pytest.raises(ValueError, match="no value head"):
        values(model(), jnp.zeros((1, 64)))
    with pytest.raises(ValueError, match="needs a key"):
        values(add_value_head(model(), jax.random.key(0)), jnp.zeros((1, 64)), dropout=0.1)
