"""Rewards: format, length and correctness into one number (Small-Math-R1, section 3.3), as pure functions of records.

The published formula is damaged in print and ambiguous; its source (TinyLLaVA-Video-R1, arXiv 2504.09641) uses r0, r1
and r2 as constants, and only that reading makes "format first" true. Three presets:

`paper` (default)   FR = r0 + ratio * r1 * curve(t); R = r2 + FR if right, -FR if wrong, -(r0 + r1 + r2) if the
                    format is broken, right or not.
`literal`           the printed formulas term by term: r0, r1, r2 are component scores, so a right answer without the
                    format still earns r2 + ratio * r1. For faithfulness studies; `value_table` warns.
`safe`              paper, but length counts only when right, and `gate_lengths` takes the length term out of groups
                    whose correctness is constant (there it would be the only signal, and teach length alone).

t is the number of tokens of the think span (`counted_text`: in `literal`, of the whole completion where there is no
span), L the target: curve(t) = min(1, t / L) (`linear`), or min(1, ln(1 + t) / ln(1 + L)) (`log`).
"""

import dataclasses
import difflib
import functools
import importlib
import math
import numbers
import re
from collections.abc import Callable, Sequence
from typing import Any

from smallmath_jax.records import Problem

PRESETS = ("paper", "literal", "safe")
CURVES = ("linear", "log")
TRUNCATED = ("mask", "broken", "score")
VERDICTS = ("correct", "wrong", "no_answer", "unparsable_gold", "timeout")
MASKED_VERDICTS = ("unparsable_gold", "timeout")  # say nothing about the answer (law 7)

_TAGS = re.compile(r"<\s*/?\s*(?:think|answer)\s*>", re.IGNORECASE)
_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class RewardSettings:
    """What the reward pays. r0, r1, r2 are the full values of format, length and correctness."""

    preset: str = "paper"  # paper | literal | safe
    r0: float = 1.0
    r1: float = 1.0
    r2: float = 1.0
    ratio: float = 0.5  # weight of the length term
    target: int = 512  # L: think tokens at which the length term is full
    curve: str = "linear"  # linear | log
    truncated: str = (
        "mask"  # a completion cut at the token limit: mask | broken | score (as it stands)
    )
    function: str = ""  # "module:function" replaces the preset (see `load_reward`)

    def __post_init__(self) -> None:
        _known("reward preset", self.preset, PRESETS)
        _known("reward curve", self.curve, CURVES)
        _known("reward truncated", self.truncated, TRUNCATED)
        if min(self.r0, self.r1, self.r2, self.ratio) < 0 or self.target < 1:
            raise ValueError(
                f"reward settings {self}: r0, r1, r2 and ratio must be >= 0 and target >= 1"
            )


@dataclasses.dataclass(frozen=True)
class Parsed:
    """A completion read by the strict grammar. `think` and `answer` are "" where the grammar is broken."""

    well_formed: bool
    think: str = ""
    answer: str = ""
    reason: str = ""  # why it is broken, in words


@dataclasses.dataclass(frozen=True)
class RewardParts:
    """A reward and what it is made of. `format`, `length`, `correct` are what each component is worth here (>= 0)."""

    total: float
    format: float
    length: float
    correct: float
    masked: bool = False  # leaves numerator, denominator and group mean

    def as_dict(self) -> dict[str, float]:
        """The parts as plain numbers, for logs."""
        return {name: float(value) for name, value in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class RewardCase:
    """All a reward function may look at: the one argument of a user's function (see `load_reward`)."""

    problem: Problem | None
    text: str  # the completion, without the prompt
    parsed: Parsed
    verdict: str  # correct | wrong | no_answer | unparsable_gold | timeout
    think_tokens: int
    stop_reason: str  # eos | stop | length
    settings: RewardSettings


def from_config(config: Any) -> RewardSettings:
    """Settings of a config's `reward` table (its `target_length` is `target`); an unknown field is named."""
    values = dict(config)
    values["target"] = values.pop("target_length", values.get("target", RewardSettings.target))
    for name in values:
        _known("reward field", name, [field.name for field in dataclasses.fields(RewardSettings)])
    settings = RewardSettings(**values)
    if settings.function:
        load_reward(settings.function)
    return settings


def parse_think_answer(text: str, prefix: str = "") -> Parsed:
    """Reads prefix + text as exactly <think>..</think><answer>..</answer>, white space around the blocks allowed.

    `prefix` is what was put after the generation prompt, e.g. a forced "<think>". Any further tag, in any letter case
    or spacing, text outside the blocks, or a blank answer breaks the format.
    """
    full = prefix + text
    found = list(_TAGS.finditer(full))
    tags = [match.group() for match in found]
    if tags != ["<think>", "</think>", "<answer>", "</answer>"]:
        return Parsed(False, reason=f"tags are {' '.join(tags[:8]) or 'missing'}")
    think_open, think_close, answer_open, answer_close = found
    outside = (
        full[: think_open.start()]
        + full[think_close.end() : answer_open.start()]
        + full[answer_close.end() :]
    )
    if outside.strip():
        return Parsed(False, reason=f"text outside the blocks: {outside.strip()[:40]!r}")
    answer = full[answer_open.end() : answer_close.start()].strip()
    if not answer:
        return Parsed(False, reason="the answer block is blank")
    return Parsed(True, full[think_open.end() : think_close.start()], answer)


def counted_text(parsed: Parsed, text: str, prefix: str, settings: RewardSettings) -> str:
    """The text whose tokens the length term counts: the think span of a well-formed completion.

    `literal` pays length without the format too: there a broken text counts by its first think span, else whole.
    """
    if parsed.well_formed or settings.preset != "literal":
        return parsed.think
    found = _THINK.search(prefix + text)
    return found[1] if found else text


def length_score(think_tokens: int, settings: RewardSettings) -> float:
    """curve(t) in [0, 1] of the number of think tokens."""
    if settings.curve == "log":
        return min(1.0, math.log1p(think_tokens) / math.log1p(settings.target))
    return min(1.0, think_tokens / settings.target)


def reward(
    parsed: Parsed,
    think_tokens: int,
    verdict: str,
    stop_reason: str,
    settings: RewardSettings,
    *,
    problem: Problem | None = None,
    text: str = "",
) -> RewardParts:
    """The reward of one completion: the preset's, or what `settings.function` says.

    `problem` and `text` are read by users' functions only. Raises ValueError for an unknown verdict or stop reason.
    """
    _known("verdict", verdict, VERDICTS)
    _known("stop reason", stop_reason, ("eos", "stop", "length"))
    case = RewardCase(problem, text, parsed, verdict, think_tokens, stop_reason, settings)
    parts = load_reward(settings.function)(case) if settings.function else _preset_reward(case)
    cut = stop_reason == "length" and settings.truncated == "mask"
    return dataclasses.replace(parts, masked=parts.masked or cut or verdict in MASKED_VERDICTS)


def _preset_reward(case: RewardCase) -> RewardParts:
    settings, right = case.settings, case.verdict == "correct"
    cut = case.stop_reason == "length" and settings.truncated == "broken"
    well_formed = case.parsed.well_formed and not cut
    if not well_formed and settings.preset != "literal":
        return RewardParts(-(settings.r0 + settings.r1 + settings.r2), 0.0, 0.0, 0.0)
    length = settings.ratio * settings.r1 * length_score(case.think_tokens, settings)
    if settings.preset == "safe" and not right:
        length = 0.0
    formatted = settings.r0 if well_formed else 0.0
    correct = settings.r2 if right else 0.0
    return RewardParts(_combine(formatted, length, correct), formatted, length, correct)


def _combine(formatted: float, length: float, correct: float) -> float:
    """R of the first two printed cases; the third, with FR = 0, is what is left: -(r0 + r1 + r2) of the components."""
    ratio_score = formatted + length
    if ratio_score <= 0:
        return -correct if correct else 0.0
    return correct + ratio_score if correct else -ratio_score


def gate_lengths(group: Sequence[RewardParts], settings: RewardSettings) -> list[RewardParts]:
    """The rewards of one prompt's group, gated. Only `safe` changes anything.

    Where `is_gated`, each well-formed, unmasked sample's length term becomes their mean: format still teaches there
    and length does not. Broken and masked samples stay as they are.
    """
    if not is_gated(group, settings):
        return list(group)
    told = _told(group)
    mean = sum(parts.length for parts in told) / len(told)
    return [
        dataclasses.replace(parts, length=mean, total=_combine(parts.format, mean, parts.correct))
        if parts.format > 0 and not parts.masked
        else parts
        for parts in group
    ]


def is_gated(group: Sequence[RewardParts], settings: RewardSettings) -> bool:
    """Whether `safe` replaces a group's length terms: its well-formed, unmasked samples are all right or all wrong."""
    told = _told(group)
    return settings.preset == "safe" and len({parts.correct > 0 for parts in told}) == 1


def _told(group: Sequence[RewardParts]) -> list[RewardParts]:
    return [parts for parts in group if parts.format > 0 and not parts.masked]


def value_table(settings: RewardSettings) -> str:
    """The format x correct x length table of what is paid, and a WARNING line for each ordering that does not hold."""
    lengths = (0, settings.target // 2, settings.target)
    rows = [f"reward preset {settings.preset}, curve {settings.curve}, target {settings.target}"]
    rows.append(f"{'format':<8}{'answer':<8}" + "".join(f"{f't={t}':>10}" for t in lengths))
    values = _table_values(settings, lengths)
    for (formatted, right), paid in values.items():
        name = f"{'kept' if formatted else 'broken':<8}{'right' if right else 'wrong':<8}"
        rows.append(name + "".join(f"{value:>10.3f}" for value in paid))
    rows += [f"WARNING: {line}" for line in _broken_orderings(values)]
    return "\n".join(rows)


def rehearse(settings: RewardSettings, problem: Problem) -> str:
    """What a user's function pays on one real problem, as a line to show; found wrong here, it costs no device time.

    Raises ValueError with what the function raised.
    """
    paid = []
    for answer, verdict in ((problem.answer, "correct"), (problem.answer + "0", "wrong")):
        text = f"<think>so</think><answer>{answer}</answer>"
        case = parse_think_answer(text), 1, verdict, "eos", settings
        try:
            paid.append(reward(*case, problem=problem, text=text).total)
        except Exception as error:  # the user's code: whatever it raises is told
            raise ValueError(
                f"reward function {settings.function!r} fails on problem {problem.id!r}: "
                f"{type(error).__name__}: {error}; it is given one RewardCase with the fields "
                + ", ".join(field.name for field in dataclasses.fields(RewardCase))
            ) from error
    name = settings.function
    return f"reward function {name}: {paid[0]:g} for a right answer in the grammar, {paid[1]:g} for a wrong one"


def _table_values(
    settings: RewardSettings, lengths: Sequence[int]
) -> dict[tuple[bool, bool], list[float]]:
    return {
        (formatted, right): [
            reward(Parsed(formatted), t, "correct" if right else "wrong", "eos", settings).total
            for t in lengths
        ]
        for formatted in (True, False)
        for right in (True, False)
    }


def _broken_orderings(values: dict[tuple[bool, bool], list[float]]) -> list[str]:
    """The declared orderings that a table breaks: right beats wrong, format beats none, longer never pays less."""
    lines = []
    if min(values[True, True]) <= max(values[True, False]):
        lines.append("with the format kept, a right answer does not always beat a wrong one")
    for right, word in ((True, "right"), (False, "wrong")):
        if min(values[True, right]) < max(values[False, right]):
            lines.append(f"a {word} answer can be paid more without the format than with it")
    if values[True, True] != sorted(values[True, True]):
        lines.append("longer thinking pays less although the answer is right")
    return lines


@functools.lru_cache(maxsize=32)
def load_reward(name: str) -> Callable[[RewardCase], RewardParts]:
    """A user's own reward, "package.module:function".

    The function takes one `RewardCase` and returns a number, None (the sample is masked) or a `RewardParts`.
    Raises ValueError if the name leads nowhere; the result raises TypeError if the function returns anything else,
    and ValueError for a number that is not finite.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"reward function {name!r} cannot be loaded ({error}); give it as package.module:function, "
            "importable from where you start run.py"
        ) from error
    return lambda case: _as_parts(function(case), name, case.problem)


def _as_parts(value: Any, name: str, problem: Problem | None) -> RewardParts:
    """numpy's numbers are numbers; what is not finite would make every weight of the batch NaN."""
    if value is None:
        return RewardParts(0.0, 0.0, 0.0, 0.0, masked=True)
    parts = value
    if isinstance(value, numbers.Real):
        parts = RewardParts(float(value), 0.0, 0.0, 0.0)
    on = f" on problem {problem.id!r}" if problem is not None else ""
    told = f"reward {name!r} returned {value!r}{on}; return "
    if not isinstance(parts, RewardParts):
        raise TypeError(told + "a finite number, None to mask the sample, or RewardParts")
    if not all(math.isfinite(part) for part in parts.as_dict().values()):
        raise ValueError(told + "finite numbers, or None to mask the sample")
    return parts


def _known(what: str, value: str, names: Sequence[str]) -> None:
    if value in names:
        return
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown {what} {value!r}; {hint}known: {', '.join(names)}")
