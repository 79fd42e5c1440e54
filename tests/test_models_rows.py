"""Law 3 for the models: packing, padding and the KV cache change nothing; and remat, bf16 and float64."""

import functools

import jax
import jax.numpy as jnp
import models_case as case
import numpy as np
import pytest

from smallmath_jax.models.qwen_vl import QwenVL, embed, forward_cached, head_matrix, init_cache
from smallmath_jax.models.text import REMAT
from smallmath_jax.models.tree import named_leaves

LENGTH, PATCHES = 96, 208
GRIDS = [[(1, 8, 12)], [(1, 4, 6), (1, 6, 8)], []]


@functools.cache
def model(family: str = "qwen2_5_vl") -> QwenVL:
    changes = {"sliding_window": 9, "num_key_value_heads": 4} if family == "phi3" else {}
    return case.our_model(case.torch_model(family, **changes))


@functools.cache
def rows() -> list[dict]:
    """Three sequences: one image, two images, none."""
    random = np.random.default_rng(0)
    made = []
    for grids in GRIDS:
        ids = case.words(random, 4)
        for grid in grids:
            ids += case.image_text(random, grid) + case.words(random, 3)
        made.append({"ids": ids, "grids": grids, "pixels": case.pixels_for(random, grids)})
    return made


def packed_batch(order=(0, 1, 2)) -> dict:
    """The three sequences in the first row, each with the positions it has alone; two rows are all padding."""
    parts = [case.make_batch([rows()[index]], len(rows()[index]["ids"])) for index in order]
    together = {
        "ids": sum((rows()[index]["ids"] for index in order), []),
        "grids": sum((rows()[index]["grids"] for index in order), []),
        "pixels": np.concatenate([rows()[index]["pixels"] for index in order]),
    }
    batch = case.make_batch([together, {"ids": []}, {"ids": []}], LENGTH, PATCHES)
    pad = LENGTH - len(together["ids"])
    positions = np.concatenate([part["positions"] for part in parts], axis=-1)
    batch["positions"] = jnp.asarray(np.pad(positions, ((0, 2), (0, 0), (0, pad))))
    numbers = np.repeat([1, 2, 3], [part["tokens"].shape[1] for part in parts])
    batch["segment_ids"] = jnp.asarray(np.pad(numbers[None], ((0, 2), (0, pad))))
    return batch


@functools.cache
def logits_of(**options):
    return case.quick_jit(functools.partial(case.our_logits, **options))


@functools.cache
def alone() -> list[np.ndarray]:
    """Logits of each sequence in a row of its own."""
    batch = case.make_batch(rows(), LENGTH, PATCHES)
    logits = np.asarray(logits_of()(model(), batch))
    return [logits[at, : len(row["ids"])] for at, row in enumerate(rows())]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_packed_logits_are_those_of_each_sequence_alone(order):
    logits = np.asarray(logits_of()(model(), packed_batch(order)))[0]
    expected = np.concatenate([alone()[index] for index in order])
    np.testing.assert_allclose(logits[: len(expected)], expected, atol=2e-5)


@pytest.mark.parametrize("broken", ["positions", "segment_ids"])
def test_packing_without_restart_or_segments_is_seen(broken):
    """The usual bugs: positions that run on along the row, and attention across sequences."""
    batch = packed_batch()
    if broken == "positions":
        batch[broken] = jnp.broadcast_to(jnp.arange(LENGTH), (3, 3, LENGTH))
    else:
        batch[broken] = jnp.minimum(batch[broken], 1)
    logits = np.asarray(logits_of()(model(), batch))[0]
    expected = np.concatenate(alone())
    assert np.abs(logits[: len(expected)] - expected).max() > 0.1


def test_left_padding_and_what_padding_holds_change_nothing():
    batch = case.make_batch(rows(), LENGTH, PATCHES, left=True)
    padding = batch["segment_ids"] == 0
    batch["tokens"] = jnp.where(padding, 17, batch["tokens"])
    batch["positions"] = jnp.where(padding[:, None], 31, batch["positions"])
    empty = (batch["vision"]["frame_segments"] == 0)[..., None]
    batch["vision"]["pixels"] = jnp.where(empty, 50.0, batch["vision"]["pixels"])
    logits = np.asarray(logits_of()(model(), batch))
    for at, expected in enumerate(alone()):
        np.testing.assert_allclose(logits[at, -len(expected) :], expected, atol=2e-5)


def test_gradients_of_a_packed_row_are_those_of_the_sequences():
    def loss(model, batch):
        real = (batch["segment_ids"] > 0)[..., None]
        return (jnp.where(real, jnp.tanh(case.our_logits(model, batch)), 0) ** 2).sum()

    gradient = case.quick_jit(jax.grad(loss))
    apart = gradient(model(), case.make_batch(rows(), LENGTH, PATCHES))
    packed = gradient(model(), packed_batch())
    expected = dict(named_leaves(apart))
    for name, found in named_leaves(packed):
        error = jnp.linalg.norm(found - expected[name])
        assert error <= 1e-5 * jnp.linalg.norm(expected[name]), name


def cached_logits(model: QwenVL, batch: dict, starts: list[int], chunk: int, prefill: int):
    """Logits by cached prefill in chunks, then one token at a time; row b's cache begins with starts[b] slots used."""
    step = case.quick_jit(forward_cached, donate_argnums=3)
    embeddings = case.quick_jit(embed)(model, batch["tokens"], batch.get("vision"))
    count, length = batch["tokens"].shape
    cache = init_cache(model.config, count, length + max(starts))
    used, hidden, at = jnp.asarray(starts), [], 0
    while at < length:
        width = chunk if at < prefill else 1
        part = embeddings[:, at : at + width], batch["positions"][:, :, at : at + width]
        out, cache = step(model, *part, cache, used + at)
        hidden.append(out)
        at += width
    return jnp.concatenate(hidden, axis=1) @ head_matrix(model).T


@pytest.mark.parametrize("family", ["qwen2_5_vl", "phi3"])
def test_cached_prefill_and_decode_equal_the_full_pass(family):
    if family == "qwen2_5_vl":
        batch = case.make_batch(rows(), LENGTH, PATCHES)
        expected = alone()
    else:  # the window of 9 tokens is shorter than a chunk and than what is decoded
        random = np.random.default_rng(1)
        texts = [{"ids": case.words(random, count)} for count in (48, 40)]
        batch = case.make_batch(texts, 48)
        logits = np.asarray(logits_of()(model(family), batch))
        expected = [logits[at, : len(row["ids"])] for at, row in enumerate(texts)]
    found = np.asarray(cached_logits(model(family), batch, [0] * len(expected), 16, 32))
    for at, logits in enumerate(
        expected
    ):  # trailing padding of the row comes after all that is real
        np.testing.assert_allclose(found[at, : len(logits)], logits, atol=2e-5)


def test_a_padded_chunk_is_overwritten_and_rows_stand_at_their_own_place():
    random = np.random.default_rng(2)
    texts = [{"ids": case.words(random, count)} for count in (9, 14)]
    batch = case.make_batch(texts, 16)
    expected = np.asarray(logits_of()(model(), batch))
    step = case.quick_jit(forward_cached)
    hidden = embed(model(), batch["tokens"])
    cache = init_cache(model().config, 2, 16)
    _, cache = step(model(), hidden[:, :8], batch["positions"][:, :, :8], cache, jnp.zeros(2, int))
    # row 0 goes on with 1 real and 7 padded tokens, row 1 with 6 real and 2 padded
    _, cache = step(model(), hidden[:, 8:], batch["positions"][:, :, 8:], cache, jnp.full(2, 8))
    after = jnp.asarray([9, 14])
    again = jnp.stack([hidden[0, 3], hidden[1, 5]])[:, None]
    place = jnp.broadcast_to(after[:, None, None], (2, 3, 1))
    out, cache = step(model(), again, place, cache, after)
    longer = [{"ids": row["ids"] + [row["ids"][at]]} for row, at in zip(texts, (3, 5), strict=True)]
    full = np.asarray(logits_of()(model(), case.make_batch(longer, 16)))
    found = np.asarray(out[:, 0] @ head_matrix(model()).T)
    np.testing.assert_allclose(found, [full[0, 9], full[1, 14]], atol=2e-5)
    np.testing.assert_allclose(full[0, :9], expected[0, :9], atol=2e-5)
    before = jax.tree.map(np.asarray, cache)
    _, cache = step(model(), again, place, cache, jnp.full(2, 16))  # past the end: nothing written
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, cache))


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_remat_changes_memory_and_not_gradients(remat):
    batch = case.make_batch([{"ids": case.words(np.random.default_rng(3), 64)}] * 4, 64)

    def gradient(remat):
        loss = lambda model: (case.our_logits(model, batch, remat=remat) ** 2).sum()
        return case.quick_jit(jax.grad(loss))

    whole, less = gradient("none"), gradient(remat)
    for (name, a), (_, b) in zip(
        named_leaves(whole(model())), named_leaves(less(model())), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()), err_msg=name
        )


def test_unknown_remat_names_the_known():
    with pytest.raises(ValueError, match="remat 'half' is unknown; known: none, full, qkvo, dots"):
        case.our_logits(model(), case.make_batch(rows()[2:], 8), remat="half")


def test_images_need_a_vision_tower():
    batch = case.make_batch(rows()[:1], LENGTH, PATCHES)
    with pytest.raises(ValueError, match="family 'phi3' has no vision tower"):
        case.our_logits(model("phi3"), batch)


def test_bf16_follows_fp32():
    """bf16 parity is statistical: rounding moves random logits of deviation 1 by a few hundredths."""
    batch = case.make_batch(rows(), LENGTH, PATCHES)
    logits = logits_of(compute_dtype=jnp.bfloat16)(model(), batch)
    assert logits.dtype == jnp.bfloat16
    found = np.concatenate(
        [np.asarray(logits[at, : len(row["ids"])], np.float32) for at, row in enumerate(rows())]
    )
    expected = np.concatenate(alone())
    assert np.abs(found - expected).mean() < 0.05 * expected.std()
    assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.8


def test_float64_stays_wide():
    """Gradient invariance is checked to 1e-10 in float64, so nothing may pass through fp32 but the rotary tables."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), model())
        random = np.random.default_rng(4)
        texts = [{"ids": case.words(random, count)} for count in (12, 7)]
        logits_of = case.quick_jit(functools.partial(case.our_logits, compute_dtype=jnp.float64))
        logits = logits_of(wide, case.make_batch(texts, 20))
        moved = logits_of(wide, case.make_batch(texts, 27, left=True))
        for at, row in enumerate(texts):
            count = len(row["ids"])
            np.testing.assert_allclose(logits[at, :count], moved[at, -count:], atol=1e-10)
