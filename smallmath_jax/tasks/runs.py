"""A run's workdir: config.json, the lock against a changed config, wall time, messages, the compile cache."""

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import to_json, write_text
from smallmath_jax.tasks.checks import check
from smallmath_jax.tasks.policy import settle_grammar

# Fields that may change between two starts of one run: they decide how it runs, not what is learned. On another mesh or
# engine sums are taken in another order: the same run, but not to the last bit.
FREE_FIELDS = ("log", "checkpoint", "compare", "mesh", "engine", "remat", "watchdog_s")

# What a start leaves behind once it has computed something.
RESULTS = (
    *("sft", "metrics", "checkpoints", "completions", "eval", "done.json"),
    *("trees", "pairs", "bootstrap", "round_0", "made"),
)


@dataclasses.dataclass(frozen=True)
class Run:
    workdir: epath.Path
    started: float
    earlier_seconds: float  # of the starts before this one

    def wall_s(self) -> float:
        """Seconds this run has taken, over all its starts."""
        return self.earlier_seconds + time.time() - self.started


@contextlib.contextmanager
def open_run(config: Any, workdir: str) -> Iterator[Run]:
    """Prepares `workdir` and settles a grammar of "auto"; on a second start checks that the config is the first one's.

    Raises ValueError naming the first field that differs from the first start's or between hosts, and when hosts do
    not share `workdir`.
    """
    check(config)
    settle_grammar(config)
    prepare_process()
    root = epath.Path(workdir)
    resolved = json.loads(to_json(config.to_dict()))
    hosts.same_everywhere({"code revision": _revision(), "workdir": workdir} | flat(resolved))
    check_shared(root)
    earlier = _check_same_config(root, resolved)
    run = Run(root, time.time(), earlier)
    names = hosts.host_names()  # asks all hosts, so not where host 0 alone writes
    if hosts.host_index() == 0:
        _write_config(root, resolved, earlier, names)
    hosts.barrier("open run")
    say(
        f"{config.task}:{config.mode} in {workdir} on {jax.device_count()} {jax.devices()[0].platform} device(s)"
    )
    try:
        yield run
    finally:
        if hosts.host_index() == 0:
            _write_config(root, resolved, run.wall_s(), names)


def prepare_process() -> None:
    """Joins the other hosts, if any, and keeps compiled programs between starts."""
    hosts.initialize()
    _use_compile_cache()


def flat(config: Any, name: str = "config") -> dict[str, Any]:
    """{dotted name: value} of a nested config."""
    if not isinstance(config, dict):
        return {name: config}
    parts = [flat(value, f"{name}.{key}") for key, value in config.items()]
    return {key: value for part in parts for key, value in part.items()}


def check_shared(root: epath.Path) -> None:
    """Raises ValueError on every host when one does not see what host 0 writes into the workdir.

    Each host writes its own parts; what is read back, for a report or on resume, is everyone's.
    """
    if hosts.host_count() == 1 or str(root).startswith("gs://"):
        return
    probe = root / f"probe-{hosts.broadcast(secrets.token_hex(8))}"
    problem = ""
    if hosts.host_index() == 0:
        try:
            write_text(probe, "all hosts of the run must see this file")
        except OSError as error:
            problem = str(error)
    problem = hosts.broadcast(problem)
    seen = hosts.gather(not problem and _appears(probe))
    if hosts.host_index() == 0:
        probe.unlink(missing_ok=True)
    blind = [name for name, sees in zip(hosts.host_names(), seen, strict=True) if not sees]
    if blind:
        why = problem or f"{len(blind)} of {len(seen)} hosts do not see host 0's files there"
        raise ValueError(
            f"workdir {root}: {why} ({', '.join(blind)}); on several hosts give --workdir=gs://BUCKET/RUN or a folder "
            "that all of them share"
        )


def _appears(path: epath.Path, tries: int = 5) -> bool:
    """Whether the file is there, or comes within some seconds: network folders may be late."""
    for _ in range(tries):
        if path.exists():
            return True
        time.sleep(1)
    return False


def _check_same_config(root: epath.Path, resolved: dict[str, Any]) -> float:
    path = root / "config.json"
    if not path.exists() or not any((root / name).exists() for name in RESULTS):
        return 0.0  # nothing has come of an earlier start: its settings bind nobody
    before = json.loads(path.read_text())
    task = before["config"].get("task")
    if task != resolved.get("task"):
        raise ValueError(f"{root}: this workdir holds a run of {task!r}; give a new --workdir")
    difference = first_difference(before["config"], resolved)
    if difference:
        raise ValueError(
            f"{root}: this workdir holds a run with another {difference}; give a new --workdir, "
            "or the same fields to continue it"
        )
    free = {name: (before["config"].get(name), resolved.get(name)) for name in FREE_FIELDS}
    changes = [line for name, pair in free.items() for line in differences(*pair, name)]
    if changes:
        say(f"continued with other {', '.join(changes)}")
    return float(before.get("wall_s", 0.0))


def first_difference(before: Any, now: Any, name: str = "") -> str:
    """The first field in which two configs differ, but for FREE_FIELDS, as "name (was X, now Y)"; "" if none."""
    if not name and isinstance(before, dict) and isinstance(now, dict):
        bound = lambda config: {k: v for k, v in config.items() if k not in FREE_FIELDS}
        before, now = bound(before), bound(now)
    return next(differences(before, now, name), "")


def differences(before: Any, now: Any, name: str = "") -> Iterator[str]:
    """Every field in which two configs differ, as "name (was X, now Y)"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            place = f"{name}.{key}" if name else key
            yield from differences(before.get(key), now.get(key), place)
    elif before != now:
        yield f"{name} (was {before!r}, now {now!r})"


def note_data(folder: epath.Path, told: dict[str, Any]) -> None:
    """Keeps what became of training sources in the config.json of a run, given its folder or that of its SFT stage.

    What is called outside a run (a benchmark's script) has no config.json, and nothing is kept.
    """
    places = (folder / "config.json", folder.parent / "config.json")
    path = next((place for place in places if place.exists()), None)
    if path is not None and hosts.host_index() == 0:
        record = json.loads(path.read_text())
        record["training_data"] = {**record.get("training_data", {}), **told}
        write_text(path, json.dumps(record, indent=1))


def _write_config(
    root: epath.Path, resolved: dict[str, Any], wall_s: float, names: list[str]
) -> None:
    path = root / "config.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    record = {
        "config": resolved,
        "versions": {
            name: _version(name)
            for name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers")
        },
        "python": sys.version.split()[0],
        "revision": _revision(),
        "hosts": names,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "wall_s": round(wall_s, 1),
        "training_data": earlier.get("training_data", {}),
    }
    write_text(path, json.dumps(record, indent=1))


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _revision() -> str:
    """The git revision of the code, "+" behind it when files differ; "unknown" outside a checkout."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        words = ["git", "-C", here, "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _use_compile_cache() -> None:
    """Keeps compiled programs between starts; JAX_COMPILATION_CACHE_DIR moves the cache."""
    if not jax.config.jax_compilation_cache_dir:
        home = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "smallmath_jax", "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def say(message: str) -> None:
    """One line for the person at the terminal, from host 0 only."""
    if hosts.host_index() == 0:
        print(message, flush=True)
