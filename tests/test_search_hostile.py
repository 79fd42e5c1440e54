"""What a policy, a sandbox or a preference model may do to a search: it ends, and says how."""

import asyncio
import json

import pytest
from search_case import (
    answer,
    append,
    candidate,
    encode,
    grader,
    problem,
    run_code,
    scored,
    searched,
    step,
)

from smallmath_jax import records
from smallmath_jax.search.analysis import backtracks, theorem_gap
from smallmath_jax.search.mcts import search
from smallmath_jax.search.pairs import PairSettings, preference_pairs
from smallmath_jax.search.select import finished, pqm_examples, summary
from smallmath_jax.search.settings import SearchSettings, rstar_settings
from smallmath_jax.search.steps import CodeResult
from smallmath_jax.search.tree import from_record, tree_from_json
from smallmath_jax.search.vote import leaf_ballots

MAKERS = [SearchSettings, rstar_settings]


def used(tree):
    """Everything that reads trees reads this one."""
    preference_pairs(tree, PairSettings(min_edit=0))
    finished(tree), pqm_examples(tree), summary([[tree]]), leaf_ballots(tree)
    backtracks(tree), theorem_gap([tree])
    assert tree_from_json(json.loads(records.to_json(tree))) == tree
    from_record(tree)
    return tree


def always(*drawn):
    async def generate(handle, n, keys):
        return [candidate(*one) for one in drawn]

    return generate


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize(
    "drawn",
    [
        [("", "")],
        [("", "<end_of_step>"), ("", "<end_of_code>")],
        [("   \n", "<end_of_answer>")],
        [("<end_of_answer>" * 9, "<end_of_answer>")],
        [("<code><code><end_of_code>", "<end_of_step>")],
        [("\\boxed{" * 500, "<end_of_answer>"), ("}" * 500, "<end_of_step>")],
        [("\x00\ud7ff\u202e\U0001f600 \\boxed{\u221e}", "<end_of_answer>")],
        [("<answer>", "<end_of_answer>"), ("</answer><answer>\\boxed{}", "<end_of_answer>")],
        [("x", "<end_of_step>")] * 40,
        [],
    ],
    ids=range(10),
)
def test_texts_of_every_kind_end(make, drawn):
    tree = used(searched(always(*drawn), make(rollouts=5, candidates=4, max_depth=6)))
    assert tree.stopped in ("rollouts", "exhausted"), tree.extra


@pytest.mark.parametrize("make", MAKERS)
def test_a_policy_that_never_ends_meets_the_depth_limit(make):
    async def generate(handle, n, keys):
        return [candidate(f"\nx{len(handle)}_{index} = 1\n", "<end_of_step>") for index in range(n)]

    settings = make(rollouts=5, candidates=2, max_depth=4)
    tree = used(searched(generate, settings))
    deepest = max(node.tag.count(".") for node in tree.nodes)
    assert deepest == (5 if settings.compat else 4)
    assert {node.kind for node in tree.nodes if node.tag.count(".") == deepest} == {"too_deep"}
    assert tree.chosen == "" and tree.nodes[0].visit_count == 0


def test_a_policy_that_runs_into_its_token_limit():
    async def generate(handle, n, keys):
        return [candidate("x = 1 " * 50, reason="length") for _ in range(n)]

    tree = used(searched(generate, SearchSettings(rollouts=3)))
    assert [node.kind for node in tree.nodes] == ["root", "invalid"] and tree.stopped == "exhausted"


def test_a_tree_of_two_thousand_nodes():
    async def generate(handle, n, keys):
        if handle.count("<end_of_step>") >= 3:
            return [candidate(*answer("a", len(handle) % 7))]
        rows = [(f"\nx = {int(key[0])}\n", "<end_of_step>") for key in keys]
        return [candidate(*row) for row in rows]

    async def run(snippets):
        return [CodeResult("ok") for _ in snippets]

    settings = SearchSettings(rollouts=120, candidates=24)
    tree = used(searched(generate, settings, run_code=run))
    assert len(tree.nodes) > 2000 and tree.rollouts == 120 and tree.wasted == 0


def test_a_very_deep_tree_goes_on_from_its_record():
    async def generate(handle, n, keys):
        return [candidate(f"\n{len(handle)}", "<end_of_code>")]

    async def run(snippets):
        return [CodeResult("ok") for _ in snippets]

    fields = {"candidates": 1, "max_depth": 1100}
    tree = searched(generate, SearchSettings(rollouts=1, **fields), run_code=run)
    assert tree.nodes[-1].tag.count(".") == 1100 and tree.nodes[-1].kind == "too_deep"
    used(searched(generate, SearchSettings(rollouts=2, **fields), run_code=run, tree=tree))


POLICY = {
    "": [step("A", "x = 3"), step("B", "x = 4")],
    "A": [answer("C", 3)],
    "B": [answer("D", 4)],
}


def failing(after, error):
    calls = []

    async def call(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise error
        return await run_code(*arguments)

    return call


@pytest.mark.parametrize("make", MAKERS)
def test_only_the_problem_whose_policy_fails_fails(make):
    async def generate(handle, n, keys):
        if "#@A" in handle:
            raise RuntimeError("out of memory")
        return [candidate(*one) for one in POLICY[""]]

    async def both():
        fields = {"append": append, "encode": encode, "run_code": run_code, "grade": grader("3")}
        fields["settings"] = make(rollouts=4)
        return await asyncio.gather(
            search(problem(name="bad"), "", generate=generate, **fields),
            search(problem(name="good"), "", generate=always(answer("x", 3)), **fields),
        )

    bad, good = asyncio.run(both())
    assert (bad.stopped, bad.extra["failure"]) == ("failed", "RuntimeError: out of memory")
    assert len(bad.nodes) == 3 and bad.rollouts == 0 and used(bad)
    assert good.stopped == "exhausted" and good.nodes[-1].verdict == "correct"
    assert summary([[bad], [good]])["failed"] == 1


async def fewer(snippets):
    return []


async def not_a_number(handles):
    return [float("nan") for _ in handles]


async def too_few(handles):
    return []


async def no_grade(text):
    raise TimeoutError("grader lost")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"run_code": failing(0, OSError("gone"))}, "OSError: gone"),
        ({"run_code": fewer}, "ValueError"),
        ({"score": not_a_number}, "finite score"),
        ({"score": too_few}, "for 2 nodes"),
        ({"grade": no_grade}, "TimeoutError: grader lost"),
        ({"encode": lambda text: ["x"]}, "ValueError"),
    ],
)
def test_what_fails_is_named_and_nothing_is_half_done(override, message):
    policy = POLICY | {"": [*POLICY[""][:1], step("B", "print(4)", "<end_of_code>")]}
    settings = SearchSettings(rollouts=4, guidance="ppm")
    ppm = scored(dict.fromkeys("ABCD", 0.5))
    tree = used(searched(policy, settings, **({"score": ppm} | override)))
    assert tree.stopped == "failed" and message in tree.extra["failure"]
    for node in tree.nodes:
        scores = 0 if node.score is None else 1
        assert node.visit_count <= scores + sum(one.kind == "answer" for one in tree.nodes)


def test_cancelling_a_search_cancels_it():
    async def run():
        async def generate(handle, n, keys):
            await asyncio.sleep(60)

        fields = {"append": append, "encode": encode, "run_code": run_code, "grade": grader("3")}
        task = asyncio.ensure_future(
            search(problem(), "", generate=generate, settings=SearchSettings(), **fields)
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_a_tree_goes_on_with_its_own_problem_only():
    tree = searched(POLICY, SearchSettings())
    with pytest.raises(ValueError, match="'other' cannot go on with a tree of 'p'"):
        asyncio.run(
            search(
                problem(name="other"),
                "",
                settings=SearchSettings(),
                tree=tree,
                generate=always(),
                append=append,
                encode=encode,
                run_code=run_code,
                grade=grader("3"),
            )
        )
