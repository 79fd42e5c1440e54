"""Our forward and backward pass held against transformers' own modules, fp32, tiny random models."""

import functools

import jax
import jax.numpy as jnp
import models_case as case
import numpy as np
import pytest
import torch

from smallmath_jax.data.images import ImageSettings, patchify
from smallmath_jax.models.qwen_vl import embed_images
from smallmath_jax.models.tree import named_leaves

LENGTH, PATCHES = 160, 512
LOGITS, EMBEDDINGS, GRADIENTS = (
    1e-4,
    2e-5,
    1e-5,
)  # as 24 seeded porting bugs were told apart from noise


@functools.cache
def models(family: str, tie: bool = False, changes: tuple = ()):
    theirs = case.torch_model(family, tie, **dict(changes))
    return theirs, case.our_model(theirs)


logits_of = case.quick_jit(case.our_logits)


@case.quick_jit
def loss_and_gradients(model, batch, weights):
    def loss(model):
        scores = jax.nn.log_softmax(case.our_logits(model, batch)[:, :-1])
        targets = batch["tokens"][:, 1:, None]
        return -(jnp.take_along_axis(scores, targets, -1)[..., 0] * weights[:, 1:]).sum()

    return jax.value_and_grad(loss)(model)


def two_images(random):
    """Row 0: two images of different size between words; row 1: another, after fewer words."""
    first, second, third = (1, 12, 18), (1, 4, 8), (1, 16, 8)
    rows = [
        case.words(random, 5)
        + case.image_text(random, first)
        + case.words(random, 3)
        + case.image_text(random, second)
        + case.words(random, 9),
        case.words(random, 2) + case.image_text(random, third) + case.words(random, 4),
    ]
    grids = [[first, second], [third]]
    return [
        {"ids": ids, "grids": some, "pixels": case.pixels_for(random, some)}
        for ids, some in zip(rows, grids, strict=True)
    ]


def resized(random):
    """One image that is enlarged and one that is shrunk on the way in."""
    settings = ImageSettings(max_pixels=50176)
    images = [random.integers(0, 256, (*size, 3), np.uint8) for size in ((20, 33), (400, 300))]
    cut = [patchify(image[None], settings) for image in images]
    rows = []
    for pixels, grid in cut:
        ids = case.words(random, 3) + case.image_text(random, grid) + case.words(random, 6)
        rows.append({"ids": ids, "grids": [grid], "pixels": pixels})
    return rows


def video(random):
    grid = (3, 8, 12)
    ids = case.words(random, 4) + case.image_text(random, grid, case.VIDEO) + case.words(random, 7)
    alone = {"ids": ids, "grids": [grid], "pixels": case.pixels_for(random, [grid])}
    still = two_images(random)[1]
    return [alone | {"seconds": [1.0]}, still]


# five layers: a real loop where the others are unrolled
PHI3 = (("sliding_window", 11), ("num_key_value_heads", 4), ("num_hidden_layers", 5))
VISION_CASES = {"two_images": two_images, "resized": resized, "video": video}


def compare(theirs, ours, rows, left, own_positions, patches=PATCHES, length=LENGTH):
    batch = case.make_batch(rows, length, patches, left)
    with torch.no_grad():
        expected = theirs(**case.torch_inputs(rows, length, left, own_positions)).logits.numpy()
    found = np.asarray(logits_of(ours, batch))
    real = np.asarray(batch["segment_ids"]) > 0
    assert expected[real].std() > 1  # else the tolerance says little
    np.testing.assert_allclose(found[real], expected[real], atol=LOGITS)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", VISION_CASES)
def test_vision_logits(name, left):
    rows = VISION_CASES[name](np.random.default_rng(1))
    # transformers 5.23 lets text overlap a long video (4.49 does not): there it gets our positions
    compare(*models("qwen2_5_vl"), rows, left, own_positions=name == "video")


def test_vision_logits_of_a_tied_model_in_a_short_row():
    """256 patches take the path without window blocks."""
    rows = two_images(np.random.default_rng(2))[1:] * 2
    compare(*models("qwen2_5_vl", True), rows, False, False, patches=256)


@pytest.mark.parametrize(
    ("family", "tie"), [("qwen2_5_vl", False), ("qwen2", True), ("qwen2", False), ("phi3", False)]
)
@pytest.mark.parametrize("left", [False, True])
def test_text_logits(family, tie, left):
    random = np.random.default_rng(3)
    changes = PHI3 if family == "phi3" else ()
    rows = [{"ids": case.words(random, count)} for count in (40, 23)]
    own_positions = family == "qwen2_5_vl"
    theirs, ours = models(family, tie, changes)
    batch = case.make_batch(rows, 48, 0, left)
    inputs = case.torch_inputs(rows, 48, left, own_positions)
    with torch.no_grad():
        expected = theirs(**inputs).logits.numpy()
    real = np.asarray(batch["segment_ids"]) > 0
    found = np.asarray(logits_of(ours, batch))
    np.testing.assert_allclose(found[real], expected[real], atol=LOGITS)


def test_long_text():
    rows = [{"ids": case.words(np.random.default_rng(4), 1500)}]
    compare(*models("qwen2_5_vl"), rows, False, False, patches=0, length=1500)


def test_image_embeddings():
    theirs, ours = models("qwen2_5_vl")
    random = np.random.default_rng(5)
    grids = [(1, 10, 14), (2, 6, 8)]  # a video's frames are apart, as two images are
    pixels = case.pixels_for(random, grids)
    row = {"ids": [case.IMAGE] * 35 + [case.VIDEO] * 24, "grids": grids, "pixels": pixels}
    vision = case.make_batch([row], 59, PATCHES)["vision"]
    with torch.no_grad():
        inputs = torch.tensor(pixels), torch.tensor(grids)
        expected = theirs.model.visual(inputs[0], grid_thw=inputs[1]).pooler_output.numpy()
    found = np.asarray(case.quick_jit(embed_images)(ours, vision))[0, :59]
    np.testing.assert_allclose(found, expected, atol=EMBEDDINGS * max(1, expected.std()))


def test_positions_are_those_of_transformers():
    theirs, _ = models("qwen2_5_vl")
    for name in ("two_images", "resized"):
        rows = VISION_CASES[name](np.random.default_rng(6))
        batch = case.make_batch(rows, LENGTH)
        inputs = case.torch_inputs(rows, LENGTH, False, False)
        expected, _ = theirs.model.get_rope_index(
            inputs["input_ids"],
            inputs["mm_token_type_ids"],
            inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        real = np.asarray(batch["segment_ids"]) > 0
        ours = np.asarray(batch["positions"]).swapaxes(0, 1)
        np.testing.assert_array_equal(ours[:, real], expected.numpy()[:, real])


@pytest.mark.parametrize(
    ("family", "tie", "name"),
    [("qwen2_5_vl", False, "two_images"), ("qwen2_5_vl", True, "video"), ("phi3", False, "text")],
)
def test_gradients(family, tie, name):
    random = np.random.default_rng(7)
    if name == "text":
        rows = [{"ids": case.words(random, count)} for count in (40, 23)]
        theirs, ours = models(family, tie, PHI3)
        length, patches = 48, 0
    else:
        rows, length, patches = VISION_CASES[name](random), LENGTH, PATCHES
        theirs, ours = models(family, tie)
    batch = case.make_batch(rows, length, patches)
    is_text = np.asarray(batch["tokens"]) < case.WORDS
    weights = random.uniform(0.01, 0.02, is_text.shape) * is_text
    weights = (weights * (np.asarray(batch["segment_ids"]) > 0)).astype(np.float32)
    value, gradients = loss_and_gradients(ours, batch, jnp.asarray(weights))
    theirs.zero_grad()
    inputs = case.torch_inputs(rows, length, False, name == "video")
    scores = torch.log_softmax(theirs(**inputs).logits[:, :-1], -1)
    chosen = scores.gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    loss = -(chosen * torch.tensor(weights[:, 1:])).sum()
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    expected = dict(named_leaves(case.our_gradients(theirs)))
    for leaf_name, found in named_leaves(gradients):
        size = jnp.linalg.norm(expected[leaf_name])
        error = jnp.linalg.norm(found - expected[leaf_name])
        assert error <= GRADIENTS * size and size > 0, (leaf_name, float(error), float(size))
