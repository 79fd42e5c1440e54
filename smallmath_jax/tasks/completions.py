"""A sampled answer as a line of completions/*.jsonl, its pictures as links."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image

from smallmath_jax.records import Completion, Problem, Prompt
from smallmath_jax.rollout.engine import Rollout

IN_SAMPLE_0 = "in sample 0"  # in place of an encoded picture


def completion_row(
    problem: Problem,
    prompt: Prompt,
    rollout: Rollout,
    sample: int,
    text: str,
    graded: Any,
    step: int,
    rewards: dict[str, float] | None = None,
    extra: dict[str, Any] | None = None,
) -> Completion:
    """A line of completions/*.jsonl: all that is needed to see, re-grade or re-weigh the sample."""
    several = {"accepted": problem.accepted} if len(problem.accepted) > 1 else {}
    return Completion(
        problem_id=problem.id,
        sample=sample,
        prompt=prompt.text,
        text=prompt.prefix + text,
        token_ids=[int(token) for token in rollout.token_ids],
        logprobs=[round(float(value), 5) for value in rollout.log_probs],
        stop_reason=rollout.stop_reason,
        answer=graded.extracted,
        gold=problem.answer,
        verdict=graded.verdict,
        rewards=rewards or {},
        policy_version=rollout.version,
        step=step,
        level=problem.level,
        subject=problem.subject,
        template=problem.template,
        images=image_links(problem.images, sample),
        extra=(extra or {}) | several,
    )


def image_links(images: Sequence[str | bytes], sample: int) -> tuple[str, ...]:
    """A row's pictures. An encoded one is written once a group, into sample 0; the others say that it lies there."""
    links = (image_link(image) for image in images)
    return tuple(IN_SAMPLE_0 if sample and link.startswith("data:") else link for link in links)


def image_link(image: str | bytes) -> str:
    """A picture's path, or the data: URL of an encoded one."""
    if not isinstance(image, bytes):
        return str(image)
    with Image.open(io.BytesIO(image)) as opened:
        kind = Image.MIME.get(opened.format, "application/octet-stream")
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"
