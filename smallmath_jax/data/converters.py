"""Named public sets: where they are, their licence, and how a row becomes a Problem.

`convert:NAME` loads one of CONVERTERS (training data), a plain name one of BENCHMARKS. A row that cannot be used is
left out and counted by reason. Worked solutions are written in the think_answer grammar.
"""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from smallmath_jax.data.problems import LOG, Rows, hub_rows, select
from smallmath_jax.data.prompts import GRAMMARS, format_completion
from smallmath_jax.data.rows import RowError, to_problem
from smallmath_jax.records import Problem

MATH_CONFIGS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
# The competition part of NuminaMath 1.5; school (cn_k12), word problems (orca_math) and synthetic rows are dropped.
NUMINA_COMPETITION = (
    "amc_aime",
    "aops_forum",
    "cn_contest",
    "inequalities",
    "number_theory",
    "olympiads",
    "olympiads_ref",
)
_SPECIAL = re.compile(r"<\|[a-z_]+\|>")
NOT_AN_ANSWER = ("", "proof", "notfound", "not found", "none")


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A row that is left out, and why."""

    reason: str


@dataclasses.dataclass(frozen=True)
class PublicSet:
    """A public set. `rows` are hub names NAME:CONFIG:SPLIT; `convert` maps one row."""

    rows: tuple[str, ...]
    licence: str  # as its card states it
    convert: Callable[[Mapping[str, Any]], Problem | Skipped]


def load_converted(
    name: str,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = LOG.info,
    dropped: Counter[str] | None = None,
) -> list[Problem]:
    """The problems of CONVERTERS[name]; `say` is told in a line how many rows were left out, `dropped` counts them.

    Raises ValueError naming the nearest known name for an unknown one.
    """
    if name not in CONVERTERS:
        raise ValueError(_unknown(name, CONVERTERS, "convert:"))
    return _load(name, CONVERTERS[name], limit, seed, say, dropped)


def load_benchmark(
    name: str,
    limit: int | None = None,
    seed: int = 0,
    say: Callable[[str], None] = LOG.info,
    dropped: Counter[str] | None = None,
) -> list[Problem]:
    """The problems of BENCHMARKS[name], told like `load_converted`."""
    if name not in BENCHMARKS:
        raise ValueError(_unknown(name, BENCHMARKS, ""))
    return _load(name, BENCHMARKS[name], limit, seed, say, dropped)


def _unknown(name: str, known: Mapping[str, Any], prefix: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, 1, 0.4)
    hint = f"did you mean {prefix}{near[0]}? " if near else ""
    return (
        f"unknown set {prefix}{name}; {hint}Known: {', '.join(prefix + known for known in known)}"
    )


def _load(
    name: str,
    public: PublicSet,
    limit: int | None,
    seed: int,
    say: Callable[[str], None],
    dropped: Counter[str] | None,
) -> list[Problem]:
    parts = [hub_rows(row_source, None, f"hf:{row_source}") for row_source in public.rows]
    problems, left_out = convert_rows(name, public, _joined(parts), limit, seed)
    if dropped is not None:
        dropped.update(left_out)
    if left_out:
        told = ", ".join(f"{reason} {count}" for reason, count in sorted(left_out.items()))
        say(f"{name}: {len(problems)} problems, {sum(left_out.values())} rows left out: {told}")
    return problems


def convert_rows(
    name: str, public: PublicSet, rows: Rows, limit: int | None = None, seed: int = 0
) -> tuple[list[Problem], dict[str, int]]:
    """(problems with unique ids, rows left out by reason). The same problem twice is kept once.

    Raises ValueError when no row could be used, with the first row's fault.
    """
    left_out: dict[str, int] = {}
    faults: list[str] = []
    seen: set[tuple[str, tuple[str | bytes, ...]]] = set()

    def convert(row: Mapping[str, Any], index: int) -> Problem | None:
        try:
            problem = public.convert(row)
        except (RowError, KeyError, TypeError) as error:  # the set's schema is not ours to mend
            faults.append(f"{rows.where(index)}: {type(error).__name__} {error}")
            problem = Skipped("bad_row")
        if isinstance(problem, Problem):
            if (problem.problem, problem.images) in seen:
                problem = Skipped("duplicate")
            elif _SPECIAL.search(problem.problem + (problem.solution or "")):
                problem = Skipped("special_token_in_text")  # no tokenizer could read it as text
        if isinstance(problem, Skipped):
            left_out[problem.reason] = left_out.get(problem.reason, 0) + 1
            return None
        seen.add((problem.problem, problem.images))
        return dataclasses.replace(
            problem, id=f"{name}-{index}", source=public.rows[0], licence=public.licence
        )

    try:
        problems = select(convert, rows, name, limit, seed)
    except ValueError as error:
        first = f"; {faults[0]}" if faults else ""
        raise ValueError(f"{name} ({public.rows[0]}): {error} {left_out}{first}") from error
    return problems, left_out


def _joined(parts: list[Rows]) -> Rows:
    """Several tables as one."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part))

    def locate(index: int) -> tuple[Rows, int]:
        place = max(place for place, start in enumerate(starts[:-1]) if start <= index)
        return parts[place], index - starts[place]

    def get(index: int) -> Any:
        part, inner = locate(index)
        return part.get(inner)

    def where(index: int) -> str:
        part, inner = locate(index)
        return part.where(inner)

    return Rows(starts[-1], get, where)


# Pieces


_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    """What the last complete \\boxed{...} (or \\fbox{...}) holds, braces matched; None when there is none."""
    opened: list[int] = []  # where the content of each open brace starts; -1: not a box
    best = (-1, -1)
    for found in _BRACES.finditer(text):
        mark = found.group()
        if mark == "}":
            start = opened.pop() if opened else -1
            best = max(best, (start, found.start())) if start >= 0 else best
        elif mark.endswith("{") and mark != "\\{":
            opened.append(found.end() if len(mark) > 1 else -1)
    if best[0] >= 0:
        return text[best[0] : best[1]].strip() or None
    bare = re.findall(r"\\boxed\s+([^\s$.]+)", text)  # MATH has a few "\boxed 3"
    return bare[-1] if bare else None


def split_thinking(text: str) -> tuple[str, str] | None:
    """(thinking, what follows) of "<think>…</think>…"; None unless there is exactly one such block, at the start."""
    found = re.match(r"\s*<think>(.*?)</think>(.*)\Z", text, re.DOTALL)
    if found is None or "<think>" in found[1] + found[2] or "</think>" in found[2]:
        return None
    return found[1].strip(), found[2].strip()


def final_answer(text: str) -> str | None:
    """The answer a model's closing text states: <answer>, else \\boxed, else "Answer: …" on a line of its own."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    if tagged:
        return last_boxed(tagged[-1]) or tagged[-1].strip() or None
    boxed = last_boxed(text)
    if boxed:
        return boxed
    said = re.findall(
        r"(?im)^\W*(?:the )?(?:final )?answer(?: is)?\s*[:：]\W*(\S.*?)[\s.*]*$", text
    )
    return said[-1].strip() if said else None


def _worked(reasoning: str, answer: str) -> str | None:
    """The solution in our grammar; None when it has tags that would break it."""
    try:
        return format_completion(reasoning, answer, GRAMMARS["think_answer"])
    except ValueError:
        return None


def _with_solution(problem: Problem, reasoning: str) -> Problem | Skipped:
    solution = _worked(reasoning, problem.answer)
    if solution is None:
        return Skipped("broken_solution")
    return dataclasses.replace(problem, solution=solution)


# Rows


def _math(row: Mapping[str, Any]) -> Problem | Skipped:
    """EleutherAI/hendrycks_math: problem, level "Level 5", type, solution with \\boxed."""
    answer = last_boxed(row["solution"])
    if answer is None:
        return Skipped("no_boxed_answer")
    fields = {"problem": row["problem"], "level": row["level"], "subject": row["type"]}
    return _with_solution(to_problem({**fields, "answer": answer}), row["solution"])


def _geometry3k(row: Mapping[str, Any]) -> Problem:
    """hiyouga/geometry3k: images, problem with <image>, answer."""
    fields = {name: row[name] for name in ("images", "problem", "answer")}
    return to_problem({**fields, "subject": "Geometry"})


def _openr1(row: Mapping[str, Any]) -> Problem | Skipped:
    """open-r1/OpenR1-Math-220k: generations "<think>…</think>…", each with a verdict of Math-Verify.

    The shortest complete and verified one is taken: long ones do not fit a training row.
    """
    if _no_answer(row["answer"]):
        return Skipped("no_answer")
    verdicts = row["correctness_math_verify"] or [False] * len(row["generations"])
    finished = row["is_reasoning_complete"] or [False] * len(row["generations"])
    rated = zip(row["generations"], verdicts, finished, strict=True)
    right = sorted((text for text, verdict, done in rated if verdict and done), key=len)
    thoughts = [thought for thought in map(split_thinking, right) if thought and thought[0]]
    if not thoughts:
        return Skipped("no_verified_solution")
    problem = to_problem(
        {"problem": row["problem"], "answer": row["answer"], "subject": row["problem_type"]}
    )
    return _with_solution(problem, thoughts[0][0])


def _r1_onevision(row: Mapping[str, Any]) -> Problem | Skipped:
    """Fancy-MLLM/R1-Onevision: image in base64, conversations [{from: human}, {from: gpt or assistant}]."""
    turns = {turn["from"]: turn["value"] for turn in row["conversations"]}
    question = turns.get("human", "")
    reply = split_thinking(turns.get("gpt") or turns.get("assistant") or "")
    if not question.strip() or reply is None or not reply[0]:
        return Skipped("no_thinking")
    answer = final_answer(reply[1])
    if answer is None or _no_answer(answer):
        return Skipped("no_answer")
    picture = row["image"]
    if not picture:
        return Skipped("no_image")
    if not picture.startswith("data:"):
        picture = f"data:image/png;base64,{picture}"
    problem = to_problem({"problem": _without_marks(question), "answer": answer, "image": picture})
    return _with_solution(problem, reply[0])


def _multimodal_open_r1(row: Mapping[str, Any]) -> Problem | Skipped:
    """lmms-lab/multimodal-open-r1-8k-verified: image, problem, solution "<think>…</think> <answer>…</answer>"."""
    reply = split_thinking(row["solution"])
    answer = final_answer(reply[1]) if reply else None
    if reply is None or not reply[0] or answer is None:
        return Skipped("no_thinking")
    problem = to_problem(
        {"problem": _without_marks(row["problem"]), "answer": answer, "image": row["image"]}
    )
    return _with_solution(problem, reply[0])


def _without_marks(text: str) -> str:
    """One image before the text is where images stand without a mark."""
    return text.replace("<image>", "").strip()


def _numina(row: Mapping[str, Any], sources: tuple[str, ...]) -> Problem | Skipped:
    """AI-MO/NuminaMath-1.5: problem, solution, answer, question_type, validity marks, source."""
    if row["source"] not in sources or row["synthetic"]:
        return Skipped("other_source")
    if row["problem_is_valid"] != "Yes" or row["solution_is_valid"] != "Yes":
        return Skipped("not_valid")
    if row["question_type"] == "proof" or _no_answer(row["answer"]):
        return Skipped("no_answer")
    fields = {name: row[name] for name in ("problem", "answer")}
    problem = to_problem({**fields, "subject": row["problem_type"]})
    problem = dataclasses.replace(problem, meta={"source": row["source"]})
    return _with_solution(problem, row["solution"]) if row["solution"] else problem


def _metamath(row: Mapping[str, Any]) -> Problem | Skipped:
    """meta-math/MetaMathQA: query, response ending "The answer is: …", type. GSM8K's elementary ones are dropped."""
    if not row["type"].startswith("MATH"):
        return Skipped("elementary")
    reasoning, said, answer = row["response"].rpartition("The answer is:")
    answer = answer.strip()
    if not said or not answer:
        return Skipped("no_answer")
    reasoning = re.sub(r"\n?####.*\Z", "", reasoning.strip(), flags=re.DOTALL)
    problem = to_problem({"problem": row["query"], "answer": answer})
    problem = dataclasses.replace(problem, meta={"source": "MATH"})
    return _with_solution(problem, reasoning or row["response"])


def _olympiadbench(row: Mapping[str, Any]) -> Problem | Skipped:
    """Hothan/OlympiadBench: question, context, final_answer (a list), subfield."""
    answers = row["final_answer"]
    answers = [answers] if isinstance(answers, str) else list(answers or ())
    if not answers:
        return Skipped("no_answer")
    context = row.get("context")
    problem = f"{context}\n\n{row['question']}" if context else row["question"]
    return to_problem(
        {"problem": problem, "answer": ", ".join(answers), "subject": row["subfield"]}
    )


def _plain(row: Mapping[str, Any], **mapping: str | None) -> Problem:
    """A row whose fields are ours, or are renamed by `mapping`."""
    return to_problem(row, mapping={"id": None, "source": None, "licence": None, **mapping})


def _no_answer(answer: Any) -> bool:
    return str(answer or "").strip().lower() in NOT_AN_ANSWER


def _hendrycks(split: str) -> PublicSet:
    rows = tuple(f"EleutherAI/hendrycks_math:{config}:{split}" for config in MATH_CONFIGS)
    return PublicSet(rows, "MIT", _math)


NUMINA_ROWS = ("AI-MO/NuminaMath-1.5::train",)
CONVERTERS = {
    # text with reasoning: SFT
    "openr1_math": PublicSet(("open-r1/OpenR1-Math-220k:default:train",), "Apache-2.0", _openr1),
    # images with reasoning: SFT
    "r1_onevision": PublicSet(("Fancy-MLLM/R1-Onevision::train",), "Apache-2.0", _r1_onevision),
    "multimodal_open_r1": PublicSet(
        ("lmms-lab/multimodal-open-r1-8k-verified::train",), "not stated", _multimodal_open_r1
    ),
    # checked answers: GRPO
    "math_train": _hendrycks("train"),
    "geometry3k": PublicSet(("hiyouga/geometry3k::train",), "MIT", _geometry3k),
    # self-evolution
    "numina_competition": PublicSet(
        NUMINA_ROWS, "Apache-2.0", functools.partial(_numina, sources=NUMINA_COMPETITION)
    ),
    "numina_amc_aime": PublicSet(
        NUMINA_ROWS, "Apache-2.0", functools.partial(_numina, sources=("amc_aime",))
    ),
    "metamath": PublicSet(("meta-math/MetaMathQA::train",), "MIT", _metamath),
}

BENCHMARKS = {
    "math500": PublicSet(("HuggingFaceH4/MATH-500::test",), "MIT", _plain),
    "math": _hendrycks("test"),
    "aime2024": PublicSet(("HuggingFaceH4/aime_2024::train",), "not stated", _plain),
    "amc23": PublicSet(("math-ai/amc23::test",), "not stated", _plain),
    "olympiadbench": PublicSet(
        ("Hothan/OlympiadBench:OE_TO_maths_en_COMP:train",), "Apache-2.0", _olympiadbench
    ),
    "college_math": PublicSet(("di-zhang-fdu/College_Math_Test::test",), "not stated", _plain),
    "gsm8k": PublicSet(("openai/gsm8k:main:test",), "MIT", _plain),
    "gaokao2023en": PublicSet(("MARIO-Math-Reasoning/Gaokao2023-Math-En::train",), "MIT", _plain),
    "math_vision": PublicSet(
        ("MathLLMs/MathVision::test",),
        "MIT",
        functools.partial(_plain, images="decoded_image"),
    ),
}
