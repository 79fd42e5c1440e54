"""mRoPE positions: the worked examples by hand, and a second implementation that walks token by token."""

import numpy as np
import pytest

from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.positions import mrope_positions

SETTINGS = ImageSettings()
IMAGE, VIDEO, TEXT = 90, 91, 5


def positions_of(ids, grids, **extra):
    return mrope_positions(np.array(ids), np.array(grids), IMAGE, VIDEO, SETTINGS, **extra)


def test_worked_example_one_image():
    positions, following = positions_of([TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 2, [(1, 4, 6)])
    assert positions.dtype == np.int32
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]
    assert following == 8


def test_worked_example_square_image_and_plain_text():
    positions, following = positions_of([TEXT] * 2 + [IMAGE] * 4 + [TEXT] * 2, [(1, 4, 4)])
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 4, 5],
        [0, 1, 2, 2, 3, 3, 4, 5],
        [0, 1, 2, 3, 2, 3, 4, 5],
    ]
    assert following == 6
    positions, following = positions_of([TEXT] * 10, np.zeros((0, 3)))
    assert positions.tolist() == [list(range(10))] * 3 and following == 10


def test_worked_example_video_with_the_original_semantics():
    ids = [TEXT] * 2 + [VIDEO] * 12 + [TEXT] * 2
    positions, following = positions_of(ids, [(3, 4, 4)], seconds_per_grid=[1.0])
    assert positions[0].tolist() == [0, 1] + [2] * 4 + [4] * 4 + [6] * 4 + [7, 8]
    assert positions[1].tolist() == [0, 1] + [2, 2, 3, 3] * 3 + [7, 8]
    assert positions[2].tolist() == [0, 1] + [2, 3, 2, 3] * 3 + [7, 8]
    assert following == 9  # largest + 1, not 4 as transformers 5.23 counts
    assert positions_of(ids, [(3, 4, 4)])[1] == 9  # a second a grid is the default


@pytest.mark.parametrize(
    ("seconds", "times"), [(0.5, [0, 1, 2]), (0.3, [0, 0, 1]), (2.0, [0, 4, 8])]
)
def test_fractional_seconds_are_exact(seconds, times):
    ids = [VIDEO] * 12
    positions, _ = positions_of(ids, [(3, 4, 4)], seconds_per_grid=[seconds])
    assert positions[0, ::4].tolist() == times


def walk(ids, grids, seconds):
    """The rule of the paper, one token at a time."""
    columns, number, place = [], 0, 0
    while place < len(ids):
        largest = max((max(column) for column in columns), default=-1)
        if ids[place] not in (IMAGE, VIDEO):
            columns.append([largest + 1] * 3)
            place += 1
            continue
        times, height, width = grids[number]
        step = 2 * seconds[number] if ids[place] == VIDEO else 0
        for time in range(times):
            for row in range(height // 2):
                for column in range(width // 2):
                    offsets = int(time * step), row, column
                    columns.append([largest + 1 + offset for offset in offsets])
        place += times * height * width // 4
        number += 1
    return np.array(columns).T, max(max(column) for column in columns) + 1


def test_mixed_sequence_equals_a_walk():
    random = np.random.default_rng(3)
    for _ in range(20):
        ids, grids = [TEXT], []
        for _ in range(random.integers(0, 4)):
            is_video = random.random() < 0.5
            grid = (int(random.integers(1, 4)) if is_video else 1, *(2 * random.integers(1, 5, 2)))
            ids += [VIDEO if is_video else IMAGE] * (int(np.prod(grid)) // 4)
            ids += [TEXT] * int(random.integers(1, 5))
            grids.append(grid)
        seconds = [float(random.choice([0.5, 1.0, 2.0])) for _ in grids]
        ours, following = positions_of(
            ids, np.array(grids).reshape(-1, 3), seconds_per_grid=seconds
        )
        expected, largest = walk(ids, grids, seconds)
        np.testing.assert_array_equal(ours, expected)
        assert following == largest


def test_adjacent_images_are_told_apart_by_their_grids():
    positions, following = positions_of([IMAGE] * 5, [(1, 4, 4), (1, 2, 2)])
    assert positions[0].tolist() == [0, 0, 0, 0, 2] and following == 3


@pytest.mark.parametrize(
    ("ids", "grids", "message"),
    [
        ([TEXT, IMAGE, TEXT], [(1, 4, 4)], "image 0 has grid .* 4 vision tokens"),
        ([TEXT], [(1, 4, 4)], "image 0 has grid"),
        ([IMAGE] * 4 + [TEXT] + [IMAGE], [(1, 4, 4)], "5 vision tokens, the 1 grids account for 4"),
        ([IMAGE, VIDEO, IMAGE, IMAGE], [(1, 4, 4)], "image 0 has grid"),
    ],
)
def test_tokens_and_grids_that_disagree(ids, grids, message):
    with pytest.raises(ValueError, match=message):
        positions_of(ids, grids)
