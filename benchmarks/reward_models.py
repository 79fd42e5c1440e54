"""PPM, PQM and ORM on one set of trees: `python benchmarks/reward_models.py EVOLVE OUT`.

EVOLVE is the finished workdir of a run of configs/evolve.py:tiny. Its last policy, the trees of all its rounds and
what that policy sampled on the held-out problems stay fixed. For each seed and loss a reward model is trained from the
policy on an equal number of tokens, scores the same samples, and guides searches of the same problems. Prints a table:
seeds pooled, so the intervals (Wilson 95 %, of the problems of one seed) say how far the problem set can be trusted,
and the range says how far the seeds differ. Done parts are kept in OUT; the same command continues.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import run as command  # noqa: E402

command.settle_on_cpu()
command.keep_freed_memory()

from etils import epath  # noqa: E402

from configs import evolve as evolve_config  # noqa: E402
from smallmath_jax.records import Problem, read_parts, to_json  # noqa: E402
from smallmath_jax.report.metrics import wilson  # noqa: E402
from smallmath_jax.search import select  # noqa: E402
from smallmath_jax.search.pairs import PairSettings  # noqa: E402
from smallmath_jax.search.tree import tree_from_json  # noqa: E402
from smallmath_jax.search.vote import scale_of  # noqa: E402
from smallmath_jax.tasks import (  # noqa: E402
    ballots,
    evaluate,
    evolve,
    evolve_measures,
    ppm,
    runs,
    searched,
)
from smallmath_jax.tasks.driver import Driver, Host, Judge, open_host  # noqa: E402
from smallmath_jax.tasks.policy import (  # noqa: E402
    Policy,
    copied,
    load_policy,
    make_mesh,
    prompts_for,
    with_pixels,
)
from smallmath_jax.tasks.recheck import recheck  # noqa: E402
from smallmath_jax.tasks.rollouts import make_engine  # noqa: E402
from smallmath_jax.tasks.search import drawing, make_judge, search_settings  # noqa: E402
from smallmath_jax.train.loop import StopSignal  # noqa: E402

LOSSES = ("ppm", "pqm", "orm")
TOGETHER = 16  # problems whose samples are scored in one go
SAMPLES = 8  # of which the best is taken


@dataclasses.dataclass(frozen=True)
class Ground:
    """What all reward models share."""

    config: Any
    mesh: Any
    host: Host
    stop: StopSignal
    policy: Policy
    pool: dict[str, Problem]  # that the rounds searched
    trees: list
    rows: list[dict[str, Any]]  # samples of the policy
    tests: list[Problem]
    searched: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evolve", type=epath.Path)
    parser.add_argument("out", type=epath.Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="of each training")
    parser.add_argument("--searched", type=int, default=150, help="problems searched with each")
    asked = parser.parse_args()
    config = evolve_config.get_config("tiny")
    config.seed = json.loads((asked.evolve / "config.json").read_text())["config"]["seed"]
    config.model = str(asked.evolve / "export")
    config.ppm.update({"tokens": asked.tokens, "epochs": 1000, "eval_every": 0})
    runs.prepare_process()
    with open_host(config.sandbox.to_dict()) as host, StopSignal() as stop:
        mesh = make_mesh(config)
        pool = {one.id: one for one in evolve.load_pool(config, asked.out)}
        ground = Ground(
            config,
            mesh,
            host,
            stop,
            load_policy(config, mesh),
            pool,
            checked_trees(asked.evolve, pool, config, host),
            list(read_parts(asked.evolve / f"round_{config.evolve.rounds}/evaluate/completions")),
            evaluate.load_evaluation_problems(config),
            asked.searched,
        )
        found: dict[str, list[dict[str, Any]]] = {loss: [] for loss in LOSSES}
        for seed in map(int, asked.seeds.split(",")):
            for loss in LOSSES:
                found[loss].append(one_model(ground, loss, seed, asked.out / f"{loss}-{seed}"))
    (asked.out / "table.json").write_text(to_json(found))
    print(table(found))


def checked_trees(run: epath.Path, pool: dict[str, Problem], config: Any, host: Host) -> list:
    """The trees of all rounds, the last of each problem and seed; answers right by luck alone relabelled as wrong."""
    trees = {}
    for number in range(1, config.evolve.rounds + 1):
        for folder in ("trees", *(f"more_{total}" for total in config.evolve.more)):
            for row in read_parts(run / f"round_{number}" / "search" / folder):
                trees[number, row["problem_id"], row["seed"]] = tree_from_json(row)
    return recheck(list(trees.values()), pool, host, config.evolve.instances)[0]


def one_model(ground: Ground, loss: str, seed: int, folder: epath.Path) -> dict[str, Any]:
    """Trains, scores and searches; the numbers of a row."""
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    config = ground.config.copy_and_resolve_references()
    config.seed, config.ppm.loss = seed, loss
    judge = make_judge(trained(ground, config, folder / "model"), config, scale_of(loss))
    rows = scored(ground, judge)
    cases = [ballots.first(case, SAMPLES) for case in evolve_measures.sample_cases(rows)]
    names = (ballots.BEST, ballots.WEIGHTED, ballots.MAJORITY, ballots.LIKELY, ballots.COVERAGE)
    shares = ballots.shares(cases, ballots.measures(names, judge.scale))
    policy = ground.policy
    driver = Driver(
        policy, make_engine(policy, config), ground.host, judge=judge, **drawing(config)
    )
    groups = searched.searched_groups(
        driver,
        ground.tests[: ground.searched],
        search_settings(config.eval.search, seed=0, round=config.evolve.rounds),
        folder / "trees",
        config,
        stop=ground.stop,
        title=f"{loss} {seed} search",
    )
    result = json.loads((folder / "model" / "result.json").read_text())
    row = {"loss": loss, "seed": seed, "pair_accuracy": result["held_out_accuracy"]}
    row |= {"tokens": result["tokens"], "terms": result["trained_on"], "samples": shares}
    row |= {"auc": evolve_measures.within_auc(cases)["auc"]}
    row |= {
        "auc_log_prob": evolve_measures.within_auc(cases, lambda one: one.ballot.log_prob)["auc"]
    }
    row |= {"search": evolve_measures.search_measures(groups, judge.scale)}
    (folder / "row.json").write_text(to_json(row))
    return row


def trained(ground: Ground, config: Any, folder: epath.Path) -> Policy:
    """The reward model of config.ppm.loss, from the policy, on the fixed trees."""
    medium = [tree for tree in ground.trees if select.difficulty([tree]) == "medium"]
    settings = PairSettings(**config.pairs.to_dict())
    pairs, _ = ppm.pairs_of(medium, settings, {})
    examples = ppm.examples_of(ground.trees, config.ppm.loss)
    return ppm.train_judge(
        copied(ground.policy),
        list(ground.pool.values()),
        pairs,
        examples,
        config,
        folder,
        ground.mesh,
        ground.stop,
        title=f"{config.ppm.loss} {config.seed}",
    )


def scored(ground: Ground, judge: Judge) -> list[dict[str, Any]]:
    """The samples with this judge's scores."""
    kept, prompts, _ = prompts_for(ground.tests, ground.policy, ground.config)
    by_problem: dict[str, list[dict[str, Any]]] = {}
    for row in ground.rows:
        by_problem.setdefault(row["problem_id"], []).append(row)
    pairs = [pair for pair in zip(kept, prompts, strict=True) if pair[0].id in by_problem]
    found = []
    for first in range(0, len(pairs), TOGETHER):
        roots, places = [], []
        for problem, prompt in pairs[first : first + TOGETHER]:
            roots.append(judge.engine.root(with_pixels(prompt, problem, ground.policy)))
            for row in by_problem[problem.id]:
                if row["answer"] is not None:
                    places.append((row, judge.engine.append(roots[-1], row["token_ids"])))
                else:
                    found.append(row)
        values = judge.engine.scores([node for _, node in places])
        for (row, _), value in zip(places, values, strict=True):
            score = math.tanh(value / judge.scale.squash)
            found.append(row | {"extra": row["extra"] | {"score": score}})
        for root in roots:
            judge.engine.prune(root)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """The rows of all models in Markdown, what needs no reward model below them."""
    lines = [
        "| reward model | terms | held-out pairs | AUC | best of 8 | weighted vote of 8 | search: vote | "
        "search: highest score |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss, rows in found.items():
        cells = [
            pooled([row["samples"][name] for row in rows])
            for name in (ballots.BEST, ballots.WEIGHTED)
        ]
        cells += [
            pooled([row["search"][name] for row in rows])
            for name in ("search_accuracy", "search_choice")
        ]
        means = [mean_of([row[name] for row in rows]) for name in ("pair_accuracy", "auc")]
        lines.append(
            f"| {loss.upper()} | {rows[0]['terms']:,} | " + " | ".join(means + cells) + " |"
        )
    one = next(iter(found.values()))[0]
    for name in (ballots.MAJORITY, ballots.LIKELY, ballots.COVERAGE):
        share = one["samples"][name]
        lines.append(f"| none: {name} of 8 | | | | {interval(share)} | | | |")
    return "\n".join(lines)


def pooled(shares: list[dict[str, Any]]) -> str:
    """Mean of the seeds, its interval as of one seed's problems, and the seeds' range."""
    mean, count = statistics.fmean(one["accuracy"] for one in shares), shares[0]["n"]
    low, high = min(one["accuracy"] for one in shares), max(one["accuracy"] for one in shares)
    return f"{interval({'accuracy': mean, 'ci': wilson(mean * count, count)})} ({low:.1%} to {high:.1%})"


def interval(share: dict[str, Any]) -> str:
    return f"{share['accuracy']:.1%} [{share['ci'][0]:.1%}, {share['ci'][1]:.1%}]"


def mean_of(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


if __name__ == "__main__":
    main()
