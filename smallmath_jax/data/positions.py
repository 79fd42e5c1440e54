"""mRoPE positions (t, h, w), computed once on the host and stored with the sample (law 3). Host only.

Text counts up on all three axes; an image keeps t and spreads h and w over its merged grid; a video's t moves with
time. What follows starts one above the largest position so far: the original semantics (transformers 4.49, vLLM);
transformers 5.3 on lets text overlap a long video.
"""

from collections.abc import Sequence

import numpy as np

from smallmath_jax.data.images import ImageSettings, token_count


def mrope_positions(
    token_ids: np.ndarray,
    grids: np.ndarray,
    image_id: int | None,
    video_id: int | None,
    settings: ImageSettings,
    seconds_per_grid: Sequence[float] | None = None,
) -> tuple[np.ndarray, int]:
    """Positions int32 [3, T] of one unpadded sequence, and the position of the token that would follow it.

    grids int [N, 3] are the patch grids (t, h, w) of images and videos in reading order; seconds_per_grid has one
    number for each of them (temporal_patch / sampled frames per second; unused for images; None: 1.0). Raises
    ValueError when vision tokens and grids disagree.
    """
    token_ids = np.asarray(token_ids)
    grids = np.asarray(grids, np.int64).reshape(-1, 3)
    positions = np.zeros((3, len(token_ids)), np.int32)
    place, counter = 0, 0
    vision = [special for special in (image_id, video_id) if special is not None]
    starts = np.flatnonzero(np.isin(token_ids, vision)) if vision else np.zeros(0, np.int64)
    for number, grid in enumerate(grids):
        ahead = starts[starts >= place]
        start = int(ahead[0]) if len(ahead) else len(token_ids)
        length = token_count(grid, settings)
        kind = token_ids[start] if len(ahead) else None
        if start + length > len(token_ids) or np.any(token_ids[start : start + length] != kind):
            raise ValueError(
                f"image {number} has grid {grid.tolist()}, i.e. {length} vision tokens, but the text does not hold "
                f"that many in a row at token {start}; expand each image mark to its grid"
            )
        text = start - place
        positions[:, place:start] = counter + np.arange(text)
        counter += text
        seconds = 0.0
        if kind == video_id and kind != image_id:
            seconds = 1.0 if seconds_per_grid is None else float(seconds_per_grid[number])
        positions[:, start : start + length] = counter + _grid_offsets(grid, settings, seconds)
        counter = int(positions[:, start : start + length].max()) + 1
        place = start + length
    if np.any(starts >= place):
        raise ValueError(
            f"the text has {len(starts)} vision tokens, the {len(grids)} grids account for "
            f"{int(np.sum(starts < place))}; give one grid for each image"
        )
    positions[:, place:] = counter + np.arange(len(token_ids) - place)
    return positions, counter + len(token_ids) - place


def _grid_offsets(grid: np.ndarray, settings: ImageSettings, seconds: float) -> np.ndarray:
    """int [3, tokens]: (t, h, w) of each vision token from its image's first, t in position units."""
    times, height, width = int(grid[0]), int(grid[1]), int(grid[2])
    shape = (times, height // settings.merge, width // settings.merge)
    offsets = np.indices(shape).reshape(3, -1)
    # fp32 and this order of products, as the original computes it: a floor may hang on the last bit
    moved = np.arange(times, dtype=np.float32) * np.float32(seconds)
    moved = np.floor(moved * np.float32(settings.tokens_per_second)).astype(np.int32)
    offsets[0] = moved[offsets[0]]
    return offsets
