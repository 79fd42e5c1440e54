"""One problem, answered: the reasoning and the answer, printed; by tree search also the page of its tree."""

import asyncio
import dataclasses
import hashlib
from typing import Any

from etils import epath

from smallmath_jax.data.images import load_image
from smallmath_jax.data.tokens import decode
from smallmath_jax.records import Problem, Prompt, Tree, draw_key
from smallmath_jax.report.trees import page_name, write_tree_page
from smallmath_jax.rollout.engine import Limits
from smallmath_jax.search import vote
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.search.steps import OK
from smallmath_jax.search.tree import path_to
from smallmath_jax.tasks import chains, runs
from smallmath_jax.tasks.driver import Driver, Host, open_host, same_answer
from smallmath_jax.tasks.policy import (
    Policy,
    judge_checkpoints,
    load_policy,
    make_mesh,
    newest_checkpoints,
    prompts_for,
    settle_grammar,
)
from smallmath_jax.tasks.rollouts import Request, make_engine, run_requests, sampling_of
from smallmath_jax.tasks.search import load_judge, search_job, search_settings
from smallmath_jax.verify import rewards
from smallmath_jax.verify.answers import extract

REMEDIES = {
    "prompt_too_long": "raise prompt.max_tokens",
    "too_many_patches": "lower vision.max_pixels or raise vision.max_patches",
    "image_for_a_text_model": "it reads no pictures, give a vision model",
}


def run(config: Any, workdir: str) -> None:
    """Prints the reasoning and the answer to `config.problem`, found by `config.method`."""
    if config.method not in METHODS:
        raise ValueError(f"config.method is {config.method!r}; known: {', '.join(METHODS)}")
    if not config.problem:
        raise ValueError('say what to solve: --config.problem="What is 3 * 7?"')
    if config.image:
        load_image(config.image)  # what is missing is told before the weights load
    if config.init_from:
        newest_checkpoints(config.init_from)
    if config.judge:
        judge_checkpoints(config.judge)
    name = hashlib.sha256(f"{config.problem}\x1f{config.image}".encode()).hexdigest()[:8]
    images = (config.image,) if config.image else ()
    problem = Problem(id=f"asked-{name}", problem=config.problem, answer="", images=images)
    METHODS[config.method](config, workdir, problem)


def _prompt(problem: Problem, policy: Policy, config: Any) -> Prompt:
    """Raises ValueError, with the remedy, for a problem that does not fit the model."""
    _, prompts, dropped = prompts_for([problem], policy, config)
    if dropped:
        told = ", ".join(f"{reason} ({REMEDIES[reason]})" for reason in dropped)
        raise ValueError(f"the problem does not fit this model: {told}")
    return prompts[0]


# ---- one answer


def sample(config: Any, workdir: str, problem: Problem) -> None:
    """One completion, greedy unless `config.sampling` says otherwise. The programs of code steps are run."""
    settle_grammar(config)
    draw = one_chain if config.prompt.grammar == "code_steps" else one_completion
    text, answer, reason = draw(config, problem)
    print(text)
    print(f"\nanswer: {answer if answer is not None else 'none found'}")
    if reason == "length":
        print(
            f"(stopped at {config.sampling.max_tokens} tokens; --config.sampling.max_tokens=N allows more)"
        )


def one_completion(config: Any, problem: Problem) -> tuple[str, str | None, str]:
    """(reasoning, answer, stop reason)."""
    runs.prepare_process()
    policy = load_policy(config, make_mesh(config))
    prompt = _prompt(problem, policy, config)
    limits = Limits(max_tokens=config.sampling.max_tokens)
    keys = draw_key(config.seed, "solve", config.problem)[None]
    request = Request(prompt, keys, limits, sampling_of(config.sampling))
    ((_, (rollout,)),) = run_requests(make_engine(policy, config), [request])
    text = decode(policy.tokens, rollout.token_ids)
    parsed = rewards.parse_think_answer(text, prompt.prefix)
    answer = extract(text, mode="lenient", prefix=prompt.prefix)
    shown = parsed.think if parsed.well_formed else prompt.prefix + text
    return shown, answer, rollout.stop_reason


def one_chain(config: Any, problem: Problem) -> tuple[str, str | None, str]:
    """(program, its output and the answer; answer; stop reason)."""
    with open_host(config.sandbox.to_dict()) as host:
        driver, prompt = open_driver(config, problem, host, config.sampling, config.engine.slots)

        async def walk() -> chains.Chain:
            root, names = driver.open(prompt), (config.seed, "solve", config.problem)
            limit, settings = config.sampling.max_tokens, settings_for(config)
            return await chains.follow(driver, root, names, driver.sampling, limit, settings)

        found: list[chains.Chain] = []
        asyncio.run(driver.run([walk], 1, found.append))
    return found[0].text.strip(), found[0].answer, found[0].stop_reason


def open_driver(
    config: Any, problem: Problem, host: Host, sampling: Any, slots: int
) -> tuple[Driver, Prompt]:
    """A driver of the config's policy and judge, steps drawn by `sampling`, and the problem's prompt."""
    runs.prepare_process()
    mesh = make_mesh(config)
    policy = load_policy(config, mesh)
    prompt = _prompt(problem, policy, config)
    judge = load_judge(config.judge, policy, config, mesh) if config.judge else None
    driver = Driver(
        policy,
        make_engine(policy, config, slots=slots),
        host,
        grammar=config.prompt.grammar,
        sampling=sampling_of(sampling),
        max_tokens=sampling.max_tokens,
        judge=judge,
    )
    return driver, prompt


# ---- tree search


def mcts(config: Any, workdir: str, problem: Problem) -> None:
    """A search without gold answer, guided by `config.judge` where it is given; writes WORKDIR/report/trees/PAGE."""
    settle_steps(config)
    settings = settings_for(config)
    slots = max(config.engine.slots, settings.candidates)
    trees: list[Tree] = []
    with open_host(config.sandbox.to_dict()) as host:
        driver, prompt = open_driver(config, problem, host, config.step_sampling, slots)
        asyncio.run(driver.run([search_job(driver, problem, prompt, settings)], 1, trees.append))
    judge = driver.judge
    tree = settled(trees[0], judge.scale) if judge else settled(trees[0])
    if tree.stopped == "failed":
        raise ValueError(f"the search failed: {tree.extra['failure']}")
    page = epath.Path(workdir) / "report" / "trees" / page_name(tree)
    write_tree_page(tree, page)
    print(told(tree))
    print(f"tree: {page}")


METHODS = {"sample": sample, "mcts": mcts}


def settle_steps(config: Any) -> None:
    """Makes the grammar code_steps. Raises ValueError where the run in `init_from` was trained on another one."""
    if config.init_from:
        settle_grammar(config)
    if config.prompt.grammar == "auto":
        config.prompt.grammar = "code_steps"
    if config.prompt.grammar != "code_steps":
        where = f"the policy of {config.init_from}" if config.init_from else "config.prompt.grammar"
        raise ValueError(
            f"method=mcts searches over code steps, {where} is of {config.prompt.grammar}; give a policy that was "
            "trained on code_steps (configs/evolve.py), or --config.method=sample"
        )


def settings_for(config: Any) -> SearchSettings:
    """Settings of the search: no gold answer, and the guidance of a judge where there is one."""
    return search_settings(
        config.search,
        seed=config.seed,
        use_gold=False,
        guidance="ppm" if config.judge else "terminal",
        choose="votes",
    )


def settled(tree: Tree, scale: vote.Scale = vote.SCALES["ppm"]) -> Tree:
    """The tree, its choice that of a vote of all its answers, each weighed by the judge's odds and its probability.

    The measure `search_accuracy` is of the same vote. Without a judge the probability alone weighs.
    """
    scores = {node.tag: node.score or 0.0 for node in tree.nodes}
    ballots = [dataclasses.replace(one, score=scores[one.tag]) for one in vote.leaf_ballots(tree)]
    if not ballots:
        return tree
    agreeing = vote.vote(ballots, same_answer, "posterior", scale)[0].ballots
    weight = lambda ballot: vote.WEIGHTS["posterior"](ballot, scale)
    return dataclasses.replace(tree, chosen=max(agreeing, key=weight).tag)


def told(tree: Tree) -> str:
    """The chosen trajectory, its answer, and how many of the tree's answers agree with it."""
    chosen = vote.chosen_ballot(tree)
    done = f"{tree.rollouts} rollouts, {tree.tokens:,} tokens"
    if chosen is None:
        failed = sum(node.status not in ("", OK) for node in tree.nodes)
        return f"answer: none found ({done}; {failed} of {len(tree.nodes) - 1} steps failed)"
    ballots = vote.leaf_ballots(tree)
    agreeing = sum(same_answer(chosen.answer, one.answer) for one in ballots)
    text = "".join(node.text for node in path_to(tree, chosen.tag)).strip()
    return f"{text}\n\nanswer: {chosen.answer}\n{agreeing} of {len(ballots)} answers agree ({done})"
