"""Self-evolution (rStar-Math, section 3.4): four rounds of search, selection, fine-tuning and preference modelling.

    WORKDIR/bootstrap/                                  the first policy, where it is fine-tuned here
    WORKDIR/round_0/evaluate/                           what it can do
    WORKDIR/round_K/{search,select,sft,ppm,evaluate}/   round K; each folder has a done.json when it is finished
    WORKDIR/round_K/{orm,pqm}/                          its preference model's rivals, where they are asked for
    WORKDIR/evolution.json, report/                     what the report shows of the rounds

One command runs it all or continues it. Round K searches with the policy and preference model of round K - 1, trains
both anew on what it found, and measures them.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from smallmath_jax.data.batches import make_sequence
from smallmath_jax.data.few_shot import EXAMPLES
from smallmath_jax.data.tiny import is_embedded, tiny_problems
from smallmath_jax.data.tiny_noise import noisy_solution
from smallmath_jax.data.tokens import completion_ids
from smallmath_jax.models import folders
from smallmath_jax.parallel import hosts
from smallmath_jax.records import Problem, draw_key, read_parts, to_json, write_text
from smallmath_jax.report import evolution, pages
from smallmath_jax.tasks import (
    ballots,
    checks,
    evaluate,
    evolve_rivals,
    evolve_trees,
    export,
    ppm,
    runs,
    sft,
    stages,
)
from smallmath_jax.tasks.driver import open_host
from smallmath_jax.tasks.evolve_evaluate import evaluate_stage
from smallmath_jax.tasks.evolve_stages import (
    SAMPLERS,
    Bench,
    labelled_trees,
    lessons_of,
    manifest,
    round_settings,
    search_stage,
    select_stage,
)
from smallmath_jax.tasks.policy import (
    Policy,
    copied,
    load_policy,
    make_mesh,
    prompts_for,
    restore_model,
)
from smallmath_jax.tasks.server import settings_of
from smallmath_jax.tasks.sources import training_problems
from smallmath_jax.train.loop import StopSignal


def run(config: Any, workdir: str) -> None:
    """All rounds, or those that are left."""
    check(config)
    with (
        open_host(config.sandbox.to_dict()) as host,
        runs.open_run(config, workdir) as this_run,
        StopSignal() as stop,
    ):
        mesh = make_mesh(config)
        tests = evaluate.load_evaluation_problems(config)
        pool = load_pool(config, this_run.workdir)
        bench = Bench(config, this_run.workdir, mesh, host, stop, tests)
        base = bootstrap(bench, load_policy(config, mesh))
        policy, judge = base, None
        tell(bench, 0, evaluate_stage(bench, 0, policy, None, final=False))
        for number in range(1, config.evolve.rounds + 1):
            policy, judge = one_round(bench, number, base, policy, judge, pool)
            if hosts.host_index() == 0:
                write_evolution(bench, number)
                pages.write_report(this_run.workdir, wall_s=this_run.wall_s())
        if config.export:
            export.export_policy(policy, this_run.workdir / "export")
            if judge is not None:
                export.export_policy(judge, this_run.workdir / "export_ppm")
        runs.say(f"done in {this_run.wall_s():.0f} s; report: {workdir}/report/index.html")


def check(config: Any) -> None:
    """Raises ValueError for rounds that are not all described or not as they must be, before anything is loaded."""
    checks.check(config)
    evolve = config.evolve
    for name in ("rollouts", "candidates", "guidance", "max_errors"):
        if len(getattr(evolve, name)) < evolve.rounds:
            raise ValueError(
                f"evolve.{name} has {len(getattr(evolve, name))} entries for {evolve.rounds} rounds; give one a round"
            )
    if evolve.guidance[0] == "ppm":
        raise ValueError("evolve.guidance: the first round has no preference model, use 'terminal'")
    if evolve.sampler not in SAMPLERS:
        raise ValueError(f"evolve.sampler={evolve.sampler!r}: known are {', '.join(SAMPLERS)}")
    if evolve.sampler == "chains" and evolve.selection == "step_verified":
        raise ValueError(
            "evolve.selection='step_verified' reads the Q-values of a search, and evolve.sampler='chains' draws "
            "without one; choose 'rejection' or 'random'"
        )
    for number in range(1, evolve.rounds + 1):
        try:
            round_settings(config, number)
        except ValueError as error:
            raise ValueError(f"config.evolve, round {number}: {error}") from error
    if config.bootstrap.base_url:
        settings_of(config.bootstrap)
    elif config.bootstrap.model not in ("", "tiny"):
        folders.locate(config.bootstrap.model)
    evolve_rivals.check(config)
    if not 0 <= config.bootstrap.shots <= len(EXAMPLES):
        raise ValueError(f"bootstrap.shots={config.bootstrap.shots}: from 0 to {len(EXAMPLES)}")
    if evolve.start not in ("previous", "base"):
        raise ValueError(f"evolve.start={evolve.start!r}: known are 'previous', 'base'")


def load_pool(config: Any, folder: Any) -> list[Problem]:
    """The problems the rounds search; embedded ones without those that the bootstrap policy may learn from."""
    limit, embedded = config.limit, all(name.startswith("tiny:") for name in config.problems)
    if config.bootstrap.solutions and embedded:
        limit = limit or 4 * config.evolve.rounds * (config.evolve.per_round or 500)
    pool = training_problems(config.problems, limit, config, folder)
    kept = [one for one in pool if not (config.bootstrap.solutions and is_bootstraps(one))]
    return list({one.id: one for one in kept}.values())


def bootstrap_problems(config: Any) -> list[Problem]:
    settings = config.bootstrap
    count, seed = settings.solutions, settings.problems_seed + config.seed
    return [one for one in tiny_problems("train", 3 * count, seed) if is_bootstraps(one)][:count]


def is_bootstraps(problem: Problem) -> bool:
    """Which half of the embedded problems is the bootstrap's; the other half, and all others, are the rounds'.

    Small templates have a few dozen problems: a bootstrap that drew from all of them left none for the rounds, which
    then forgot how to solve them.
    """
    return is_embedded(problem) and bool(draw_key("bootstrap half", problem.id)[0] % 2)


def bootstrap(bench: Bench, base: Policy) -> Policy:
    """The first round's policy: `base` itself, or, for a tiny one, fine-tuned on noisy solutions."""
    config, folder = bench.config, bench.root / "bootstrap"
    settings = config.bootstrap
    if not settings.solutions:
        return base
    if stages.is_done(folder):
        model = restore_model(folder / "checkpoints", base.model, bench.mesh)
        return dataclasses.replace(base, model=model)
    kept, prompts, _ = prompts_for(bootstrap_problems(config), base, config)
    taught, wrong = [], 0
    for problem, prompt in zip(kept, prompts, strict=True):
        text, spoilt = noisy_solution(problem, settings.noise, config.seed)
        taught.append((problem, make_sequence(prompt, completion_ids(text, base.tokens))))
        wrong += spoilt
    runs.say(
        f"bootstrap: {len(taught)} solutions, {wrong} of them wrong ({wrong / len(taught):.0%}); "
        "the rounds see none of them"
    )
    lessons = sft.pack_lessons(taught, base, settings)
    return sft.learn(
        base, [lessons], settings, config, folder, bench.mesh, bench.stop, title="bootstrap"
    )


def one_round(
    bench: Bench,
    number: int,
    base: Policy,
    policy: Policy,
    judge: Policy | None,
    pool: Sequence[Problem],
) -> tuple[Policy, Policy]:
    """The policy and preference model of a round, given those of the round before."""
    config = bench.config
    problems = round_problems(bench, number, pool)
    search_stage(bench, number, policy, judge, problems)
    found = select_stage(bench, number, problems)
    runs.say(
        f"round {number}: solved {len(found['solved_ids'])} of {found['problems']}, {found['lucky']} of "
        f"{found['right_answers']} right answers by luck, {found['sft_examples']} trajectories, "
        f"{found['pairs_kept']} pairs"
    )
    policy = fine_tune(bench, number, base if config.evolve.start == "base" else policy, pool)
    judge = train_judge(bench, number, policy, pool)
    final = number == config.evolve.rounds
    tell(bench, number, evaluate_stage(bench, number, policy, judge, final))
    train_rivals(bench, number, policy, pool)
    return policy, judge


def round_problems(bench: Bench, number: int, pool: Sequence[Problem]) -> list[Problem]:
    """All of the pool, or `per_round` of it: up to a share that earlier rounds left unsolved, the rest new."""
    size = bench.config.evolve.per_round
    if not size:
        return list(pool)
    before = [manifest(bench.round_folder(k) / "select") for k in range(1, number)]
    asked = {name for found in before for name in found["asked_ids"]}
    solved = {name for found in before for name in found["solved_ids"]}
    old = [problem for problem in pool if problem.id in asked - solved]
    room = int(size * bench.config.evolve.old_share)
    old = old[-room:] if room else []
    new = [problem for problem in pool if problem.id not in asked]
    return old + new[: size - len(old)]


def fine_tune(bench: Bench, number: int, start: Policy, pool: Sequence[Problem]) -> Policy:
    """`start` after fine-tuning on every round's trajectories so far; of a problem those of its last solved search."""
    config, folder = bench.config, bench.round_folder(number) / "sft"
    if stages.is_done(folder):
        model = restore_model(folder / "checkpoints", start.model, bench.mesh)
        return dataclasses.replace(start, model=model)
    rows: dict[str, list[dict[str, Any]]] = {}
    for k in range(1, number + 1):
        fresh: dict[str, list[dict[str, Any]]] = {}
        for row in read_parts(bench.round_folder(k) / "select" / "sft"):
            fresh.setdefault(row["problem_id"], []).append(row)
        rows |= fresh
    problems = {problem.id: problem for problem in pool}
    flat = [row for found in rows.values() for row in found]
    taught = lessons_of(flat, problems, start, config)
    if not taught:
        raise ValueError(
            f"round {number}: no problem was solved, so there is nothing to fine-tune on; "
            "search more problems (evolve.per_round) or start from a better policy"
        )
    lessons = sft.pack_lessons(taught, start, config.sft)
    sft.announce(lessons, {})
    title = f"round {number} sft"
    if config.evolve.start == "base":
        start = copied(start)  # the next round starts there again
    return sft.learn(
        start, [lessons], config.sft, config, folder, bench.mesh, bench.stop, title=title
    )


def train_judge(
    bench: Bench, number: int, policy: Policy, pool: Sequence[Problem], name: str = "ppm"
) -> Policy:
    """The preference model of a round: the round's policy with a value head, on the pairs of the last rounds.

    `name`: of its folder.
    """
    config, folder = bench.config, bench.round_folder(number) / name
    first = max(1, number + 1 - config.evolve.pair_rounds) if config.evolve.pair_rounds else 1
    rounds = [bench.round_folder(k) for k in range(first, number + 1)]
    pairs, examples = [], []
    if not stages.is_done(folder):
        pairs = [pair for one in rounds for pair in ppm.read_pairs(one / "select" / "pairs")]
        if config.ppm.loss != "ppm":
            trees = (tree for one in rounds for tree in labelled_trees(bench, one, pool))
            examples = ppm.examples_of(trees, config.ppm.loss)
    needed = {pair.problem_id for pair in pairs} | {one.problem_id for one in examples}
    problems = [problem for problem in pool if problem.id in needed]
    title = f"round {number} {config.ppm.loss}"
    return ppm.train_judge(  # a copy: the policy is measured with its judge
        copied(policy),
        problems,
        pairs,
        examples,
        config,
        folder,
        bench.mesh,
        bench.stop,
        title=title,
    )


def train_rivals(bench: Bench, number: int, policy: Policy, pool: Sequence[Problem]) -> None:
    """The reward models beside a round's own (`config.evolve.also_train`), and their scores of its evaluation."""
    for loss in evolve_rivals.losses_of(bench.config, number):
        if evolve_rivals.scored(bench, number, loss) is None:
            changed = evolve_rivals.rival_config(bench, number, loss)
            other = dataclasses.replace(bench, config=changed)
            model = train_judge(other, number, policy, pool, name=loss)
            evolve_rivals.score_stage(bench, number, loss, model)


# ---- what is told


def tell(bench: Bench, number: int, found: dict[str, Any]) -> None:
    """One line about an evaluation."""
    at_n = {name: f"{one['accuracy']:.1%}" for name, one in found["at_n"].items()}
    name = "bootstrap" if number == 0 else f"round {number}"
    searched = found.get("search_accuracy")
    runs.say(
        f"{name}: pass@1 {found['sampled']['accuracy']:.1%} sampled, {found['greedy']['accuracy']:.1%} greedy, of "
        f"{found['greedy']['n']}; of {bench.config.eval.samples} samples: {at_n}, coverage "
        f"{found['coverage']['accuracy']:.1%}"
        + (f"; search {searched['accuracy']:.1%} of {searched['n']}" if searched else "")
    )


def write_evolution(bench: Bench, last: int) -> None:
    """WORKDIR/evolution.json of the rounds so far, in the form that report.evolution states; tree pages of the last."""
    root = bench.root
    rows = [round_row(bench, number) for number in range(last + 1)]
    fields = dict.fromkeys(name for row in reversed(rows) for name in row)
    record: dict[str, Any] = {
        "rounds": [{name: row.get(name) for name in fields} for row in rows]  # null: has none
    }
    found = manifest(bench.round_folder(last) / "evaluate")
    record |= {name: found[name] for name in ("scaling", "stopping") if name in found}
    record["reward_models"] = {
        ("base" if number == 0 else f"round {number}"): reward_row(bench, number)
        for number in range(last + 1)
    }
    record |= evolve_trees.tell_trees(bench, last)
    write_text(root / "evolution.json", json.dumps(json.loads(to_json(record)), indent=1))


def round_row(bench: Bench, number: int) -> dict[str, Any]:
    """A round as a column of the report's table."""
    config, folder = bench.config, bench.round_folder(number)
    found = manifest(folder / "evaluate")
    count = config.eval.samples
    row: dict[str, Any] = {"round": number}
    row |= evolution.round_fields("accuracy", found[config.eval.headline])
    row |= {"greedy": found["greedy"]["accuracy"], "sampled": found["sampled"]["accuracy"]}
    row |= {f"{name} ({count})": one["accuracy"] for name, one in found["at_n"].items()}
    row[f"coverage ({count})"] = found["coverage"]["accuracy"]
    row |= {"by_level": found["by_level"], "by_subject": found["by_subject"]}
    row |= by_set(found["by_set"], config.eval.headline)
    row |= evolution.round_fields("search_accuracy", found.get("search_accuracy"))
    row |= evolution.round_fields("solved", None) | {"coverage_by_level": None}
    if number == 0:
        return row
    for name in ("search_choice", "search_majority", "search_coverage"):
        if name in found:
            row[name] = found[name]["accuracy"]
    row["tokens_a_search"] = found.get("search_tokens")
    chosen, searched = manifest(folder / "select"), manifest(folder / "search")
    row |= coverage_so_far(bench, number)
    row["rollouts"] = config.evolve.rollouts[number - 1]
    row["candidates"] = config.evolve.candidates[number - 1]
    row["guidance"] = config.evolve.guidance[number - 1]
    for name in (
        "easy",
        "medium",
        "hard",
        "sft_examples",
        "pairs_kept",
        "right_answers",
        "lucky",
        "tokens",
    ):
        row[name] = chosen[name]
    judged = folder / "ppm" / "result.json"
    if judged.exists():
        row["held_out_pair_accuracy"] = json.loads(judged.read_text())["held_out_accuracy"]
    if found.get("auc"):
        row["ppm_auc"], row["log_prob_auc"] = found["auc"]["auc"], found["auc_log_prob"]["auc"]
    extra = ("unsolved_first", "tried_twice", "tried_more", "failed")
    extra += ("occupancy", "tokens_per_second")
    row |= {
        name: searched[name] for name in searched if name in extra or name.startswith("solved_by_")
    }
    row["search_s"], row["evaluate_s"] = searched["wall_s"], found["wall_s"]
    return row


def by_set(sets: dict[str, dict[str, Any]], headline: str) -> dict[str, Any]:
    """A round's fields by problem set: pass@1, search accuracy, tokens of a trajectory and of a search."""
    read = lambda name: {label: found[name] for label, found in sets.items() if name in found}
    return {
        "by_set": read(headline),
        "search_by_set": read("search_accuracy") or None,
        "tokens_by_set": read("tokens"),
        "search_tokens_by_set": read("search_tokens") or None,
    }


def coverage_so_far(bench: Bench, number: int) -> dict[str, Any]:
    """Training problems with a right trajectory in any round so far: their share, and by level or set."""
    solved, levels = set(), {}
    for k in range(1, number + 1):
        solved |= set(manifest(bench.round_folder(k) / "select")["solved_ids"])
        levels |= {
            entry.problem_id: entry.group for entry in evolve_trees.trees_of(bench, "search", k)
        }
    if gone := solved - set(levels):
        raise ValueError(
            f"{bench.root}: the trees of {len(gone)} solved problems are not there any more; delete the "
            "search/done.json of the round_… that lost them, then the same command searches again what is missing"
        )
    if not all(level.isdigit() for level in levels.values()):  # beside names of sets
        levels = {k: f"level {one}" if one.isdigit() else one for k, one in levels.items()}
    asked, right = Counter(levels.values()), Counter(levels[name] for name in solved)
    by_level = {level: ballots.share(right[level], asked[level]) for level in sorted(asked)}
    share = ballots.share(len(solved), len(levels))
    return evolution.round_fields("solved", share) | {"coverage_by_level": by_level}


def reward_row(bench: Bench, number: int) -> dict[str, Any]:
    """A policy against the ways its answers are chosen."""
    found = manifest(bench.round_folder(number) / "evaluate")
    row = {"pass@1": found["sampled"]}
    names = {
        ballots.MAJORITY: "majority",
        ballots.LIKELY: "+ log-probability",
        ballots.BEST: f"+ {bench.config.ppm.loss.upper()}",
        ballots.BOTH: f"+ {bench.config.ppm.loss.upper()} and log-probability",
        ballots.WEIGHTED: f"+ {bench.config.ppm.loss.upper()}-weighted vote",
    }
    row |= {names[name]: one for name, one in found["at_n"].items()}
    return row | evolve_rivals.row(bench, number)
