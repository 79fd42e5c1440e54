"""Sources of problems: embedded ones, files, the Hugging Face hub, TFDS, gs://, and named public sets.

    tiny, tiny:test, tiny:unseen          embedded, endless
    FILE.jsonl  FILE.json  FILE.parquet   local or gs://
    hf:NAME[:CONFIG[:SPLIT]]              the hub, or a folder `datasets` can load
    tfds:NAME                             a TFDS set, or the folder of a prepared one; TensorFlow is not needed
    convert:NAME  math500                 a row of converters.CONVERTERS or converters.BENCHMARKS

Everything wrong with a source is found here, before any device work.
"""

import contextlib
import difflib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from smallmath_jax.data.batches import epoch_order
from smallmath_jax.data.hub import from_cache, reachable
from smallmath_jax.data.rows import RowError, to_problem
from smallmath_jax.records import Problem

FILE_KINDS = (".jsonl", ".json", ".parquet")
SHOWN_ERRORS = 10
LOG = logging.getLogger(__name__)
Row = tuple[str, Any]  # (where it stands: "line 3", what it holds)


def load_problems(
    source: str,
    split: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = LOG.info,
    dropped: Counter[str] | None = None,
    **mapping: str | None,
) -> list[Problem]:
    """The problems of a source. `limit` draws that many, always the same for a seed, in the source's order.

    `mapping` renames fields (answer="final_answer"; level=None ignores one) of files, hub and TFDS sets. `say` is told
    in a line what a named public set lost on its way, `dropped` counts it by reason. Raises ValueError that names file,
    line, field and what to do for the first bad rows, for ids used twice and for an unknown source, which gets the
    nearest known name.
    """
    kind, _, rest = source.partition(":")
    if kind == "tiny":
        return _load_tiny(rest, split, limit, seed)
    if kind == "convert":
        from smallmath_jax.data import converters

        return converters.load_converted(rest, limit, seed, say, dropped)
    if kind == "hf":
        return select(_mapped(source, mapping), hub_rows(rest, split, source), source, limit, seed)
    if kind == "tfds":
        return select(_mapped(source, mapping), tfds_rows(rest, split, source), source, limit, seed)
    if source.lower().endswith(FILE_KINDS):
        return _load_file(source, limit, seed, mapping)
    from smallmath_jax.data import converters

    if source in converters.BENCHMARKS:
        return converters.load_benchmark(source, limit, seed, say, dropped)
    raise ValueError(_unknown_source(source))


def _load_tiny(name: str, split: str | None, limit: int | None, seed: int) -> list[Problem]:
    from smallmath_jax.data.tiny import tiny_problems

    name = name or split or "train"
    if name not in ("train", "test", "unseen"):
        near = difflib.get_close_matches(name, ("train", "test", "unseen"), 1, 0.0)[0]
        raise ValueError(
            f"tiny:{name}: no such split, did you mean tiny:{near}? Known: train, test, unseen"
        )
    return tiny_problems(name, limit or 1000, seed)


def _unknown_source(source: str) -> str:
    from smallmath_jax.data import converters

    known = ["tiny", "tiny:train", "tiny:test", "tiny:unseen", *converters.BENCHMARKS]
    known += [f"convert:{name}" for name in converters.CONVERTERS]
    near = difflib.get_close_matches(source, known, 2, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return (
        f"unknown source {source!r}; {hint}Known: {', '.join(known)}, "
        "a file (.jsonl, .json, .parquet; local or gs://), hf:NAME, tfds:NAME"
    )


# Choosing and checking rows


def select(
    convert: Callable[[Any, int], Problem | None],
    rows: "Rows",
    source: str,
    limit: int | None,
    seed: int,
) -> list[Problem]:
    """Problems of indexable rows: all, or `limit` of them drawn by `seed`, in the rows' order.

    `convert` may return None for a row that it leaves out. Raises ValueError listing the bad rows, and ids used twice.
    """
    count = len(rows)
    sample = bool(limit) and limit < count
    found: dict[int, Problem] = {}
    errors: list[str] = []
    for index in epoch_order(count, seed, 0).tolist() if sample else range(count):
        if limit and len(found) == limit:
            break
        try:
            problem = convert(rows.get(index), index)
        except RowError as error:
            errors.append(f"{source}, {rows.where(index)}: {error}")
            continue
        if problem is not None:
            found[index] = problem
    _raise_errors(errors)
    problems = [found[index] for index in sorted(found)]
    check_ids(problems, [f"{source}, {rows.where(index)}" for index in sorted(found)])
    if not problems:
        raise ValueError(f"{source}: no problems in it")
    return problems


class Rows:
    """Rows that can be counted and fetched, and a name for the place of each."""

    def __init__(self, count: int, get: Callable[[int], Any], where: Callable[[int], str]):
        self.count, self.get, self.where = count, get, where

    def __len__(self) -> int:
        return self.count


def check_ids(problems: Iterable[Problem], places: Iterable[str]) -> None:
    """Raises ValueError naming the ids used twice and where."""
    seen: dict[str, str] = {}
    errors = []
    for problem, place in zip(problems, places, strict=True):
        if problem.id in seen:
            errors.append(
                f"{place}: field 'id': {problem.id!r} is used before, at {seen[problem.id]}; make ids unique"
            )
        seen.setdefault(problem.id, place)
    _raise_errors(errors)


def _raise_errors(errors: list[str]) -> None:
    if errors:
        more = len(errors) - SHOWN_ERRORS
        tail = [f"... and {more} more bad rows"] if more > 0 else []
        raise ValueError("\n".join(errors[:SHOWN_ERRORS] + tail))


def _mapped(source: str, mapping: dict[str, str | None]) -> Callable[[Any, int], Problem]:
    stem = source.split(":")[1].rstrip("/").split("/")[-1]
    return lambda row, index: to_problem(
        row, default_id=f"{stem}-{index}", mapping=mapping, source=source
    )


# Files


def _load_file(
    source: str, limit: int | None, seed: int, mapping: dict[str, str | None]
) -> list[Problem]:
    """Every row is checked, also those that `limit` leaves out: a file is the user's own to mend."""
    path = epath.Path(source)
    try:
        found = path.exists()
    except OSError as error:
        raise ValueError(
            f"{source}: cannot be reached ({error}); check network and login"
        ) from error
    if not found:
        raise ValueError(
            f"{source}: no such file; give the path of a .jsonl, .json or .parquet file"
        )
    read = {".jsonl": _jsonl_rows, ".json": _json_rows, ".parquet": _parquet_rows}
    problems, places, errors = [], [], []
    for place, row in read[path.suffix.lower()](path):
        try:
            if isinstance(row, RowError):
                raise row
            default_id = f"{path.stem}-{len(places) + len(errors)}"
            problem = to_problem(
                row, folder=path.parent, default_id=default_id, mapping=mapping, source=path.stem
            )
        except RowError as error:
            errors.append(f"{source}, {place}: {error}")
            continue
        problems.append(problem)
        places.append(f"{source}, {place}")
    _raise_errors(errors)
    check_ids(problems, places)
    if not problems:
        raise ValueError(f"{source}: no problems in it")
    if limit and limit < len(problems):
        chosen = sorted(epoch_order(len(problems), seed, 0)[:limit].tolist())
        problems = [problems[index] for index in chosen]
    return problems


def _read_text(path: epath.Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error


def _jsonl_rows(path: epath.Path) -> Iterator[Row]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield (
                f"line {number}",
                RowError(
                    f"not a JSON object ({error.msg}, column {error.colno}); mend or delete the line"
                ),
            )


def _json_rows(path: epath.Path) -> Iterator[Row]:
    """A list of objects, or an object that holds one such list ({"example": [...]})."""
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}, column {error.colno}); "
            "one object a line belongs in a .jsonl file"
        ) from error
    lists = [data] if isinstance(data, list) else []
    if isinstance(data, dict):
        lists = [value for value in data.values() if isinstance(value, list)]
    if len(lists) != 1:
        raise ValueError(f"{path}: neither a list of problems nor an object with one such list")
    for number, row in enumerate(lists[0], 1):
        yield f"item {number}", row


def _parquet_rows(path: epath.Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            table = pyarrow.parquet.ParquetFile(file).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not a Parquet file ({error}); write it again") from error
    number = 0
    for batch in table.to_batches(max_chunksize=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


# Hub and TFDS


def hub_rows(name: str, split: str | None, source: str) -> Rows:
    """Rows of hf:NAME[:CONFIG[:SPLIT]], images kept encoded. Raises ValueError naming the splits there are."""
    import datasets
    from huggingface_hub import constants

    name, _, rest = name.partition(":")
    config, _, own_split = rest.partition(":")
    split = split or own_split or None
    endpoint = constants.ENDPOINT
    offline = not epath.Path(name).exists() and not reachable(endpoint)
    try:
        with from_cache() if offline else contextlib.nullcontext():
            data = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        if offline:
            raise ValueError(
                f"{source}: {endpoint} cannot be reached, and the set is not in this machine's cache ({error}); give "
                "a file (.jsonl, .json, .parquet) with the problems instead, or connect the machine"
            ) from error
        raise ValueError(
            f"{source}: {error}. The form is hf:NAME:CONFIG:SPLIT; check the name, the network and, for a gated set, "
            "the login"
        ) from error
    if split is None:
        chosen = "train" if "train" in data else next(iter(data))
        if len(data) > 1 and "train" not in data:
            raise ValueError(
                f"{source}: name one of its splits, {', '.join(data)}: hf:{name}:{config}:SPLIT"
            )
        data = data[chosen]
    for column, feature in data.features.items():
        encoded = _undecoded(feature)
        if encoded is not None:
            data = data.cast_column(column, encoded)
    return Rows(len(data), lambda index: data[index], lambda index: f"row {index + 1}")


def _undecoded(feature: Any) -> Any:
    """The same feature with images left encoded; None when it holds none."""
    import datasets

    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    inner = getattr(feature, "feature", None)
    inner = feature[0] if isinstance(feature, list) else inner
    if isinstance(inner, datasets.Image):
        undecoded = datasets.Image(decode=False)
        return [undecoded] if isinstance(feature, list) else type(feature)(undecoded)
    return None


def tfds_rows(name: str, split: str | None, source: str) -> Rows:
    """Rows of a TFDS set kept as array_record, the format that is read without TensorFlow.

    `name` is a TFDS name, downloaded and prepared when it is not there yet, or the folder of a prepared set. Raises
    ValueError naming the splits, or how to prepare the set.
    """
    import tensorflow_datasets as tfds

    try:
        if name.startswith(("/", ".", "~", "gs://")):
            builder = tfds.builder_from_directory(epath.Path(name).expanduser())
        else:
            _check_tfds_name(name, tfds)
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        splits = list(builder.info.splits)
        split = split or ("train" if "train" in splits else splits[0])
        if split not in splits:
            raise ValueError(f"no split {split!r}, there are {', '.join(splits)}")
        data = builder.as_data_source(
            split=split, decoders=_skip_images(builder.info.features, tfds)
        )
    except ImportError as error:
        raise ValueError(
            f"{source}: preparing this set needs {error.name}; prepare it once where that is installed, with "
            "file_format='array_record', then give its folder: tfds:FOLDER"
        ) from error
    except (OSError, ValueError, LookupError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{source}: {reason} Give a TFDS name or the folder of a set prepared with file_format='array_record'"
        ) from error
    return Rows(len(data), lambda index: data[index], lambda index: f"row {index + 1}")


def _check_tfds_name(name: str, tfds: Any) -> None:
    """Before TFDS looks for the name in a registry over the network, with minutes of retries."""
    base = name.split("/")[0].split(":")[0]
    prepared = epath.Path(tfds.core.constants.DATA_DIR).expanduser() / base
    known = tfds.list_builders(with_community_datasets=False)
    if base not in known and base != "huggingface" and not prepared.exists():
        near = difflib.get_close_matches(base, known, 2, 0.6)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"none of TFDS' {len(known)} sets is named {base!r}.{hint}")


def _skip_images(features: Any, tfds: Any) -> dict[str, Any]:
    return {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
