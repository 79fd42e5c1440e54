"""Preprocessing held against transformers' Pillow processor, and the vision row against the rules of the tower."""

import base64
import io

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from smallmath_jax.data.images import (
    ImageSettings,
    load_image,
    patchify,
    smart_resize,
    token_index,
    vision_row,
)

SETTINGS = ImageSettings()


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize(
    ("size", "limits"),
    [
        ((224, 224), (3136, 12845056)),  # no resize
        ((97, 331), (3136, 12845056)),
        ((20, 30), (3136, 12845056)),  # up: both sides below one token
        ((5, 900), (3136, 12845056)),  # aspect 180
        ((901, 6), (3136, 12845056)),
        ((300, 410), (3136, 50176)),  # down
        ((700, 30), (3136, 6272)),  # down, one side at its least
        ((1, 1), (3136, 12845056)),
        ((42, 70), (784, 12845056)),  # halves round to even
        ((60, 60), (100352, 200704)),  # up to a raised least
    ],
)
def test_patches_equal_transformers(size, limits):
    settings = ImageSettings(min_pixels=limits[0], max_pixels=limits[1])
    image = random_image(*size)
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits[0], "longest_edge": limits[1]}
    )
    theirs = processor(Image.fromarray(image), return_tensors="np")
    pixels, grid = patchify(image[None], settings)
    assert grid == tuple(theirs["image_grid_thw"][0])
    assert pixels.dtype == np.float32
    np.testing.assert_allclose(pixels, theirs["pixel_values"], atol=1e-6)


def test_published_sizes():
    sizes = {
        (480, 640): (476, 644),
        (1080, 1920): (1092, 1932),
        (100, 150): (112, 140),
        (20, 30): (56, 84),
        (4000, 6000): (2912, 4368),
    }
    assert {size: smart_resize(*size, SETTINGS) for size in sizes} == sizes


def test_extreme_aspect_is_an_error():
    assert smart_resize(14, 2800, SETTINGS)[0] >= 28
    with pytest.raises(ValueError, match="14 x 2801.*200 times"):
        smart_resize(14, 2801, SETTINGS)


def test_video_rows_are_images_side_by_side_in_time():
    frames = np.stack([random_image(56, 84), random_image(56, 84)[::-1], random_image(56, 84) // 2])
    pixels, grid = patchify(frames, SETTINGS)
    assert grid == (2, 4, 6)
    values = pixels.reshape(2, 24, 3, 2, 14, 14)
    for place, frame in enumerate([0, 1, 2, 2]):  # the last frame is repeated
        alone, _ = patchify(frames[frame : frame + 1], SETTINGS)
        expected = alone.reshape(24, 3, 2, 14, 14)[:, :, 0]
        np.testing.assert_array_equal(values[place // 2, :, :, place % 2], expected)


def encode(image: Image.Image, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, options.pop("format", "PNG"), **options)
    return stream.getvalue()


def test_load_image_accepts_bytes_paths_and_data_urls(tmp_path):
    array = random_image(9, 7)
    data = encode(Image.fromarray(array))
    (tmp_path / "one.png").write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for ref in (data, str(tmp_path / "one.png"), url):
        np.testing.assert_array_equal(load_image(ref), array)


def test_load_image_puts_transparency_on_white_and_stands_upright():
    drawing = np.zeros((2, 3, 4), np.uint8)  # black lines on nothing, as diagrams are often saved
    drawing[0, 0] = 0, 0, 0, 255
    loaded = load_image(encode(Image.fromarray(drawing, "RGBA")))
    assert loaded[0, 0].tolist() == [0, 0, 0] and loaded[1, 2].tolist() == [255, 255, 255]
    grey = load_image(encode(Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))))
    assert grey.shape == (2, 3, 3) and grey[1, 2].tolist() == [5, 5, 5]
    turned = Image.fromarray(random_image(4, 6))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned: show rotated by 90 degrees
    shown = load_image(encode(turned, format="JPEG", exif=exif))
    assert shown.shape == (6, 4, 3)


@pytest.mark.parametrize(
    "ref", ["/nowhere/figure.png", b"not an image", "data:image/png;base64,!!!", b""]
)
def test_unreadable_image_is_one_clear_error(ref):
    with pytest.raises(ValueError, match="image .* cannot be read .*check the path and the file"):
        load_image(ref)


def test_truncated_image_is_the_same_error():
    data = encode(Image.fromarray(random_image(50, 50)))
    with pytest.raises(ValueError, match=f"image {len(data) // 2} bytes cannot be read"):
        load_image(data[: len(data) // 2])


def test_window_order_of_the_worked_example():
    grid = [1, 12, 18]  # 6 x 9 merged tokens, windows of 4 x 4
    pixels = np.repeat(np.arange(216, dtype=np.float32)[:, None], 1176, axis=1)
    row = vision_row(pixels, [grid], 256, SETTINGS)
    merged = (row["pixels"][:216:4, 0] // 4).astype(int)
    assert merged[:20].tolist() == [0, 1, 2, 3, 9, 10, 11, 12, 18, 19, 20, 21, 27, 28, 29, 30] + [
        4,
        5,
        6,
        7,
    ]
    assert merged[32:40].tolist() == [8, 17, 26, 35, 36, 37, 38, 39]
    bounds = np.flatnonzero(np.diff(row["window_segments"])) + 1
    assert bounds.tolist() == [64, 128, 144, 176, 208, 216]
    np.testing.assert_array_equal(merged[row["restore"][:54]], np.arange(54))
    np.testing.assert_array_equal(row["restore"][54:], np.arange(54, 64))
    assert (row["window_segments"][216:] == 0).all() and (row["frame_segments"][216:] == 0).all()
    assert row["pixels"][216:].sum() == 0


def brute_force_segments(grids, settings):
    """(frame, window) of every patch in processor order, by walking it patch by patch."""
    side = settings.window // settings.patch
    names = []
    for image, (times, height, width) in enumerate(grids):
        for time in range(times):
            for row in range(0, height, 2):
                for column in range(0, width, 2):
                    for inner in range(4):
                        place = row + inner // 2, column + inner % 2
                        window = image, time, place[0] // side, place[1] // side
                        names.append(((image, time), window, place))
    return names


def test_segments_never_cross_frames_windows_or_images():
    grids = [(2, 10, 14), (1, 16, 8), (1, 2, 2)]
    count = sum(int(np.prod(grid)) for grid in grids)
    pixels = np.repeat(np.arange(count, dtype=np.float32)[:, None], 1176, axis=1)
    row = vision_row(pixels, grids, count + 16, SETTINGS)
    truth = brute_force_segments(grids, SETTINGS)
    source = row["pixels"][:count, 0].astype(int)
    assert sorted(source) == list(range(count))
    frames, windows = {}, {}
    for place, patch in enumerate(source):
        frame, window, coordinates = truth[patch]
        assert (
            frames.setdefault(frame, row["frame_segments"][place]) == row["frame_segments"][place]
        )
        assert (
            windows.setdefault(window, row["window_segments"][place])
            == row["window_segments"][place]
        )
        assert tuple(row["rotary"][place]) == coordinates
    assert len(set(frames.values())) == len(frames) == 4
    assert len(set(windows.values())) == len(windows)
    assert 0 not in windows.values() and 0 not in frames.values()
    runs = np.count_nonzero(np.diff(row["window_segments"][:count])) + 1
    assert runs == len(windows)  # each window is one run, as local attention needs
    merged = (source[::4] // 4)[row["restore"][: count // 4]]
    np.testing.assert_array_equal(merged, np.arange(count // 4))


def test_row_without_images_is_all_padding():
    row = vision_row(None, np.zeros((0, 3)), 16, SETTINGS)
    assert not row["frame_segments"].any() and not row["window_segments"].any()
    assert row["restore"].tolist() == [0, 1, 2, 3]


def test_row_refuses_what_does_not_fit():
    pixels = np.zeros((16, 1176), np.float32)
    with pytest.raises(ValueError, match="16 patches do not fit a row of 12"):
        vision_row(pixels, [(1, 4, 4)], 12, SETTINGS)
    with pytest.raises(ValueError, match="need 24 patches, 16 were given"):
        vision_row(pixels, [(1, 4, 6)], 64, SETTINGS)


def test_token_index_counts_vision_tokens_in_reading_order():
    ids = np.array([7, 90, 90, 7, 91, 90, 8])
    assert token_index(ids, 90, 91).tolist() == [-1, 0, 1, -1, 2, 3, -1]
    assert token_index(ids, None, None).tolist() == [-1] * 7
