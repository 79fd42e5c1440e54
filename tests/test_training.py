"""A stage's layout and memory: rows for whatever the sampler brings, and one copy of the fp32 weights."""

from types import SimpleNamespace

import numpy as np
import pytest

from smallmath_jax.data.batches import pack
from smallmath_jax.tasks import training


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
