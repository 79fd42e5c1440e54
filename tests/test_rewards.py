"""Rewards: the printed formulas by hand, the strict grammar against known tricks, gating, users' own functions."""

import dataclasses
import math
import sys
import types

import numpy as np
import pytest

from smallmath_jax.records import Problem
from smallmath_jax.verify import rewards
from smallmath_jax.verify.answers import compare
from smallmath_jax.verify.rewards import Parsed, RewardParts, RewardSettings, parse_think_answer

PAPER, LITERAL, SAFE = (RewardSettings(preset=name) for name in rewards.PRESETS)
GOOD = Parsed(True, "x", "5")
BAD = Parsed(False)


def total(parsed, tokens, verdict, settings, stop="eos"):
    return rewards.reward(parsed, tokens, verdict, stop, settings).total


@pytest.mark.parametrize("tokens, share", [(0, 0.0), (128, 0.25), (512, 1.0), (2048, 1.0)])
def test_the_paper_preset_by_hand(tokens, share):
    """R = r2 + FR, -FR or -(r0 + r1 + r2), with FR = r0 + ratio r1 min(1, t / L) and 1, 1, 1, 0.5, 512."""
    assert total(GOOD, tokens, "correct", PAPER) == pytest.approx(2 + 0.5 * share)
    assert total(GOOD, tokens, "wrong", PAPER) == pytest.approx(-1 - 0.5 * share)
    assert total(GOOD, tokens, "no_answer", PAPER) == pytest.approx(-1 - 0.5 * share)
    assert total(BAD, tokens, "correct", PAPER) == total(BAD, tokens, "wrong", PAPER) == -3


def test_constants_other_than_one():
    settings = RewardSettings(
        r0=0.5, r1=0.5, r2=1.0, ratio=1.0, target=1200
    )  # TinyLLaVA-Video-R1's
    assert total(GOOD, 1200, "correct", settings) == pytest.approx(2.0)
    assert total(GOOD, 600, "wrong", settings) == pytest.approx(-0.75)
    assert total(BAD, 600, "correct", settings) == pytest.approx(-2.0)


def test_the_literal_preset_term_by_term():
    """FR = r0 + ratio r1 is additive there: without the format r0 is 0 and FR > 0 as soon as there is a token."""
    assert total(GOOD, 512, "correct", LITERAL) == pytest.approx(2.5)
    assert total(BAD, 512, "correct", LITERAL) == pytest.approx(1.5)
    assert total(BAD, 512, "wrong", LITERAL) == pytest.approx(-0.5)
    assert total(BAD, 0, "wrong", LITERAL) == 0
    assert total(BAD, 0, "correct", LITERAL) == -1  # the third printed case


def test_literal_counts_a_broken_texts_tokens_as_its_table_says():
    """Length is paid without the format there, so its tokens are counted there: the think span's, else all."""
    spans = {"<think>a b</think> 5": "a b", "a b c": "a b c", "<think>a b": "<think>a b"}
    for text, counted in spans.items():
        parsed = parse_think_answer(text)
        assert rewards.counted_text(parsed, text, "", LITERAL) == counted
        assert rewards.counted_text(parsed, text, "", PAPER) == ""
    assert rewards.counted_text(BAD, "a b</think> 5", "<think>", LITERAL) == "a b"
    for settings in (PAPER, LITERAL, SAFE):
        assert rewards.counted_text(GOOD, "whatever", "", settings) == "x"


def test_the_safe_preset_pays_length_only_when_right():
    assert total(GOOD, 512, "correct", SAFE) == pytest.approx(2.5)
    assert total(GOOD, 512, "wrong", SAFE) == total(GOOD, 0, "wrong", SAFE) == -1
    assert total(BAD, 512, "correct", SAFE) == -3


def test_the_log_curve_reaches_one_at_the_target():
    settings = RewardSettings(curve="log")
    for tokens in (0, 4, 64, 512, 4096):
        expected = min(1.0, math.log(1 + tokens) / math.log(513))
        assert rewards.length_score(tokens, settings) == pytest.approx(expected)
    assert rewards.length_score(512, settings) == 1.0


@pytest.mark.parametrize(
    "truncated, masked, value", [("mask", True, 2), ("broken", False, -3), ("score", False, 2)]
)
def test_completions_cut_at_the_limit(truncated, masked, value):
    settings = RewardSettings(truncated=truncated)
    parts = rewards.reward(GOOD, 0, "correct", "length", settings)
    assert (parts.masked, parts.total) == (masked, value)
    assert not rewards.reward(GOOD, 0, "correct", "eos", settings).masked


@pytest.mark.parametrize("verdict", ["timeout", "unparsable_gold"])
@pytest.mark.parametrize("preset", rewards.PRESETS)
def test_verdicts_that_say_nothing_are_masked(verdict, preset):
    assert rewards.reward(GOOD, 5, verdict, "eos", RewardSettings(preset=preset)).masked
    assert rewards.reward(BAD, 5, verdict, "eos", RewardSettings(preset=preset)).masked


WELL_FORMED = [
    ("<think>a</think><answer>5</answer>", ""),
    (" <think>\na\n</think>\n\n<answer> 5 </answer>\n", ""),
    ("<think></think><answer>5</answer>", ""),
    ("a</think><answer>5</answer>", "<think>"),
    ("\na < b and b > c</think><answer>x < 5</answer>", "<think>\n"),
    ("5</answer>", "<think>a</think><answer>"),
]


@pytest.mark.parametrize("text, prefix", WELL_FORMED)
def test_the_grammar(text, prefix):
    parsed = parse_think_answer(text, prefix)
    assert parsed.well_formed and parsed.answer in ("5", "x < 5") and "<" not in parsed.think[:1]


# Tricks that other graders are known to pay for, and plain slips.
TRICKS = {
    "two answers": "<think>a</think><answer>4</answer><answer>5</answer>",
    "two answers, right one first": "<think>a</think><answer>5</answer><answer>4</answer>",
    "two thinks": "<think>a</think><think>b</think><answer>5</answer>",
    "two closing thinks": "<think>a</think>b</think><answer>5</answer>",
    "text after": "<think>a</think><answer>5</answer> which is right",
    "text after, on its own line": "<think>a</think><answer>5</answer>\nDone.",
    "text before": "Sure! <think>a</think><answer>5</answer>",
    "text between": "<think>a</think> so <answer>5</answer>",
    "empty answer": "<think>a</think><answer></answer>",
    "blank answer": "<think>a</think><answer> \n </answer>",
    "no think": "<answer>5</answer>",
    "no answer": "<think>a</think>5",
    "answer first": "<answer>5</answer><think>a</think>",
    "nested": "<think><answer>5</answer></think>",
    "answer nested in answer": "<think>a</think><answer><answer>5</answer></answer>",
    "think in answer": "<think>a</think><answer><think>5</think></answer>",
    "unclosed answer": "<think>a</think><answer>5",
    "unclosed think": "<think>a<answer>5</answer>",
    "upper case": "<THINK>a</THINK><ANSWER>5</ANSWER>",
    "a further tag in another case": "<think>a</think><answer>5</Answer></answer>",
    "a further tag with spaces": "<think>a< /think ></think><answer>5</answer>",
    "boxed inside think": r"<think>\boxed{5}</think>",
    "nothing": "",
    "only tags": "<think></think><answer></answer>",
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_break_the_format_and_earn_nothing(name):
    parsed = parse_think_answer(TRICKS[name])
    assert not parsed.well_formed and parsed.reason
    for preset in ("paper", "safe"):
        assert total(parsed, 512, "correct", RewardSettings(preset=preset)) == -3


def test_a_forced_prefix_written_again_breaks_the_format():
    assert not parse_think_answer("<think>a</think><answer>5</answer>", "<think>").well_formed


ANSWERS_THAT_HEDGE = ["1, 2, 3, 4, 5, 6", "4 or 5", "5 or not 5", "all of the above", "A, B, C, D, E", "x",
                      "any number", "What is 2 + 3?", "5 6", r"\boxed{4} \boxed{5} 6", "[0, 10]", "{4, 5}"]  # fmt: skip


@pytest.mark.parametrize("answer", ANSWERS_THAT_HEDGE)
def test_hedged_answers_in_perfect_format_are_wrong(answer):
    assert parse_think_answer(f"<think>a</think><answer>{answer}</answer>").well_formed
    assert compare("5", answer) != "correct" and compare("B", answer) != "correct"


def parts_of(settings, *cases):
    return [
        rewards.reward(parsed, tokens, verdict, "eos", settings)
        for parsed, tokens, verdict in cases
    ]


def test_gating_takes_length_out_of_groups_of_one_correctness():
    right = parts_of(SAFE, (GOOD, 0, "correct"), (GOOD, 512, "correct"), (BAD, 512, "correct"))
    gated = rewards.gate_lengths(right, SAFE)
    assert [parts.total for parts in gated] == pytest.approx([2.25, 2.25, -3])
    mixed = parts_of(SAFE, (GOOD, 0, "correct"), (GOOD, 512, "correct"), (GOOD, 512, "wrong"))
    assert rewards.gate_lengths(mixed, SAFE) == mixed
    wrong = parts_of(SAFE, (GOOD, 0, "wrong"), (GOOD, 512, "wrong"), (BAD, 9, "wrong"))
    assert [parts.total for parts in rewards.gate_lengths(wrong, SAFE)] == [-1, -1, -3]


def test_which_groups_are_gated():
    right, other = (GOOD, 0, "correct"), (GOOD, 512, "correct")
    wrong, broken, timeout = (GOOD, 9, "wrong"), (BAD, 9, "wrong"), (GOOD, 9, "timeout")
    gated = lambda settings, *samples: rewards.is_gated(parts_of(settings, *samples), settings)
    assert gated(SAFE, right, other) and gated(SAFE, wrong, wrong)
    assert gated(SAFE, right, broken, timeout)  # what is broken or masked has no say
    assert not gated(SAFE, right, wrong) and not gated(SAFE, broken, timeout) and not gated(SAFE)
    assert not gated(PAPER, right, other) and not gated(LITERAL, right, other)


def test_gating_passes_over_masked_samples_and_other_presets():
    group = parts_of(SAFE, (GOOD, 0, "correct"), (GOOD, 512, "correct"), (GOOD, 64, "timeout"))
    gated = rewards.gate_lengths(group, SAFE)
    assert gated[2] == group[2] and gated[0].total == pytest.approx(2.25)
    for settings in (PAPER, LITERAL):
        group = parts_of(settings, (GOOD, 0, "correct"), (GOOD, 512, "correct"))
        assert rewards.gate_lengths(group, settings) == group
    assert rewards.gate_lengths([], SAFE) == []
    assert rewards.gate_lengths(parts_of(SAFE, (BAD, 1, "wrong")), SAFE)[0].total == -3


def test_the_table_shows_what_is_paid_and_warns_of_literal():
    for settings in (PAPER, SAFE):
        table = rewards.value_table(settings)
        assert "2.500" in table and "-3.000" in table and "WARNING" not in table
    assert "WARNING" in rewards.value_table(LITERAL)
    assert "longer" not in rewards.value_table(LITERAL)
    assert "WARNING" in rewards.value_table(RewardSettings(r2=0.0))  # being right is not paid


def test_settings_of_a_config_and_their_mistakes():
    config = {"preset": "safe", "target_length": 64, "curve": "log", "ratio": 0.25}
    assert rewards.from_config(config) == RewardSettings("safe", target=64, curve="log", ratio=0.25)
    with pytest.raises(ValueError, match="did you mean 'paper'"):
        RewardSettings(preset="papre")
    with pytest.raises(ValueError, match="did you mean 'ratio'"):
        rewards.from_config({"ration": 1})
    with pytest.raises(ValueError, match="target >= 1"):
        RewardSettings(target=0)
    with pytest.raises(ValueError, match="unknown verdict 'right'"):
        rewards.reward(GOOD, 1, "right", "eos", PAPER)
    with pytest.raises(ValueError, match="unknown stop reason"):
        rewards.reward(GOOD, 1, "correct", "eof", PAPER)


@pytest.fixture
def own_rewards(monkeypatch):
    module = types.ModuleType("own_rewards_for_this_test")
    module.brevity = lambda case: -float(len(case.text)) + (case.verdict == "correct")
    module.by_level = lambda case: None if case.problem is None else float(case.problem.level)
    module.parts = lambda case: RewardParts(9.0, 1.0, 1.0, 7.0)
    module.words = lambda case: "good"
    module.infinite = lambda case: math.inf
    module.nan_parts = lambda case: RewardParts(math.nan, 1.0, 1.0, 1.0)
    module.float32 = lambda case: np.float32(0.5)
    module.int64 = lambda case: np.int64(-2)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module.__name__
    rewards.load_reward.cache_clear()


def test_a_users_reward_function(own_rewards):
    brevity = RewardSettings(function=f"{own_rewards}:brevity")
    parts = rewards.reward(GOOD, 3, "correct", "eos", brevity, text="abcd")
    assert (parts.total, parts.masked) == (-3.0, False)
    assert rewards.reward(GOOD, 3, "timeout", "eos", brevity).masked  # law 7 holds for all rewards
    by_level = RewardSettings(function=f"{own_rewards}:by_level")
    problem = Problem("p", "What?", "5", level=4)
    assert rewards.reward(GOOD, 3, "wrong", "eos", by_level, problem=problem).total == 4.0
    assert rewards.reward(GOOD, 3, "wrong", "eos", by_level).masked
    whole = rewards.reward(GOOD, 3, "wrong", "eos", RewardSettings(function=f"{own_rewards}:parts"))
    assert dataclasses.astuple(whole)[:4] == (9.0, 1.0, 1.0, 7.0)


@pytest.mark.parametrize("function", ["words", "infinite", "nan_parts"])
def test_a_users_reward_that_is_no_number_names_function_and_problem(own_rewards, function):
    settings = RewardSettings(function=f"{own_rewards}:{function}")
    with pytest.raises((TypeError, ValueError), match=f"{function}.*on problem 'p7'"):
        rewards.reward(GOOD, 3, "wrong", "eos", settings, problem=Problem("p7", "2 + 3?", "5"))


@pytest.mark.parametrize("function, value", [("float32", 0.5), ("int64", -2.0)])
def test_a_users_reward_may_be_a_number_of_numpys(own_rewards, function, value):
    assert total(GOOD, 3, "wrong", RewardSettings(function=f"{own_rewards}:{function}")) == value


@pytest.mark.parametrize("name", ["nowhere:f", "math:nothing", "math", "safe"])
def test_a_reward_function_that_is_not_there_is_named_before_training(name):
    with pytest.raises(ValueError, match="package.module:function"):
        rewards.from_config({"function": name})


def test_parts_go_to_the_log_as_numbers():
    parts = rewards.reward(GOOD, 256, "correct", "eos", PAPER)
    assert parts.as_dict() == {
        "total": 2.25,
        "format": 1.0,
        "length": 0.25,
        "correct": 1.0,
        "masked": 0.0,
    }


def test_a_users_function_is_tried_on_a_real_problem_first(monkeypatch):
    module = types.ModuleType("their_rewards")
    module.exact = lambda case: float(f">{case.problem.answer}<" in case.text)
    module.broken = lambda case: case.no_such_field
    monkeypatch.setitem(sys.modules, "their_rewards", module)
    problem = Problem("p1", "2 + 2?", "4")
    told = rewards.rehearse(RewardSettings(function="their_rewards:exact"), problem)
    assert told.endswith("1 for a right answer in the grammar, 0 for a wrong one")
    with pytest.raises(ValueError, match=r"(?s)their_rewards:broken.*'p1'.*no_such_field.*verdict"):
        rewards.rehearse(RewardSettings(function="their_rewards:broken"), problem)
