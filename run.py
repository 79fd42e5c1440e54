"""The one command: python run.py --config=configs/TASK.py[:MODE] [--workdir=DIR] [--config.some.field=value].

Run it again with the same words and it continues where it stopped.
"""

import ctypes
import difflib
import glob
import importlib
import importlib.util
import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/TASK.py[:MODE]")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where everything goes; a folder or gs://… (default: workdirs/TASK-MODE)"
)


def check_fields(arguments: list[str]) -> None:
    """Exits with the nearest names when a --config.… flag names no field of the config.

    absl would fail too, but late and with a trace; a typo costs the reader a minute, not a pod.
    """
    words = [word for word in arguments if word.startswith("--config=")]
    fields = [word for word in arguments if word.startswith("--config.")]
    if not words or not fields:
        return
    path, _, mode = words[-1].removeprefix("--config=").partition(":")
    config = _load_config(path, mode or None)
    known = _field_names(config)
    for word in fields:
        name = word.removeprefix("--config.").partition("=")[0]
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hint = (
                f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"
            )
            sys.exit(f"--config.{name}: {path} has no such field; {hint}")


def _load_config(path: str, mode: str | None):
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "configs"
        found = (
            sorted(f for f in os.listdir(folder) if f.endswith(".py") and f != "common.py")
            if os.path.isdir(folder)
            else []
        )
        sys.exit(
            f"--config={path}: no such file; there are {', '.join(found) or 'none'} in {folder}/"
        )
    spec = importlib.util.spec_from_file_location("chosen_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        sys.exit(
            f"--config={path}: no task's config, it has no get_config; see the others beside it"
        )
    try:
        return module.get_config(mode)
    except ValueError as error:
        sys.exit(f"--config={path}:{mode}: {error}")


def _field_names(config, prefix: str = "") -> set[str]:
    names = set()
    for name, value in config.items():
        names.add(prefix + name)
        if hasattr(value, "items"):
            names |= _field_names(value, f"{prefix}{name}.")
    return names


def settle_on_cpu() -> bool:
    """Where no accelerator is in sight: tells jax so; else an installed libtpu looks for chips, and complains."""
    devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd", "dxg")
    if not any(glob.glob(f"/dev/{name}") for name in devices):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    return os.environ.get("JAX_PLATFORMS") == "cpu"


def keep_freed_memory() -> None:
    """On machines without an accelerator: glibc keeps what XLA frees, instead of giving it back at every step.

    XLA's CPU buffers are mapped and faulted in anew each step, a third of a small model's training time. It must be
    said before jax starts its threads. On other C libraries nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    arena_max, mmap_threshold, trim_threshold, top_pad = -8, -3, -1, -2
    for option, value in (
        (arena_max, 1),
        (mmap_threshold, 1 << 30),
        (trim_threshold, (1 << 31) - 1),
        (top_pad, 256 << 20),
    ):
        mallopt(option, value)


def main(arguments: list[str]) -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # that torch is missing is no news
    if len(arguments) > 1:
        sys.exit(f"unexpected words {arguments[1:]}: every setting is --config.field=value")
    logging.set_verbosity(logging.WARNING)  # orbax tells every file it renames
    config = _CONFIG.value
    if config is None:
        sys.exit(
            "say what to run: --config=configs/TASK.py[:MODE], for example configs/grpo.py:tiny"
        )
    workdir = _WORKDIR.value or os.path.join("workdirs", f"{config.task}-{config.mode}")
    if settle_on_cpu():
        keep_freed_memory()
    task = importlib.import_module(f"smallmath_jax.tasks.{config.task}")
    try:
        task.run(config, workdir)
    except (ValueError, OSError, RuntimeError) as error:  # bad input, a full disk: no trace
        # A subclass of RuntimeError is jax's own: its trace is what helps.
        ours = not isinstance(error, RuntimeError) or type(error) is RuntimeError
        if os.environ.get("SMALLMATH_TRACE") or not ours:
            raise
        hint = ""
        if isinstance(error, OSError) and error.errno is not None:
            hint = "\nIs that path right, may you write there, and is there space?"
        sys.exit(f"{config.task}: {error}{hint}\n(SMALLMATH_TRACE=1 shows the trace)")


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    for index, word in enumerate(sys.argv[:-1]):  # "--config FILE" as two words
        if word == "--config":
            sys.argv[index : index + 2] = [f"--config={sys.argv[index + 1]}"]
            break
    path_words = [word for word in sys.argv if word.startswith("--config=")]
    if path_words:
        path, _, mode = path_words[-1].removeprefix("--config=").partition(":")
        _load_config(path, mode or None)
    check_fields(sys.argv[1:])
    app.run(main)
