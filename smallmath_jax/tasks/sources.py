"""The problems a run trains on or is measured on, from the sources its config names."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from smallmath_jax.data.decontaminate import decontaminate
from smallmath_jax.data.problems import FILE_KINDS, load_problems
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem
from smallmath_jax.tasks import runs


def training_problems(
    sources: Sequence[str], limit: int, config: Any, folder: epath.Path, field: str = "problems"
) -> list[Problem]:
    """All problems of `sources` (config field `field`), at most `limit` of each (0: all), drawn by the config's seed.

    Those that share text or a picture with a problem of `config.data.decontaminate` or `config.eval.problems` (sources
    too: files, benchmark names) are left out. The run's output says how many, by benchmark, and `training_data` in its
    config.json what became of each source, with its licences. `folder` is the run's or its stage's. Raises ValueError
    for a bad source, and when nothing is left.
    """
    dropped: dict[str, Counter[str]] = {}
    found = load_sources(sources, config, field, limit, config.seed, dropped)
    benchmarks = load_benchmarks(config)
    kept: list[Problem] = []
    shared: Counter[str] = Counter()
    told = {}
    for source, (name, problems) in zip(sources, found.items(), strict=True):
        clean, counts = decontaminate(problems, benchmarks)
        kept += clean
        shared.update({name: count for name, count in counts.items() if count})
        for one in (name for name in counts if counts[name]):
            dropped.setdefault(name, Counter())[f"shared with {one}"] += counts[one]
        told[source] = {"problems": len(problems), "kept": len(clean)}
        told[source]["dropped"] = dict(dropped.get(name, {}))
        licences = Counter(problem.licence or "not stated" for problem in clean)
        origins = Counter(problem.origin or name for problem in clean)
        told[source] |= {"licence": dict(licences), "origin": dict(origins)}
    count = sum(map(len, found.values()))
    names = ", ".join(sources)
    if shared:
        runs.say(
            f"{count - len(kept)} of {count} training problems of {names} left out: "
            f"they share text or pictures with {', '.join(f'{n} ({c})' for n, c in shared.items())}"
        )
    runs.note_data(folder, told)
    if not kept:
        raise ValueError(
            f"{names}: all {count} problems share text or pictures with {', '.join(shared)} (data.decontaminate, "
            "eval.problems): these are benchmarks, train on others"
        )
    return kept


def load_benchmarks(config: Any) -> dict[str, list[Problem]]:
    """name -> problems of what a run must not train on: `data.decontaminate`, and what it is measured on.

    Embedded sources are none: their splits never share a problem.
    """
    found = load_sources(config.data.decontaminate, config, "data.decontaminate")
    measured = config.eval.problems if "eval" in config else ()
    others = [
        source
        for source in dict.fromkeys(measured)
        if source not in config.data.decontaminate and source.partition(":")[0] != "tiny"
    ]
    for name, problems in load_sources(others, config, "eval.problems").items():
        found[f"{name} of eval.problems" if name in found else name] = problems
    return found


def load_sources(
    sources: Sequence[str],
    config: Any,
    field: str,
    limit: int = 0,
    seed: int = 0,
    dropped: dict[str, Counter[str]] | None = None,
) -> dict[str, list[Problem]]:
    """name -> problems of each source, fields named by `config.data.fields`; ids are unique over all of them.

    `dropped` is told the rows that each left out on the way, by reason.
    Raises ValueError naming the config field that gave the source, and what is wrong with it; on every host when they
    have not loaded the same.
    """
    if hosts.host_count() == 1:
        return _load_sources(sources, config, field, limit, seed, dropped)
    loaded, told, error = {}, {}, None
    try:
        loaded = _load_sources(sources, config, field, limit, seed, dropped)
        told = digests([one for problems in loaded.values() for one in problems], field)
    except (ValueError, OSError) as caught:  # told to the others first, or they wait for this host
        error = caught
    hosts.same_everywhere({f"config.{field}: error": str(error or "none")} | told)
    if error is not None:
        raise error
    return loaded


def digests(problems: Sequence[Problem], field: str) -> dict[str, Any]:
    """What two hosts compare of the problems of a config field: how many, and digests of ids, texts and pictures."""
    parts = {
        "ids": lambda one: [one.id],
        "texts": lambda one: [one.problem, *one.accepted, *one.options, one.solution or ""],
        "pictures": lambda one: [_picture(image) for image in one.images],
    }
    found: dict[str, Any] = {f"config.{field}: problems": len(problems)}
    for name, read in parts.items():
        digest = hashlib.sha256()
        for one in problems:
            for piece in read(one):
                data = piece if isinstance(piece, bytes) else str(piece).encode(errors="replace")
                digest.update(b"%d " % len(data) + data)
        found[f"config.{field}: digest of {name}"] = digest.hexdigest()[:16]
    return found


def _picture(image: str | bytes) -> str | bytes:
    inside = isinstance(image, bytes) or image.startswith("data:")
    return image if inside else epath.Path(image).read_bytes()


def _load_sources(
    sources: Sequence[str],
    config: Any,
    field: str,
    limit: int,
    seed: int,
    dropped: dict[str, Counter[str]] | None,
) -> dict[str, list[Problem]]:
    mapping = {
        ours: None if theirs in (None, "none") else theirs
        for ours, theirs in config.data.fields.items()
        if theirs != ""
    }
    found = {}
    for name, source in zip(distinct_names(sources), sources, strict=True):
        try:
            found[name] = load_problems(
                source,
                limit=limit or None,
                seed=seed,
                say=runs.say,
                dropped=None if dropped is None else dropped.setdefault(name, Counter()),
                **mapping,
            )
        except ValueError as error:
            raise ValueError(f"config.{field}: {error}") from error
    ids = [{problem.id for problem in problems} for problems in found.values()]
    # Two sources may number their problems alike; a problem drawn twice from one source stays the same problem.
    if len(set().union(*ids)) < sum(map(len, ids)):
        found = {
            name: [dataclasses.replace(problem, id=f"{name}/{problem.id}") for problem in problems]
            for name, problems in found.items()
        }
    return found


def distinct_names(sources: Sequence[str]) -> list[str]:
    """A short name for each source; of several that would have the same, the later ones are numbered: test, test-2."""
    names: list[str] = []
    plain = [name_of(source) for source in sources]
    for name in plain:
        number, chosen = 1, name
        while chosen in names or (number > 1 and chosen in plain):
            number += 1
            chosen = f"{name}-{number}"
        names.append(chosen)
    return names


def name_of(source: str) -> str:
    """A source's short name: a file's without folder and ending, else the source itself without folder."""
    path = epath.Path(source)
    if source.lower().endswith(FILE_KINDS):
        return path.stem
    return path.name if "/" in source else source
