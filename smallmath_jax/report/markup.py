"""HTML text: escaping of what models write, pictures as data URLs, tables, and the shell of a self-contained page.

Everything shown was written by a model or read from a file, so it is hostile until escaped. A page allows no outside
resource and no script but the ones named to `document` (Content-Security-Policy), whatever its text holds.
"""

import base64
import functools
import hashlib
import html
import importlib.resources
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

# Marks that reorder or hide text (Unicode bidirectional controls, zero-width characters, other controls than tab and
# line ends): shown by their number, so that a text cannot read otherwise than it is.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
IMAGE_KINDS = {  # first bytes of a file -> its media type
    b"\x89PNG\r\n\x1a\n": "image/png",
    b"\xff\xd8\xff": "image/jpeg",
    b"GIF8": "image/gif",
    b"RIFF": "image/webp",
    b"BM": "image/bmp",
}
DATA_URL = re.compile(r"data:image/(png|jpeg|gif|webp|bmp);base64,[A-Za-z0-9+/=\s]*")


def escape(text: Any) -> str:
    """Text for element content or a quoted attribute; invisible and reordering characters become visible marks."""
    return visible(html.escape(str(text), quote=True))


def visible(text: str) -> str:
    """The text with a mark for each invisible or reordering character."""
    return INVISIBLE.sub(lambda found: f"⟦U+{ord(found[0]):04X}⟧", text)


def script_json(value: Any) -> str:
    """JSON that can stand inside a <script> element: ASCII, without <, > and &; null for numbers not finite."""
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def data_url(source: str) -> str | None:
    """A picture as a data: URL, from such a URL or a path; None when it is neither, or is no longer there."""
    if source.startswith("data:"):
        return source if DATA_URL.fullmatch(source) else None
    try:
        content = epath.Path(source).read_bytes()
    except (OSError, ValueError):  # ValueError: no file name (a null byte, a lone surrogate)
        return None
    kind = next((kind for mark, kind in IMAGE_KINDS.items() if content.startswith(mark)), None)
    return f"data:{kind};base64,{base64.b64encode(content).decode()}" if kind else None


def picture(source: str) -> str:
    """A problem's picture, or a line that says it cannot be shown."""
    url = data_url(source)
    if url is None:
        return f"<p class=note>picture {escape(source[:120])} cannot be shown</p>"
    return f'<img class=problem src="{url}" alt="the problem\'s picture">'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls within itself on narrow screens. Cells are HTML: escape what they hold."""
    top = "".join(f"<th scope=col>{cell}" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<div class=scroll tabindex=0><table><thead><tr>{top}<tbody>{body}</table></div>"


def figure(svg: bytes, caption: str = "") -> str:
    """A plot of plots.py (SVG) with its caption."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg.decode()}{below}</figure>"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


@functools.cache
def asset(name: str) -> str:
    """A style sheet or script that lies in report/assets."""
    return (importlib.resources.files("smallmath_jax.report") / "assets" / name).read_text("utf-8")


def document(title: str, styles: Sequence[str], body: str, scripts: Sequence[str] = ()) -> str:
    """A whole page. `styles` and `scripts` are asset names; only these very scripts may run in it."""
    codes = [asset(name) for name in scripts]
    hashes = (
        "'none'"
        if not codes
        else " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
            for code in codes
        )
    )
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {hashes}; "
        "base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>{''.join(asset(name) for name in styles)}</style></head><body>",
            body,
            *(f"<script>{code}</script>" for code in codes),
            "</body></html>",
        ]
    )
