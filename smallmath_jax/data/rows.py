"""One row of any source as a Problem: names of fields, GSM8K's and MATH-Vision's forms, images, and what can be wrong.

A bad row raises RowError; the loader adds the file and line.
"""

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from smallmath_jax.records import Problem

# Our field -> the names it goes by, first found wins.
NAMES = {
    "problem": ("problem", "question"),
    "answer": ("answer",),
    "id": ("id", "unique_id"),
    "solution": ("solution",),
    "level": ("level",),
    "subject": ("subject",),
    "options": ("options",),
    "images": ("images", "image"),
    "source": ("source",),
    "licence": ("licence", "license"),
}
_CALCULATION = re.compile(r"<<[^<>]*>>")
_GSM8K = re.compile(r"\A(?P<solution>.*?)\n?[ \t]*####[ \t]*(?P<answer>[^\n]+?)\s*\Z", re.DOTALL)
_NUMBERED = re.compile(r"<image(\d+)>")


class RowError(ValueError):
    """A row that is no problem: `field` and what to do."""


def to_problem(
    row: Mapping[str, Any],
    *,
    folder: epath.Path | None = None,
    default_id: str = "",
    mapping: Mapping[str, str | None] | None = None,
    source: str = "",
) -> Problem:
    """The problem of a row.

    Image paths are relative to `folder`; `mapping` renames: our field -> theirs (None: none). A list of answers means
    that any of them is right: `answer` is the first, meta["accepted"] has all.

    Raises RowError naming the field and what to do.
    """
    if not isinstance(row, Mapping):
        raise RowError(
            f"a {type(row).__name__}, not an object with fields; write one object a line"
        )
    names, values = _pick(row, mapping or {})
    text = _text(values["problem"], names["problem"])
    answers = values["answer"] if isinstance(values["answer"], list) else [values["answer"]]
    if not answers:
        raise RowError(f"field {names['answer']!r}: an empty list; give an answer")
    answer, solution = _answer(answers[0], names["answer"])
    accepted = [_answer(other, names["answer"])[0] for other in answers]
    solution = _optional_text(values["solution"], names["solution"]) or solution
    images = _images(values["images"], names["images"], folder)
    known = set(names.values())
    return Problem(
        id=_identity(values["id"], default_id),
        problem=place_images(text, len(images)),
        answer=answer,
        images=images,
        solution=solution,
        level=_level(values["level"], names["level"]),
        subject=_optional_text(values["subject"], names["subject"]),
        options=_options(values["options"], names["options"]),
        source=_optional_text(values["source"], names["source"]) or source,
        licence=_optional_text(values["licence"], names["licence"]) or "",
        meta=_meta(row, known) | ({"accepted": accepted} if len(accepted) > 1 else {}),
    )


def _meta(row: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    """The row's other plain fields. Its own "accepted" is none of ours: `Problem.accepted` would take it for golds."""
    plain, taken = (str, int, float, bool), known | {"accepted"}
    return {
        key: value for key, value in row.items() if key not in taken and isinstance(value, plain)
    }


def _pick(
    row: Mapping[str, Any], mapping: Mapping[str, str | None]
) -> tuple[dict[str, str], dict[str, Any]]:
    """(our field -> the row's name for it, our field -> value or None)."""
    unknown = sorted(set(mapping) - set(NAMES))
    if unknown:
        raise RowError(f"no such field to map: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    names, values = {}, {}
    for field, candidates in NAMES.items():
        if field in mapping:
            candidates = (mapping[field],) if mapping[field] else ()
            if candidates and candidates[0] not in row:
                raise RowError(
                    f"field {candidates[0]!r}: missing; there are {', '.join(map(str, row))}"
                )
        found = [name for name in candidates if row.get(name) is not None]
        names[field] = found[0] if found else (candidates[0] if candidates else field)
        values[field] = _plain(row[found[0]]) if found else None
        if values[field] is None and field in ("problem", "answer"):
            wanted = " or ".join(repr(name) for name in candidates or NAMES[field])
            raise RowError(
                f"field {wanted}: missing; there are {', '.join(map(str, row)) or 'no fields'}; "
                f"rename it, or give its name as config.data.fields.{field}"
            )
    return names, values


def _plain(value: Any) -> Any:
    """numpy values and text in bytes (TFDS) as plain Python; images stay what they are."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray) and value.ndim <= 1:
        return value.tolist()
    return value


def _text(value: Any, name: str) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise RowError(
            f"field {name!r}: a {type(value).__name__}, not text; quote it or map another field"
        )
    if not value.strip():
        raise RowError(f"field {name!r}: empty; fill it in or leave the row out")
    return value


def _optional_text(value: Any, name: str) -> str | None:
    if value is None or (isinstance(value, (str, bytes)) and not value.strip()):
        return None
    return _text(str(value) if isinstance(value, (int, float)) else value, name)


def _answer(value: Any, name: str) -> tuple[str, str | None]:
    """(answer, worked solution or None): GSM8K's form has the solution before "#### answer".

    An empty answer is kept: published sets have some, and grading labels them unparsable_gold.
    """
    if isinstance(value, (bool, int, float)):
        return str(value), None
    if value in ("", b""):
        return "", None
    text = _text(value, name)
    found = _GSM8K.match(text)
    if found is None:
        return text, None
    solution = _CALCULATION.sub("", found["solution"]).strip()
    return found["answer"], solution or None


def _identity(value: Any, default: str) -> str:
    if value is None or value == "":
        return default
    if isinstance(value, (bool, float)) or not isinstance(value, (str, int, bytes)):
        raise RowError(f"field 'id': a {type(value).__name__}, not text or a whole number")
    return value.decode() if isinstance(value, bytes) else str(value)


def _level(value: Any, name: str) -> int | None:
    """1 to 5, from a number, "3" or "Level 3"; None for MATH's "Level ?"."""
    if isinstance(value, bytes):
        value = value.decode()
    if value is None or value in ("", "Level ?"):
        return None
    digits = re.fullmatch(r"(?:[Ll]evel\s*)?([1-5])(?:\.0)?", str(value).strip())
    if isinstance(value, bool) or digits is None:
        raise RowError(
            f"field {name!r}: {value!r} is no level; write 1 to 5 or 'Level 3', or ignore it with "
            "config.data.fields.level=none"
        )
    return int(digits[1])


def _options(value: Any, name: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, Mapping):  # {"A": ..., "B": ...}
        value = [value[key] for key in sorted(value)]
    if not isinstance(value, (list, tuple)):
        raise RowError(f"field {name!r}: a {type(value).__name__}, not a list of options")
    if len(value) > 26:
        raise RowError(f"field {name!r}: {len(value)} options, letters end at 26")
    return tuple(
        _text(str(item) if isinstance(item, (int, float)) else item, name) for item in value
    )


def place_images(text: str, images: int) -> str:
    """`text` with one "<image>" for each image. MATH-Vision numbers them (<image1>) and joins all pictures in one file.

    Raises RowError when marks and images differ in number.
    """
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    plain = text.count("<image>")
    if not numbers:
        if plain not in (0, images):
            raise RowError(
                f"{plain} <image> marks in the text and {images} images; give one mark for each image"
            )
        return text
    if plain or not images:
        raise RowError(
            f"the text has the marks {sorted(set(numbers))} as <imageN>, "
            + (
                "and <image> too; use one kind"
                if plain
                else "and the row has no image; add 'image'"
            )
        )
    distinct = list(dict.fromkeys(numbers))
    if images not in (1, len(distinct)):
        raise RowError(
            f"{len(distinct)} numbered image marks and {images} images; give one image for each"
        )
    if images > 1 and distinct != list(range(1, images + 1)):
        raise RowError(
            f"the image marks come in the order {distinct}; number them 1 to {images} as they are read"
        )
    placed: set[int] = set()

    def mark(found: re.Match[str]) -> str:
        number = int(found[1])
        if number in placed or (images == 1 and placed):
            return f"(picture {number})"
        placed.add(number)
        return "<image>"

    return _NUMBERED.sub(mark, text)


def _images(value: Any, name: str, folder: epath.Path | None) -> tuple[str | bytes, ...]:
    if value is None or (isinstance(value, str) and not value):
        return ()
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) > 1 and name == "image":
        raise RowError(f"field 'image': {len(values)} values; several images go into 'images'")
    return tuple(_image(item, name, folder) for item in values)


def _image(value: Any, name: str, folder: epath.Path | None) -> str | bytes:
    """A path that exists, a data: URL, or encoded bytes; Pillow images and pixel arrays are encoded as PNG."""
    if isinstance(value, Mapping):  # parquet and hf: {"bytes": ..., "path": ...}
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, np.ndarray):
        from PIL import Image

        value = Image.fromarray(np.squeeze(value))
    if hasattr(value, "save"):
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return buffer.getvalue()
    if isinstance(value, bytes):
        _check_header(io.BytesIO(value), f"{len(value)} bytes", name)
        return value
    if not isinstance(value, str):
        raise RowError(f"field {name!r}: a {type(value).__name__}, not a path or an encoded image")
    return _image_path(value, name, folder)


def _image_path(value: str, name: str, folder: epath.Path | None) -> str:
    if value.startswith("data:"):
        return value
    if value.startswith(("http://", "https://")):
        raise RowError(f"field {name!r}: {value[:60]} is a URL; download it and give the path")
    path = epath.Path(value)
    if not (path.is_absolute() or value.startswith("gs://")) and folder is not None:
        path = folder / value
    if not path.exists():
        raise RowError(
            f"field {name!r}: no image file {path}; paths are relative to the problem file"
        )
    if not str(path).startswith("gs://"):
        with path.open("rb") as file:
            _check_header(file, str(path), name)
    return str(path)


def _check_header(file: Any, what: str, name: str) -> None:
    from PIL import Image

    try:
        with Image.open(file):
            pass
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise RowError(
            f"field {name!r}: {what} cannot be read as an image ({error}); replace it"
        ) from error
