"""Reward models beside a round's own: trained on the same trees, they only score the same held-out trajectories.

    round_K/LOSS/         a rival's training: checkpoints, metrics, result.json, done.json
    round_K/LOSS/scores/  its scores of round_K/evaluate/completions, and done.json with what they amount to

So the report can set each policy against the ways its answers are chosen: pass@1, by an outcome reward model, by the
preference model (rStar-Math, section 9.2, table 8 and figure 5).
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, Prompt, read_parts, write_part
from smallmath_jax.rollout.engine import Engine
from smallmath_jax.search.vote import Scale, scale_of
from smallmath_jax.tasks import ballots, evolve_measures, runs
from smallmath_jax.tasks.chains import SAMPLED
from smallmath_jax.tasks.driver import WORST, squashed
from smallmath_jax.tasks.evolve_stages import Bench, manifest, write_manifest
from smallmath_jax.tasks.policy import Policy, prompts_for, with_pixels
from smallmath_jax.tasks.ppm import EXAMPLES
from smallmath_jax.tasks.rollouts import engine_weights
from smallmath_jax.tasks.search import make_judge

TOGETHER = 16  # problems whose trajectories are scored in one call


def check(config: Any) -> None:
    """Raises ValueError for a loss that is not known, or is the round's own."""
    for loss in config.evolve.also_train:
        if loss not in EXAMPLES or loss == config.ppm.loss:
            known = ", ".join(one for one in EXAMPLES if one != config.ppm.loss)
            raise ValueError(
                f"evolve.also_train={config.evolve.also_train}: {loss!r} is no loss beside ppm.loss="
                f"{config.ppm.loss!r}; known are {known}"
            )


def losses_of(config: Any, number: int) -> tuple[str, ...]:
    """The losses of the rivals that a round has."""
    return tuple(config.evolve.also_train) if number >= config.evolve.also_from else ()


def rival_config(bench: Bench, number: int, loss: str) -> Any:
    """The config for training with another loss: the same optimiser, and as many tokens as the round's own model read.

    Answered trajectories are many more than preference pairs: a whole pass over them would cost several times as much.
    """
    changed = bench.config.copy_and_resolve_references()
    own = json.loads((bench.round_folder(number) / "ppm" / "result.json").read_text())
    changed.ppm.update({"loss": loss, "tokens": own["tokens"]})
    return changed


def scores_folder(bench: Bench, number: int, loss: str) -> epath.Path:
    return bench.round_folder(number) / loss / "scores"


def scored(bench: Bench, number: int, loss: str) -> dict[str, Any] | None:
    """What a rival's scores amount to; None while they are not there."""
    return manifest(scores_folder(bench, number, loss))


def score_stage(bench: Bench, number: int, loss: str, model: Policy) -> dict[str, Any]:
    """Scores the first `eval.samples` held-out trajectories of each problem. A stage cut short starts again."""
    if found := scored(bench, number, loss):
        return found
    started, config = time.time(), bench.config
    evaluated, folder = bench.round_folder(number) / "evaluate", scores_folder(bench, number, loss)
    rows = [row for row in read_parts(evaluated / "completions") if _counts(row, config)]
    kept, prompts, _ = prompts_for(bench.tests, model, config)
    mine = hosts.share(list(zip(kept, prompts, strict=True)))
    engine = rival_engine(bench, model, number)
    found = []
    for part in _score_all(engine, mine, rows, model, scale_of(loss).squash):
        found += part
        if bench.stop.requested:
            runs.say(f"round {number} {loss}: stopped; the same command scores again")
            sys.exit(bench.stop.exit_code)
    write_part(folder, f"00000-host{hosts.host_index()}.jsonl", found)
    hosts.barrier(f"scores {folder}")
    record = measures(rows, list(read_parts(folder)), config.eval.samples, scale_of(loss))
    runs.say(
        f"round {number}: of {config.eval.samples} samples, best by {loss.upper()} {record['best']['accuracy']:.1%}, "
        f"{loss.upper()}-weighted vote {record['weighted']['accuracy']:.1%}"
    )
    return write_manifest(folder, record, started)


def _counts(row: Mapping[str, Any], config: Any) -> bool:
    return row["extra"]["decoding"] == SAMPLED and row["sample"] < config.eval.samples


def rival_engine(bench: Bench, model: Policy, number: int) -> Engine:
    """The engine that the round's preference model was scored with, now with the rival's weights."""
    config = bench.config
    if bench.scorer is None:  # a start after the evaluation was finished
        bench.scorer = make_judge(model, config, bench.scale())
    else:
        bench.scorer.engine.set_weights(engine_weights(model.model, config), number)
    return bench.scorer.engine


def _score_all(
    engine: Engine,
    pairs: Sequence[tuple[Problem, Prompt]],
    rows: Sequence[Mapping[str, Any]],
    model: Policy,
    squash: float,
) -> Iterator[list[dict[str, Any]]]:
    """{"problem_id", "sample", "score"} of every answered trajectory, some problems at a time."""
    by_problem: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["answer"] is not None:
            by_problem.setdefault(row["problem_id"], []).append(row)
    for start in range(0, len(pairs), TOGETHER):
        roots, places = [], []
        for problem, prompt in pairs[start : start + TOGETHER]:
            found = by_problem.get(problem.id, ())
            roots.append(engine.root(with_pixels(prompt, problem, model)))
            for row in found:
                length = len(prompt.token_ids) + len(row["token_ids"])
                fits = length <= engine.cache_length
                node = engine.append(roots[-1], row["token_ids"]) if fits else None
                places.append((row, node))
        values = iter(engine.scores([node for _, node in places if node is not None]))
        yield [
            {
                "problem_id": row["problem_id"],
                "sample": row["sample"],
                "score": WORST if node is None else squashed(next(values), squash),
            }
            for row, node in places
        ]
        for root in roots:
            engine.prune(root)


def measures(
    rows: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    samples: int,
    scale: Scale,
) -> dict[str, Any]:
    """Best-of-N and the weighted vote by these scores, and how well they rank a problem's own samples."""
    given = {(one["problem_id"], one["sample"]): one["score"] for one in scores}
    again = [
        {**row, "extra": row["extra"] | {"score": given.get((row["problem_id"], row["sample"]))}}
        for row in rows
    ]
    found = evolve_measures.chain_measures(again, samples, scale)
    at_n = found["at_n"]
    return {
        "best": at_n[ballots.BEST],
        "weighted": at_n[ballots.WEIGHTED],
        "auc": found["auc"],
        "scored": len(given),
    }


def row(bench: Bench, number: int) -> dict[str, Any]:
    """The rivals' columns of the report's table of policies and reward models."""
    columns: dict[str, Any] = {}
    for loss in losses_of(bench.config, number) if number else ():
        if found := scored(bench, number, loss):
            columns[f"+ {loss.upper()}"] = found["best"]
            columns[f"+ {loss.upper()}-weighted vote"] = found["weighted"]
    return columns
