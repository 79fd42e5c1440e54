"""A scripted policy, preference model and interpreter for search tests. Handles are texts, token ids code points."""

import contextlib
import io
import json
import pathlib
import re
import traceback

from smallmath_jax.records import Problem
from smallmath_jax.search.mcts import search_now
from smallmath_jax.search.steps import ENDINGS, Candidate, CodeResult

GOLDEN = pathlib.Path(__file__).parent / "golden" / "rstar_vectors.json"
VECTORS = {one["id"]: one for one in json.loads(GOLDEN.read_text())["vectors"]}


def encode(text):
    return [ord(character) for character in text]


def append(handle, ids):
    return handle + "".join(map(chr, ids))


def labels(text):
    return re.findall(r"#@(\w+)", text)


def candidate(text, mark="", log_prob=-1.0, reason=""):
    """A step of plain text and the mark that ended it, as the engine would return it."""
    whole = text + (mark or "")
    return Candidate(whole, encode(whole), log_prob, reason or ("stop" if mark else "eos"))


def scripted(policy, calls=None):
    """A policy that looks its steps up by the labels of the path ("A/AF")."""

    async def generate(handle, n, keys):
        assert keys.shape == (n, 2)
        name = "/".join(labels(handle))
        if calls is not None:
            calls.append(name)
        return [candidate(text, mark) for text, mark in policy[name]]

    return generate


def scored(table):
    async def score(handles):
        return [table[labels(handle)[-1]] for handle in handles]

    return score


def run_snippet(prefix, code, names=None):
    """What a sandbox returns of a snippet: what `code` prints behind a silent prefix. `names`: variables that leak."""
    names, printed = {} if names is None else names, io.StringIO()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(prefix, names)
        with contextlib.redirect_stdout(printed):
            exec(code, names)
    except Exception:
        return CodeResult("error", printed.getvalue(), traceback.format_exc(limit=0))
    return CodeResult("ok", printed.getvalue())


async def run_code(snippets):
    return [run_snippet(prefix, code) for prefix, code in snippets]


def grader(gold):
    async def grade(answer):
        return "correct" if answer == gold else "wrong"

    return grade


def problem(gold="3", name="p"):
    return Problem(id=name, problem="Q?", answer=gold)


def searched(policy, settings, *, gold="3", ppm=None, calls=None, **overrides):
    """One search of a scripted policy; the callables can be overridden."""
    callables = {
        "generate": scripted(policy, calls) if isinstance(policy, dict) else policy,
        "append": append,
        "encode": encode,
        "run_code": run_code,
        "score": scored(ppm) if ppm else None,
        "grade": grader(gold) if settings.use_gold else None,
        "settings": settings,
    }
    return search_now(problem(gold), "", **(callables | overrides))


def step(label, code="", mark=ENDINGS[0]):
    """One step of a script: ["\\n#@A\\ncode\\n", mark]."""
    return [f"\n#@{label}\n{code}\n", mark]


def answer(label, value):
    return [f"\n<answer>#@{label} The answer is \\boxed{{{value}}}.\n", "<end_of_answer>"]
