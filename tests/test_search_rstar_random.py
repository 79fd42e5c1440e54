"""Trees, beams, pairs and choices of random policies: the public code's own results, recorded by running it on them.

The policy is a pure function of the text so far. Its steps mix working and failing code, several prints, numbers to be
rounded, the word "error", repetitions, lost and empty boxes, and every way to stop.
"""

import asyncio
import hashlib
import json
import random

import pytest
from search_case import GOLDEN, append, candidate, encode, grader, problem, run_code

from smallmath_jax.search import rstar
from smallmath_jax.search.beam import beam_search
from smallmath_jax.search.mcts import search
from smallmath_jax.search.pairs import PairSettings, step_pairs
from smallmath_jax.search.select import finished
from smallmath_jax.search.settings import rstar_settings
from smallmath_jax.search.vote import best_by_rollout

CASES = json.loads((GOLDEN.parent / "rstar_random.json").read_text())["cases"]
FINAL = {kind: text for text, kind in rstar.FAILURES.items()}
CODE = {
    "x = 3": 6,
    "x = 4": 6,
    "y = 1/3": 3,
    None: 5,
    "print('standard error: 0.3')": 1,
    "print(1.23456789)": 2,
    "print(1)\nprint(2.5)": 1,
    "for k in range(2):\n    print(k)": 1,
    "undefined": 1,
    "1/0": 1,
    "x = (": 1,
    "w = 7": 4,
    "w = 9": 4,
    "v = 5": 4,
    "'text'": 1,
    "2.0/3": 1,
    "print(1)\nx=2": 1,
    "def f():\n    print(4)\nf()\nprint(f())": 1,
}


def draws(*parts):
    text = "\x1f".join(map(str, parts))
    return random.Random(hashlib.sha256(text.encode()).hexdigest())


def sample(seed, partial, n):
    """The n samples the record was made with; the order of draws is part of it."""
    rng, undefined_often = draws(seed, "policy", partial), draws(seed, "style").random() >= 0.7
    depth = partial.count("<end_of_step>") + partial.count("<end_of_code>")
    name = hashlib.sha256(partial.encode()).hexdigest()[:6]
    weights = [5 if code == "undefined" and undefined_often else CODE[code] for code in CODE]
    found = []
    for index in range(n):
        if rng.random() < 0.05 and depth or partial.endswith("<end_of_output>"):
            found.append(sample_answer(rng, index))
            continue
        fresh = "<code>" not in partial or partial.endswith("<end_of_output>")
        number = index if rng.random() < 0.85 else 0
        code = rng.choices(list(CODE), weights)[0]
        code = code or ("print(x)" if depth else "z = 2")
        code = f"x = undefined_{name}" if code == "undefined" else code
        marks = ["<end_of_step>", "<end_of_code>", None]
        text = f"{'<code>' if fresh else ''}\n# step {name} {number}\n{code}\n"
        found.append((text, rng.choices(marks, [5, 3 + depth, 0.3])[0]))
    if rng.random() < 0.3:
        found[-1] = found[0]
    return found


def sample_answer(rng, index):
    value = rng.choice(["3", "4", "5", "3"])
    texts = [
        f"\n<answer>The answer is \\boxed{{{value}}}.\n",
        f"\n<answer>First.\nThe answer is \\boxed{{{value}}}.\n",
        f"\n<answer>\\boxed{{\\text{{ {value} }}}}\n",
        f"\n<answer>It is {index} \\boxed{{{value}}}.\n",
        "\n<answer>\\boxed{}",
    ]
    return rng.choice(texts), rng.choice(["<end_of_answer>"] * 6 + [None, "<end_of_step>"])


def searched(case):
    seed, gold = case["seed"], case["use_gold"]

    async def generate(handle, n, keys):
        return [candidate(text, mark) for text, mark in sample(seed, handle, n)]

    async def score(handles):
        return [draws(seed, "ppm", handle).uniform(-1, 1) for handle in handles]

    settings = rstar_settings(
        rollouts=case["iterations"],
        candidates=case["n"],
        max_errors=case["errors"],
        max_depth=case["max_depth"],
        use_gold=gold,
        guidance="ppm" if case["ppm"] else "terminal",
    )
    callables = {
        "generate": generate,
        "append": append,
        "encode": encode,
        "run_code": run_code,
        "settings": settings,
        "score": score if case["ppm"] else None,
        "grade": grader("3") if gold else None,
    }
    if case["kind"] == "beam":
        return asyncio.run(beam_search(problem(), "", width=case["width"], **callables))
    return asyncio.run(search(problem(), "", **callables))


@pytest.mark.parametrize(
    "record", CASES, ids=[f"{one['case']['kind']}-{one['case']['seed']}" for one in CASES]
)
def test_the_public_code_and_ours_grow_the_same_tree(record):
    case, tree = record["case"], searched(record["case"])
    assert tree.stopped != "failed", tree.extra
    nodes = {node.tag: node for node in tree.nodes}
    assert set(nodes) == set(record["nodes"])
    for tag, (text, final, *values) in record["nodes"].items():
        node = nodes[tag]
        assert (node.text, node.answer or FINAL.get(node.kind, "")) == (text, final)
        mine = [node.score or 0] if case["kind"] == "beam" else [node.visit_count, node.q_value]
        assert mine == pytest.approx(values, abs=1e-12), tag
    if case["kind"] == "beam":
        answers = sorted(
            (node for node in tree.nodes if node.answer), key=lambda one: one.score, reverse=True
        )
        assert [[node.answer, node.score] for node in answers] == record["solutions"]
    else:
        assert tree.chosen == record["chosen"]


@pytest.mark.parametrize("record", [one for one in CASES if "pairs" in one])
def test_the_public_code_and_ours_extract_the_same_pairs_and_traces(record):
    tree = searched(record["case"])
    for descend, name in (("all", "pairs"), ("vis_count", "pairs_vis")):
        found = step_pairs(tree, PairSettings(descend=descend))
        assert len(found) == len(record[name])
        for pair, (chosen, rejected, *numbers) in zip(found, record[name], strict=True):
            assert (pair.chosen.text, pair.rejected.text) == (chosen, rejected)
            mine = [pair.margin, pair.continued_margin, pair.negatives, pair.positives]
            assert mine == pytest.approx(numbers, abs=1e-12)
    traces = [
        [1 if one.outcome == "correct" else -1, [step.q_value for step in one.steps]]
        for one in finished(tree)
    ]
    assert [one[0] for one in traces] == [one[0] for one in record["traces"]]
    for mine, recorded in zip(traces, record["traces"], strict=True):
        assert mine[1] == pytest.approx(recorded[1], abs=1e-12)


@pytest.mark.parametrize("record", [one for one in CASES if "metric" in one])
def test_the_public_code_and_ours_find_the_same_answers_by_rollout(record):
    best, metric = best_by_rollout(searched(record["case"])), record["metric"]
    assert list(best) == metric["rollout_indexs"]
    assert [one.answer for one in best.values()] == metric["answers"]
    assert [one.score for one in best.values()] == pytest.approx(metric["value_estimate"])
