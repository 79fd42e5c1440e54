"""The reward both sides pay: 1 for a right answer in the grammar, 0.1 for the grammar alone, else 0."""

import re

GRAMMAR = re.compile(
    r"\s*<think>((?:(?!</?think>).)*)</think>\s*<answer>((?:(?!</?answer>).)*)</answer>\s*", re.S
)
SETTINGS = {
    "steps": 40,
    "prompts": 16,
    "group_size": 8,
    "max_tokens": 64,
    "learning_rate": 1e-4,
    "epsilon": 0.2,
    "clip_norm": 1.0,
}


def score(text: str, gold: str) -> float:
    """The reward of a completion without its end token."""
    match = GRAMMAR.fullmatch(text)
    if not match:
        return 0.0
    return 1.1 if match.group(2).strip() == gold.strip() else 0.1


def for_ours(case) -> float:
    """smallmath_jax's form of a user's reward: --config.reward.function=reward:for_ours."""
    return score(case.text, case.problem.answer)
