"""Images to patches, and patches to the padded row the vision tower reads. Host only: numpy and Pillow.

The numbers are those of Hugging Face's Pillow processor of Qwen2.5-VL: resize by BICUBIC on uint8, then scale and
normalise, then patches in merge order.
"""

import base64
import binascii
import dataclasses
import functools
import io
import math

import numpy as np
from etils import epath
from PIL import Image, ImageOps, UnidentifiedImageError

_MAX_ASPECT = 200


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """How images become patches; the published values of Qwen2.5-VL. Pixel limits bound height x width."""

    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2  # merge x merge patches form one vision token
    window: int = 112  # pixels
    min_pixels: int = 3136
    max_pixels: int = 12845056  # 16384 vision tokens: lower it
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    tokens_per_second: float = 2


def smart_resize(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """(height, width) rounded to whole vision tokens within the pixel limits, aspect kept as well as possible.

    Raises ValueError when one side is more than 200 times the other.
    """
    if max(height, width) > _MAX_ASPECT * min(height, width):
        raise ValueError(
            f"image of {height} x {width} pixels: one side is more than {_MAX_ASPECT} times the other; crop it"
        )
    factor = settings.patch * settings.merge
    tall, wide = round(height / factor) * factor, round(width / factor) * factor
    if tall * wide > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        tall = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif tall * wide < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        tall = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return tall, wide


def load_image(ref: str | bytes) -> np.ndarray:
    """uint8 [H, W, 3] of a path (local or gs://), a data: URL or encoded bytes; upright, transparency on white.

    Raises ValueError naming the image when it is missing or cannot be decoded.
    """
    name = repr(ref[:80]) if isinstance(ref, str) else f"{len(ref)} bytes"
    try:
        with Image.open(io.BytesIO(_encoded(ref))) as opened:
            image = ImageOps.exif_transpose(opened)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, (255, 255, 255, 255))
                image = Image.alpha_composite(white, image)
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError, binascii.Error, Image.DecompressionBombError) as error:
        raise ValueError(
            f"image {name} cannot be read ({type(error).__name__}: {error}); check the path and the file"
        ) from error


def patchify(
    frames: np.ndarray, settings: ImageSettings
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """Resizes, normalises and cuts uint8 [F, H, W, 3] (F = 1: an image) into patches.

    Returns (float32 [P, 3 * temporal_patch * patch * patch], grid (t, h, w) in patches). Each merge * merge
    consecutive rows form one vision token; inside a row the order is channel, time, row, column. Missing frames of
    the last temporal patch repeat the last one.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], not {frames.dtype} {frames.shape}")
    tall, wide = smart_resize(frames.shape[1], frames.shape[2], settings)
    resized = np.stack([_resize(frame, tall, wide) for frame in frames]).astype(np.float32)
    mean, std = (np.asarray(value, np.float32) for value in (settings.mean, settings.std))
    values = (resized * np.float32(1 / 255) - mean) / std
    missing = -len(values) % settings.temporal_patch
    values = np.concatenate([values, np.repeat(values[-1:], missing, axis=0)])
    patch, merge, depth = settings.patch, settings.merge, settings.temporal_patch
    grid = (len(values) // depth, tall // patch, wide // patch)
    blocks = values.reshape(
        grid[0], depth, grid[1] // merge, merge, patch, grid[2] // merge, merge, patch, 3
    )
    # (t, dt, h, mh, ph, w, mw, pw, c) -> (t, h, w, mh, mw, c, dt, ph, pw)
    blocks = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return np.ascontiguousarray(blocks).reshape(math.prod(grid), -1), grid


def token_count(grid: tuple[int, int, int] | np.ndarray, settings: ImageSettings) -> int:
    """Vision tokens of a grid (t, h, w) of patches."""
    return int(np.prod(grid)) // settings.merge**2


def token_index(token_ids: np.ndarray, image_id: int | None, video_id: int | None) -> np.ndarray:
    """int32 [T]: k at the k-th vision token of a row, -1 at text."""
    token_ids = np.asarray(token_ids)
    seen = np.zeros(token_ids.shape, bool)
    for special in (image_id, video_id):
        if special is not None:
            seen |= token_ids == special
    return np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)


def vision_row(
    pixels: np.ndarray | None, grids: np.ndarray, max_patches: int, settings: ImageSettings
) -> dict[str, np.ndarray]:
    """One row of the vision batch: pixels float32 [P, C] of all its images in processor order, grids int [N, 3].

    Returns arrays padded to max_patches, patches in window order (so a window is a run):
      pixels float32 [max_patches, C]; rotary int32 [max_patches, 2], (h, w) of each patch in its image;
      frame_segments and window_segments int32 [max_patches], one id for each frame and each window, 0 = padding;
      restore int32 [max_patches / merge^2], where the merged token of each raster place lies.
    Raises ValueError when the images do not fit or pixels and grids disagree.
    """
    group = settings.merge**2
    columns = 3 * settings.temporal_patch * settings.patch**2
    grids = np.asarray(grids, np.int64).reshape(-1, 3)
    total = int(grids.prod(axis=1).sum())
    given = 0 if pixels is None else len(pixels)
    if total != given:
        raise ValueError(f"grids {grids.tolist()} need {total} patches, {given} were given")
    if total > max_patches or max_patches % group:
        raise ValueError(
            f"{total} patches do not fit a row of {max_patches} (a multiple of {group}); "
            "raise the row's patches or lower max_pixels"
        )
    row = {
        "pixels": np.zeros((max_patches, columns), np.float32),
        "rotary": np.zeros((max_patches, 2), np.int32),
        "frame_segments": np.zeros(max_patches, np.int32),
        "window_segments": np.zeros(max_patches, np.int32),
        "restore": np.arange(max_patches // group, dtype=np.int32),
    }
    offset = 0
    for grid in grids.tolist():
        order, rotary, frames, windows, restore = _layout(tuple(grid), settings)
        end = offset + len(order)
        row["pixels"][offset:end] = pixels[offset:end][order]
        row["rotary"][offset:end] = rotary
        row["frame_segments"][offset:end] = frames + row["frame_segments"].max() + 1
        row["window_segments"][offset:end] = windows + row["window_segments"].max() + 1
        row["restore"][offset // group : end // group] = restore + offset // group
        offset = end
    return row


@functools.lru_cache(maxsize=512)
def _layout(grid: tuple[int, int, int], settings: ImageSettings) -> tuple[np.ndarray, ...]:
    """Window order of one image: (order [P], rotary [P, 2], frame [P], window [P], restore [P / merge^2])."""
    merge, (times, height, width) = settings.merge, grid
    if height % merge or width % merge:
        raise ValueError(f"grid {grid} is not a multiple of {merge} patches on each side")
    side = settings.window // settings.patch // merge  # of a window, in merged tokens
    shape = (times, height // merge, width // merge)
    time, row, column = (axis.ravel() for axis in np.indices(shape))
    across = -(-shape[2] // side)
    down = -(-shape[1] // side)
    window = (time * down + row // side) * across + column // side
    merged = np.argsort(window, kind="stable")  # within a window: raster order
    inner_row, inner_column = (axis.ravel() for axis in np.indices((merge, merge)))
    rows = (row[merged, None] * merge + inner_row).ravel()
    columns = (column[merged, None] * merge + inner_column).ravel()
    group = merge**2
    order = (merged[:, None] * group + np.arange(group)).ravel()
    frames, windows = np.repeat(time[merged], group), np.repeat(window[merged], group)
    return order, np.stack([rows, columns], axis=1), frames, windows, np.argsort(merged)


def _resize(frame: np.ndarray, tall: int, wide: int) -> np.ndarray:
    if frame.shape[:2] == (tall, wide):
        return frame
    return np.asarray(Image.fromarray(frame).resize((wide, tall), Image.Resampling.BICUBIC))


def _encoded(ref: str | bytes) -> bytes:
    if isinstance(ref, bytes):
        return ref
    if ref.startswith("data:"):
        return base64.b64decode(ref.partition(",")[2], validate=True)
    return epath.Path(ref).read_bytes()
