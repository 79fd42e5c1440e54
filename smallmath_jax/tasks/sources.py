"""The problems a run trains on, without those of the benchmarks its config names."""

from collections.abc import Sequence
from typing import Any

from etils import epath

from smallmath_jax.data.decontaminate import decontaminate
from smallmath_jax.data.problems import load_problems
from smallmath_jax.records import Problem
from smallmath_jax.tasks import runs


def training_problems(
    sources: Sequence[str], limit: int, config: Any, folder: epath.Path
) -> list[Problem]:
    """All problems of `sources`, at most `limit` of each (0: all), drawn by the config's seed.

    Those that share text or a picture with a problem of `config.data.decontaminate` (sources too: files, benchmark
    names) are left out; the run's output and `training_data` in its config.json say how many, by benchmark. `folder`
    is the run's or its stage's. Raises ValueError for a bad source, and when nothing is left.
    """
    problems = [
        problem
        for source in sources
        for problem in load_problems(source, limit=limit or None, seed=config.seed)
    ]
    benchmarks = {name_of(source): load_problems(source) for source in config.data.decontaminate}
    kept, shared = decontaminate(problems, benchmarks)
    if shared:
        runs.say(
            f"{len(problems) - len(kept)} of {len(problems)} training problems of {', '.join(sources)} left out: "
            f"they share text or pictures with {', '.join(f'{n} ({c})' for n, c in shared.items())}"
        )
        counts = {"problems": len(problems), "kept": len(kept), "shared_with": shared}
        runs.note_data(folder, " + ".join(sources), counts)
    if not kept:
        raise ValueError(
            f"{', '.join(sources)}: all {len(problems)} problems share text or pictures with "
            f"{', '.join(shared)} (data.decontaminate): these are benchmarks, train on others"
        )
    return kept


def name_of(source: str) -> str:
    """A source's short name: a file's without folder and ending, else the source itself."""
    return epath.Path(source).stem if "/" in source else source
