"""Pictures of the embedded problems: 56 x 56 pixels, so 4 x 4 patches and 4 vision tokens after merging.

A scene is a short text that names all a picture shows; drawing is a pure function of it, with a dot font of our own, so
the pixels do not depend on fonts or versions of Pillow.
"""

import io
import random
from collections.abc import Callable

from PIL import Image, ImageDraw

SIDE, CELL = 56, 14  # picture side and patch side, pixels
COLORS = {"r": (220, 30, 30), "b": (30, 60, 220)}
BAR_UNIT = 6  # pixels a unit of height
GRID_UNIT, GRID_MARGIN = 7, 3
DOT = 2  # pixels a dot of a digit
# Rows of three dots, top to bottom, as the octal digits of 0..9.
DIGITS = "75557 26227 71747 71717 55711 74717 74757 71111 75757 75717".split()

Scene = tuple[str, dict[str, int], dict[str, str]]  # scene, numbers to read, numbers as sums


def random_scene(kind: str, source: random.Random) -> Scene:
    """A scene of a kind, the numbers a reader finds in it, and the counted ones as sums over the four quadrants."""
    return SCENES[kind][0](source)


def draw_scene(kind: str, scene: str) -> bytes:
    """The PNG bytes of a picture, RGB.

    squares: 16 characters of ".rb", at most one square a patch; rectangle: "w h", labelled in digits;
    bars: four heights; point: "x y" on an 8 x 8 grid whose origin is at the bottom left.
    """
    image = Image.new("RGB", (SIDE, SIDE), "white")
    SCENES[kind][1](ImageDraw.Draw(image), scene)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _random_squares(source: random.Random) -> Scene:
    filled = set(source.sample(range(16), source.randint(1, 9)))
    scene = "".join(source.choice("rb") if cell in filled else "." for cell in range(16))
    numbers, sums = {}, {}
    for name, colors in (("n", "rb"), ("r", "r"), ("b", "b")):
        quadrants = [0, 0, 0, 0]
        for cell, color in enumerate(scene):
            quadrants[cell // 8 * 2 + cell % 4 // 2] += color in colors
        numbers[name] = sum(quadrants)
        sums[name] = "+".join(map(str, quadrants))
    return scene, numbers, sums


def _draw_squares(canvas: ImageDraw.ImageDraw, scene: str) -> None:
    for cell, color in enumerate(scene):
        if color != ".":
            left, top = cell % 4 * CELL + 2, cell // 4 * CELL + 2
            canvas.rectangle((left, top, left + 9, top + 9), fill=COLORS[color])


def _random_rectangle(source: random.Random) -> Scene:
    width, height = source.randint(2, 12), source.randint(2, 9)
    return f"{width} {height}", {"w": width, "h": height}, {}


def _draw_rectangle(canvas: ImageDraw.ImageDraw, scene: str) -> None:
    width, height = map(int, scene.split())
    canvas.rectangle((2, 2, 12 + 2 * width, 12 + 2 * height), outline="black", width=2)
    _draw_number(canvas, CELL, 3 * CELL + 2, width)
    _draw_number(canvas, 3 * CELL, CELL + 2, height)


def _draw_number(canvas: ImageDraw.ImageDraw, left: int, top: int, number: int) -> None:
    for place, digit in enumerate(str(number)):
        for row, dots in enumerate(DIGITS[int(digit)]):
            for column in range(3):
                if int(dots, 8) >> (2 - column) & 1:
                    x, y = left + (place * 4 + column) * DOT - place, top + row * DOT
                    canvas.rectangle((x, y, x + DOT - 1, y + DOT - 1), fill="black")


def _random_bars(source: random.Random) -> Scene:
    heights = [source.randint(1, 9) for _ in range(4)]
    return " ".join(map(str, heights)), dict(zip("abcd", heights, strict=True)), {}


def _draw_bars(canvas: ImageDraw.ImageDraw, scene: str) -> None:
    for place, height in enumerate(scene.split()):
        left, top = place * CELL + 2, SIDE - BAR_UNIT * int(height)
        canvas.rectangle((left, top, left + 9, SIDE - 1), fill=COLORS["b"])
        for unit in range(1, int(height)):  # a rule a unit, so that heights can be counted
            line = SIDE - BAR_UNIT * unit
            canvas.line((left, line, left + 9, line), fill="white")


def _random_point(source: random.Random) -> Scene:
    x, y = source.randint(0, 7), source.randint(0, 7)
    return f"{x} {y}", {"x": x, "y": y}, {}


def _draw_point(canvas: ImageDraw.ImageDraw, scene: str) -> None:
    x, y = map(int, scene.split())
    for line in range(GRID_MARGIN, SIDE, GRID_UNIT):
        shade = (90, 90, 90) if line == GRID_MARGIN else (215, 215, 215)
        canvas.line((line, 0, line, SIDE - 1), fill=shade)
        canvas.line((0, SIDE - 1 - line, SIDE - 1, SIDE - 1 - line), fill=shade)
    center = GRID_MARGIN + GRID_UNIT * x, SIDE - 1 - GRID_MARGIN - GRID_UNIT * y
    corners = (center[0] - 2, center[1] - 2, center[0] + 2, center[1] + 2)
    canvas.rectangle(corners, fill=COLORS["r"])


SCENES: dict[str, tuple[Callable[..., Scene], Callable[..., None]]] = {
    "squares": (_random_squares, _draw_squares),
    "rectangle": (_random_rectangle, _draw_rectangle),
    "bars": (_random_bars, _draw_bars),
    "point": (_random_point, _draw_point),
}
