"""Training of the process preference model, and of its rivals PQM and ORM (rStar-Math, sections 3.3 and 9.2).

Initialised from the policy, with a value head read at the last token of what is judged. A PPM learns from pairs, a PQM
from Q-values, an ORM from outcomes; all three from the same trees, and all are measured on held-out pairs.
"""

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import Any

import jax
from etils import epath

from smallmath_jax.models.value_head import add_value_head
from smallmath_jax.parallel import hosts, rules
from smallmath_jax.records import PreferencePair, Problem, Tree, read_parts, write_part, write_text
from smallmath_jax.report import pages
from smallmath_jax.search.pairs import PairSettings, preference_pairs
from smallmath_jax.search.select import EXAMPLES, ValueExample
from smallmath_jax.tasks import runs, stages, training
from smallmath_jax.tasks.judged import (
    Batches,
    Judged,
    Plan,
    held_out,
    judged_items,
    plan_steps,
    unique,
)
from smallmath_jax.tasks.policy import (
    Policy,
    load_policy,
    make_mesh,
    prompts_for,
    restore_model,
)
from smallmath_jax.tasks.tree_parts import find_trees, read_trees
from smallmath_jax.train import step as steps
from smallmath_jax.train.loop import StopSignal


def run(config: Any, workdir: str) -> None:
    """Trains `config.ppm.loss` on the trees of `config.trees`; pairs/ and the checkpoints go into WORKDIR."""
    with runs.open_run(config, workdir) as this_run, StopSignal() as stop:
        mesh = make_mesh(config)
        trees = graded_trees(config.trees)
        again = sum(len(find_trees([one])) for one in config.trees) - len(trees)
        if again:
            runs.say(f"trees: {again} stand behind later ones of the same problem, seed and round")
        policy = load_policy(config, mesh)
        lengths = prompt_lengths([problem_of(tree) for tree in trees], policy, config)
        pairs, counts = pairs_of(trees, PairSettings(**config.pairs.to_dict()), lengths)
        write_part(this_run.workdir / "pairs", "00000.jsonl", pairs)
        runs.say(f"pairs: {counts}")
        examples = examples_of(trees, config.ppm.loss)
        problems = [problem_of(tree) for tree in trees]
        train_judge(policy, problems, pairs, examples, config, this_run.workdir, mesh, stop)
        pages.write_report(this_run.workdir, wall_s=this_run.wall_s())
        runs.say(f"done in {this_run.wall_s():.0f} s; report: {workdir}/report/index.html")


def graded_trees(folders: SequenceOf[str]) -> list[Tree]:
    """The trees of `config.trees`. Raises ValueError naming a folder without any, or trees that were not graded."""
    if not folders:
        raise ValueError(
            "config.trees is empty; give folders of trees: RUN/trees of configs/search.py"
        )
    for name in folders:
        if find_trees([name]):
            continue
        root = epath.Path(name)
        inside = [*root.glob("trees"), *sorted(root.glob("round_*/search/trees"))]
        hint = f"; there are some in {', '.join(map(str, inside))}" if inside else ""
        what = "no tree there" if root.exists() else "no such folder"
        raise ValueError(f"trees: {name}: {what}{hint or '; search first (configs/search.py)'}")
    trees = read_trees(folders)
    if not any(node.verdict for tree in trees for node in tree.nodes):
        raise ValueError(
            f"trees={folders}: they hold no answer that was graded when it was found (an evaluation's trees never "
            "do); learn from those of configs/search.py or configs/evolve.py"
        )
    return trees


def problem_of(tree: Tree) -> Problem:
    """The problem of a searched tree, as far as a prompt needs it."""
    return Problem(
        id=tree.problem_id,
        problem=tree.problem,
        answer=tree.gold,
        images=tree.images,
        level=tree.level,
        subject=tree.subject,
        options=tuple(tree.extra.get("options", ())),
        source=tree.source,
        template=tree.template,
    )


def prompt_lengths(problems: SequenceOf[Problem], policy: Policy, config: Any) -> dict[str, int]:
    """problem id -> tokens of its prompt; problems whose prompt does not fit are missing."""
    kept, prompts, _ = prompts_for(unique(problems), policy, config)
    return {one.id: len(prompt.token_ids) for one, prompt in zip(kept, prompts, strict=True)}


def pairs_of(
    trees: SequenceOf[Tree], settings: PairSettings, lengths: dict[str, int]
) -> tuple[list[PreferencePair], dict[str, int]]:
    """All pairs of the trees, and what was made and dropped, by reason."""
    pairs, counts = [], Counter()
    for tree in trees:
        found, counted = preference_pairs(tree, settings, lengths.get(tree.problem_id, 0))
        pairs += found
        counts.update(counted)
    return pairs, dict(counts)


def examples_of(trees: Iterable[Tree], loss: str) -> list[ValueExample]:
    """The examples of a PQM or ORM; a PPM has none."""
    read = EXAMPLES.get(loss)
    return [example for tree in trees for example in read(tree)] if read else []


# ---- training


def train_judge(
    policy: Policy,
    problems: SequenceOf[Problem],
    pairs: SequenceOf[PreferencePair],
    examples: SequenceOf[ValueExample],
    config: Any,
    folder: epath.Path,
    mesh: jax.sharding.Mesh,
    stop: StopSignal,
    title: str = "ppm",
) -> Policy:
    """The policy with a trained value head, its metrics, checkpoints and result.json in `folder`.

    A finished stage is only restored. result.json: held-out pair accuracy, pairs, counts of what was dropped.
    The weights of `policy` are used up.
    """
    settings = training.fit_rows(config.ppm, mesh)
    headed = dataclasses.replace(policy, model=_with_head(policy, config, mesh))
    if stages.is_done(folder):
        model = restore_model(folder / "checkpoints", headed.model, mesh)
        return dataclasses.replace(headed, model=model)
    both, single, dropped = judged_items(policy, problems, pairs, examples, config)
    both, test = held_out(both, settings.held_out, config.seed)
    single, _ = held_out(single, settings.held_out, config.seed)
    items = both if settings.loss == "ppm" else single
    patches = settings.row_patches if policy.config.vision is not None else 0
    plan = plan_steps(items, settings, config.seed, patches)
    total = len(plan.steps)
    trainer = training.make_trainer(
        headed,
        config,
        settings,
        mesh,
        loss=settings.loss,
        total_updates=total,
        microbatches=plan.microbatches,
        loss_settings={"tanh": settings.tanh_in_loss} if settings.loss == "ppm" else {},
        value_dropout=settings.dropout,
    )
    runs.say(
        f"{title}: {_terms(items)} {'pairs' if settings.loss == 'ppm' else 'examples'}, {_terms(test)} pairs held out, "
        f"{sum(plan.tokens):,} tokens in {total} steps"
        + (f"; dropped {dropped}" if dropped else "")
    )
    batches = Batches(items, plan, trainer.layout, headed, mesh, config.seed)
    measure = _measure(test, config, trainer, mesh)
    with stages.Stage(folder, config, trainer, total, title, stop) as stage:
        state = stage.restore_or_start(headed.model)
        seen, since, shown = 0, time.perf_counter(), {}
        for step in range(stage.first, total):
            state, metrics = trainer.step_fn(state, batches.step(step))
            seen += plan.tokens[step]
            record = {**metrics, "num_tokens": plan.tokens[step]}
            if "accuracy" in record:
                record["accuracy/pairs"] = record.pop("accuracy")
            last = step + 1 == total
            if test and (last or settings.eval_every and (step + 1) % settings.eval_every == 0):
                record["eval/accuracy"] = measure(state.model)
            if last or (step + 1) % config.log.every == 0:
                shown = _shown(record)
                record["tokens_per_second"] = seen / (time.perf_counter() - since)
                seen, since = 0, time.perf_counter()
            if last:
                _write_result(folder, record, items, test, plan, dropped)
            stage.log(step + 1, record)
            stage.advance(step + 1, state, **shown)
        return dataclasses.replace(headed, model=state.model)


def _with_head(policy: Policy, config: Any, mesh: jax.sharding.Mesh) -> Any:
    """The policy's model with a fresh value head, placed on the mesh."""
    model = add_value_head(policy.model, jax.random.key(config.seed))
    return jax.device_put(model, rules.shardings(model, mesh))


def _shown(record: dict[str, Any]) -> dict[str, float]:
    names = {"loss": "loss", "accuracy/pairs": "accuracy", "eval/accuracy": "held out"}
    return {label: float(record[name]) for name, label in names.items() if name in record}


def _terms(items: SequenceOf[Judged]) -> int:
    return sum(item.terms for item in items)


def _write_result(
    folder: epath.Path,
    record: dict[str, Any],
    items: SequenceOf[Judged],
    test: SequenceOf[Judged],
    plan: Plan,
    dropped: dict[str, int],
) -> None:
    if hosts.host_index() == 0:
        result = {
            "held_out_accuracy": record.get("eval/accuracy"),  # None: no pair was held out
            "held_out_pairs": _terms(test),
            "trained_on": _terms(items),
            "tokens": sum(plan.tokens),
            "dropped": dropped,
        }
        write_text(epath.Path(folder) / "result.json", json.dumps(result))


def _measure(test: SequenceOf[Judged], config: Any, trainer: training.Trainer, mesh: Any) -> Any:
    """model -> share of held-out pairs whose chosen side scores higher; None without any."""
    if not test:
        return None
    once = config.ppm.copy_and_resolve_references()
    once.update({"epochs": 1, "steps": 0, "tokens": 0, "pairs": _terms(test)})
    plan = plan_steps(test, once, config.seed, trainer.layout.row_patches)
    layout = dataclasses.replace(trainer.layout, microbatches=plan.microbatches)
    batch = Batches(test, plan, layout, trainer.policy, mesh, config.seed).step(0, dropout=False)
    compute = training.make_compute(trainer.policy.config, config, mesh)

    @jax.jit
    def right(model: Any, part: dict[str, Any]) -> jax.Array:
        values = steps.end_values(model, part, compute)
        margin = values[part["pairs"][:, 0]] - values[part["pairs"][:, 1]]
        return ((margin > 0) & (part["pair_weights"] > 0)).sum()

    def accuracy(model: Any) -> float:
        parts = (jax.tree.map(lambda x, a=a: x[a], batch) for a in range(plan.microbatches))
        return sum(int(right(model, part)) for part in parts) / _terms(test)

    return accuracy


def read_pairs(folder: Any) -> list[PreferencePair]:
    """The pairs of a folder of parts."""
    return [PreferencePair(**row) for row in read_parts(folder)]
