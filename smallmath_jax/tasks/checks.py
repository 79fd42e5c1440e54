"""Settings that cannot work are refused when a run starts, before anything is loaded or computed."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smallmath_jax.data.prompts import GRAMMARS
from smallmath_jax.models.text import REMAT
from smallmath_jax.search.pairs import PairSettings
from smallmath_jax.search.select import LOSSES, SFT_VARIANTS
from smallmath_jax.search.settings import SearchSettings
from smallmath_jax.train.advantages import DENOMINATORS, SCALES
from smallmath_jax.train.optim import OPTIMIZERS, SCHEDULES
from smallmath_jax.verify import rewards
from smallmath_jax.verify.sandbox.protocol import SandboxSettings

STAGES = ("sft", "grpo", "ppm", "bootstrap")
# Sections that hold the fields of a record, which says itself what they may be
RECORDS: Mapping[str, Callable[..., Any]] = {
    "search": SearchSettings,
    "eval.search": SearchSettings,
    "pairs": PairSettings,
    "sandbox": SandboxSettings,
}
OPTIMIZER_FIELDS = {"name": tuple(OPTIMIZERS), "schedule": SCHEDULES}
CHOICES: Mapping[str, Sequence[str]] = {
    "compute_dtype": ("float32", "bfloat16", "float16"),
    "remat": tuple(REMAT),
    "prompt.grammar": (*GRAMMARS, "auto"),
    "grpo.denominator": DENOMINATORS,
    "grpo.advantage_scale": SCALES,
    "reward.preset": rewards.PRESETS,
    "reward.curve": rewards.CURVES,
    "reward.truncated": rewards.TRUNCATED,
    "eval.headline": ("greedy", "sampled"),
    "eval.method": ("sample", "chains", "mcts", "beam"),
    "evolve.selection": tuple(SFT_VARIANTS),
    "ppm.loss": LOSSES,
    **{
        f"{stage}.optimizer.{field}": known
        for stage in STAGES
        for field, known in OPTIMIZER_FIELDS.items()
    },
}
AT_LEAST_ONE = (
    "log.every",
    "log.samples_every",
    "checkpoint.every",
    "checkpoint.keep",
    "prompt.max_tokens",
    "engine.slots",
    "engine.cache_length",
    "engine.prefill_chunk",
    "engine.decode_steps",
    "engine.tensor_parallel",
    "sft.rows",
    "sft.row_length",
    "sft.microbatch_rows",
    "bootstrap.rows",
    "bootstrap.row_length",
    "bootstrap.microbatch_rows",
    "ppm.pairs",
    "ppm.max_tokens",
    "ppm.row_length",
    "ppm.microbatch_rows",
    "evolve.rounds",
    "evolve.trajectories",
    "evolve.more_seeds",
    "searches",
    "grpo.prompts",
    "grpo.group_size",
    "grpo.updates",
    "grpo.inner_epochs",
    "grpo.row_length",
    "grpo.microbatch_rows",
    "grpo.sampling.max_tokens",
    "eval.sampling.max_tokens",
    "eval.searches",
    "eval.top_k",
    "eval.beam_width",
    "reward.target_length",
)
ABOVE_ZERO = tuple(
    f"{stage}.optimizer.{field}"
    for stage in STAGES
    for field in ("learning_rate", "muon_learning_rate")
)


def check(config: Any) -> None:
    """Raises ValueError naming the field, its value and what it may be: all that is wrong, in one message."""
    wrong = [
        *(_choice(name, get(config, name), known) for name, known in CHOICES.items()),
        *(_at_least(name, get(config, name), 1) for name in AT_LEAST_ONE),
        *(_positive(name, get(config, name)) for name in ABOVE_ZERO),
        *_lengths(config),
        _patches(config),
        *_updates(config),
        *_evaluation(config),
        *_search(config),
        *(_record(name, get(config, name), make) for name, make in RECORDS.items()),
    ]
    wrong = [line for line in wrong if line]
    if wrong:
        raise ValueError("\n".join(wrong))


def get(config: Any, name: str) -> Any:
    """The field with that dotted name; None where the config has no such field."""
    for part in name.split("."):
        if config is None or part not in config:
            return None
        config = config[part]
    return config


def _choice(name: str, value: Any, known: Sequence[str]) -> str:
    if value is None or value in known:
        return ""
    near = difflib.get_close_matches(str(value), known, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"config.{name} is {value!r}; {hint}known: {', '.join(known)}"


def _record(name: str, section: Any, make: Callable[..., Any]) -> str:
    if section is None:
        return ""
    try:
        make(**section.to_dict())
    except (TypeError, ValueError) as error:
        return f"config.{name}: {error}"
    return ""


def _at_least(name: str, value: Any, least: int) -> str:
    fine = value is None or value >= least
    return "" if fine else f"config.{name} is {value}; it must be at least {least}"


def _positive(name: str, value: Any) -> str:
    return "" if value is None or value > 0 else f"config.{name} is {value}; it must be above 0"


def _lengths(config: Any) -> list[str]:
    """A prompt and its completion must fit where they go."""
    lines = []
    prompt = get(config, "prompt.max_tokens") or 0
    places = {
        "grpo.sampling.max_tokens": ("engine.cache_length", "grpo.row_length"),
        "eval.sampling.max_tokens": ("engine.cache_length",),
    }
    for name, rooms in places.items():
        completion = get(config, name)
        for room in rooms if completion is not None else ():
            size = get(config, room)
            if size is not None and size < prompt + completion:
                lines.append(
                    f"config.{room} is {size}, shorter than prompt.max_tokens + {name} = {prompt} + {completion}; "
                    f"raise {room} or lower one of the two"
                )
    return lines


def _patches(config: Any) -> str:
    """A sampled prompt's pictures must fit a row; lessons that do not fit are left out and counted instead."""
    most, room = get(config, "vision.max_patches"), get(config, "grpo.row_patches")
    if most is None or room is None or most <= room:
        return ""
    return (
        f"config.grpo.row_patches is {room}, fewer than the patches of one prompt, vision.max_patches = {most}; "
        "raise grpo.row_patches or lower vision.max_patches"
    )


def _evaluation(config: Any) -> list[str]:
    """What an evaluation is asked to report must be among what it samples."""
    samples, greedy = get(config, "eval.samples"), get(config, "eval.greedy")
    if samples is None or greedy is None:
        return []
    lines = []
    asked = {"greedy": bool(greedy), "sampled": samples > 0}
    headline = get(config, "eval.headline")
    if headline in asked and not asked[headline]:
        lines.append(
            f"config.eval.headline is {headline!r}, and eval.greedy = {bool(greedy)}, eval.samples = {samples} ask for "
            "no such answers; change the headline or ask for them"
        )
    sizes = tuple(get(config, "eval.k") or ())
    if any(size < 1 or size > max(samples, 1) for size in sizes):
        lines.append(
            f"config.eval.k is {sizes}, and pass@k needs 1 <= k <= eval.samples = {samples}; raise eval.samples or "
            "lower k"
        )
    return lines


def _search(config: Any) -> list[str]:
    """Test-time search needs steps to search over and something to choose by; a search for training needs answers."""
    method, gold = get(config, "eval.method"), get(config, "search.use_gold")
    if get(config, "task") == "search":
        return _search_to_learn(config, gold)
    if method in (None, "sample"):
        return []
    lines = []
    if get(config, "prompt.grammar") != "code_steps":
        lines.append(
            f"config.eval.method={method!r} searches over code steps: set prompt.grammar=code_steps, or take a mode "
            "with -steps behind it (configs/evaluate.py:math7b-steps), which sets lengths too"
        )
    if gold:
        lines.append("config.search.use_gold is True: an evaluation must not see the gold answers")
    judge, guidance = get(config, "judge"), get(config, "search.guidance")
    if method != "chains" and guidance == "ppm" and not judge:
        lines.append(
            f"config.eval.method={method!r} with search.guidance='ppm' needs config.judge, the workdir of a run of "
            "configs/ppm.py"
            + (
                "; without one: search.guidance=terminal and search.choose=votes"
                * (method == "mcts")
            )
        )
    if method == "beam" and guidance != "ppm":
        lines.append(f"config.eval.method='beam' needs search.guidance='ppm', got {guidance!r}")
    if method == "mcts" and not judge and guidance != "ppm" and config.search.choose == "value":
        lines.append(
            "config.search.choose='value' needs config.judge: without a reward model all answers have the same value; "
            "set search.choose=votes"
        )
    return lines


def _search_to_learn(config: Any, gold: bool) -> list[str]:
    lines = []
    if not gold:
        lines.append(
            "config.search.use_gold is False: what this task searches is to be learnt from, and that takes graded "
            "answers; to measure, run configs/evaluate.py with eval.method=mcts"
        )
    guided = config.search.guidance == "ppm"
    if guided and not config.judge:
        lines.append(
            "config.search.guidance='ppm' needs config.judge, the workdir of a run of configs/ppm.py or "
            "configs/evolve.py"
        )
    if config.judge and not guided:
        lines.append(
            f"config.judge={config.judge!r} would judge nothing: config.search.guidance is "
            f"{config.search.guidance!r}; set search.guidance=ppm, or leave the judge out"
        )
    return lines


def _updates(config: Any) -> list[str]:
    updates, prompts = get(config, "grpo.updates"), get(config, "grpo.prompts")
    if updates is None or prompts is None or updates <= prompts:
        return []
    return [
        f"config.grpo.updates is {updates}, more than the {prompts} groups of a step (grpo.prompts)"
    ]
