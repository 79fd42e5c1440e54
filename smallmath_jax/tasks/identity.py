"""Which policy, asked what and how, made the completions of an evaluation folder.

A workdir names a policy only by its place, and what lies there changes: a run that is still training, a folder exported
anew. So the weights themselves are named, by a digest of what the engine samples from.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Prompt, to_json, write_text
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.policy import newest_checkpoints

NAME = "policy.json"
PARTS = ("completions", "trees")
SETTINGS = ("greedy", "samples", "sampling", "lenient")


def identity_of(
    engine: Engine,
    problems: Sequence[Problem],
    prompts: Sequence[Prompt],
    config: Any,
    source: str,
    **more: Any,
) -> dict[str, Any]:
    """All that decides an evaluation's answers, as plain JSON: two of them are the same or must not be mixed.

    `more`: further settings that do, as plain JSON.
    """
    digest = hashlib.sha256()
    for problem, prompt in zip(problems, prompts, strict=True):
        digest.update(to_json([problem.id, prompt.text, problem.accepted]).encode())
    settings = {name: config.eval[name] for name in SETTINGS}
    settings |= {"seed": config.seed, "compute_dtype": config.compute_dtype}
    settings["sampling"] = settings["sampling"].to_dict()
    settings |= more
    return {
        "weights": engine.weights_digest(),
        "settings": settings,
        "prompts": {"count": len(prompts), "digest": digest.hexdigest()[:32]},
        "source": source,
    }


def source_of(config: Any) -> str:
    """Where a config's policy comes from, for people: model, or run with its checkpoints folder and newest step."""
    if not config.init_from:
        return config.model
    folder = newest_checkpoints(config.init_from)
    steps = [int(child.name) for child in folder.iterdir() if child.name.isdigit()]
    return f"{folder}, step {max(steps)}"


def keep_or_drop(folder: epath.Path, identity: dict[str, Any]) -> None:
    """Before the first new part: what another policy left in `folder` is dropped, and the folder is this one's.

    All hosts call it; host 0 acts.
    """
    hosts.barrier(f"identity of {folder.name}")
    if hosts.host_index() == 0:
        path = folder / NAME
        before = json.loads(path.read_text()) if path.exists() else {}
        identity = json.loads(to_json(identity))
        parts = [part for name in PARTS for part in sorted((folder / name).glob("*.jsonl"))]
        if parts and _what(before) != _what(identity):
            runs.say(f"{folder}: {_told(before, identity)}; the {len(parts)} old parts are dropped")
            indexes = [part.parent / "index" / part.name for part in parts]
            for stale in (folder / "result.json", *parts, *indexes):
                stale.unlink(missing_ok=True)
        if before != identity:
            write_text(path, json.dumps(identity, indent=1))
    hosts.barrier(f"identity of {folder.name} kept")


def keep_or_refuse(folder: epath.Path, named: dict[str, Any]) -> None:
    """Before more trees to learn from: raises ValueError where those in `folder` were drawn by other weights.

    All hosts call it.
    """
    path = folder / NAME
    before = hosts.broadcast(
        json.loads(path.read_text()) if hosts.host_index() == 0 and path.exists() else None
    )
    if before is not None and _what(before) != _what(named):
        raise ValueError(
            f"{folder}: its trees were drawn by other weights (policy from {before['source']}); what config.init_from, "
            "config.model or config.judge names has changed since. Give a new --workdir; with another --config.seed "
            "the trees of both can be learnt from together (config.trees)"
        )
    if hosts.host_index() == 0:
        write_text(path, json.dumps(named, indent=1))


def _what(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity without `source`: the same weights may have been copied elsewhere."""
    return {name: value for name, value in identity.items() if name != "source"}


def _told(before: dict[str, Any], now: dict[str, Any]) -> str:
    if not before:
        return f"nothing says which policy made its completions; now it is {now['source']}"
    if before["weights"] != now["weights"]:
        return f"made by another policy (was {before['source']}, now {now['source']})"
    return f"made under other {runs.first_difference(_what(before), _what(now))}"
