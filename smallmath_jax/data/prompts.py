"""Prompts: the grammars completions follow, and a problem rendered as the model reads it.

A prompt is rendered to chat text, encoded, and its image tokens expanded here; positions are computed here too and
travel with it. Nothing is ever cut: a prompt that is too long is an error or is dropped whole and counted.
"""

import ast
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from smallmath_jax.data.tokens import (
    CHATS,
    Tokens,
    add_step_tokens,
    completion_ids,
    decode,
    encode_after,
    load_tokens,
)
from smallmath_jax.records import Problem, Prompt

__all__ = [
    "CHATS",
    "GRAMMARS",
    "Grammar",
    "Tokens",
    "add_step_tokens",
    "attach_pixels",
    "build_prompt",
    "build_prompts",
    "completion_ids",
    "decode",
    "encode_after",
    "format_completion",
    "load_tokens",
    "stop_sequences",
    "user_text",
]

IMAGE_MARK = "<image>"
EXIF_ORIENTATION = 0x0112
STEP_MARKS = (
    "<code>",
    "<end_of_step>",
    "<end_of_code>",
    "<output>",
    "<end_of_output>",
    "<answer>",
    "<end_of_answer>",
)


@dataclasses.dataclass(frozen=True)
class Grammar:
    """The form of a completion. `render(reasoning, answer)` writes a worked solution in it."""

    name: str
    system: str  # the system turn that asks for it ("": the chat template's default)
    instruction: str  # put behind the problem's text ("": nothing)
    marks: tuple[str, ...]  # tokens to add to the vocabulary
    stops: tuple[str, ...]  # marks that end a search step
    render: Callable[[str, str], str]


# The system turn that a tokenizer's own template writes although none was given (Qwen's do), behind a begin mark.
_SYSTEM_TURN = re.compile(
    r"\A((?:<s>|<\|begin_of_text\|>)?)"
    r"(?:<\|im_start\|>system\n.*?<\|im_end\|>\n|<\|system\|>\n.*?<\|end\|>\n"
    r"|<\|start_header_id\|>system<\|end_header_id\|>.*?<\|eot_id\|>)",
    re.DOTALL,
)
THINK_ANSWER = re.compile(
    r"\A\s*<think>(.*?)</think>\s*(?:<answer>(.*?)</answer>)?\s*\Z", re.DOTALL
)


def _think_answer(reasoning: str, answer: str) -> str:
    """A reasoning that already has <think> or <answer> tags is written anew, its tags never nest."""
    found = THINK_ANSWER.match(reasoning)
    reasoning = found[1] if found else reasoning
    if re.search(r"</?(?:think|answer)>", reasoning + answer):
        raise ValueError(
            f"a solution has stray <think> or <answer> tags, remove them: {reasoning.strip()[:80]!r}"
        )
    return f"<think>\n{reasoning.strip()}\n</think>\n<answer>{answer.strip()}</answer>"


def _code_steps(reasoning: str, answer: str) -> str:
    """`reasoning` is a program whose steps are set apart by <end_of_step> or, without marks, by blank lines."""
    if reasoning.lstrip().startswith("<code>") and "<end_of_code>" in reasoning:
        return reasoning  # already in this form
    mark = "<end_of_step>"
    try:
        ast.parse(reasoning.replace(mark, ""))
    except SyntaxError as error:
        raise ValueError(
            f"a code_steps solution must be Python, this is not ({error.msg}, line {error.lineno}): {reasoning[:80]!r}"
        ) from error
    parts = reasoning.split(mark) if mark in reasoning else re.split(r"\n[ \t]*\n", reasoning)
    steps = [part.strip("\n") for part in parts if part.strip()]
    if not steps:
        raise ValueError("a code_steps solution needs a program, its reasoning is empty")
    code = f"\n{mark}\n".join(steps)
    return (
        f"<code>\n{code}\n<end_of_code>\n<output>{answer}<end_of_output>\n"
        f"<answer>The answer is \\boxed{{{answer}}}.\n<end_of_answer>"
    )


GRAMMARS = {
    "think_answer": Grammar(  # Small-Math-R1, section 3.2.1
        name="think_answer",
        system=(
            "You are a careful mathematician. First reason step by step inside <think> and </think>, "
            "then give only the final answer inside <answer> and </answer>."
        ),
        instruction="",
        marks=(),
        stops=(),
        render=_think_answer,
    ),
    "code_steps": Grammar(  # rStar-Math, section 3.1; marks and sentence of its public code
        name="code_steps",
        system="",
        instruction="Let's think step by step and solve the problem with code.",
        marks=STEP_MARKS,
        stops=("<end_of_step>", "<end_of_code>", "<end_of_answer>"),
        render=_code_steps,
    ),
}


def format_completion(reasoning: str, answer: str, grammar: Grammar) -> str:
    """A worked solution as a completion of `grammar` (no end token).

    think_answer: <think>, reasoning, </think>, <answer>answer</answer>. code_steps: `reasoning` is Python, in steps;
    `answer` is what it prints. A reasoning that is in the form already is not wrapped twice. Raises ValueError for
    stray tags and for a program that is empty or no Python.
    """
    return grammar.render(reasoning, answer)


def stop_sequences(tokens: Tokens, grammar: Grammar) -> tuple[tuple[int, ...], ...]:
    """The token sequences that end a step: one id each where the marks are tokens.

    In the text form a mark's ids depend on its neighbours, so each way it is spelt between common ones is given, but
    for those that go on where another one has ended already.
    """
    found: dict[tuple[int, ...], None] = {}
    for mark in grammar.stops:
        if mark in tokens.step_ids:
            found[(tokens.step_ids[mark],)] = None
            continue
        for before in ("\n", ".\n", ")\n", ")", " "):
            for after in ("", "\n", "\n\n"):
                ids = encode_after(tokens, mark + after, before)
                found[tuple(ids.tolist())] = None
    ends_before = lambda ids: any(ids[:length] in found for length in range(1, len(ids)))
    return tuple(ids for ids in found if not ends_before(ids))


def user_text(problem: Problem) -> str:
    """The problem's text with its options as lines "(A) ...": what stands in the user's turn, image marks included.

    Where the answer is a letter, a last line asks for one.
    """
    lines = [problem.problem]
    letters = [chr(ord("A") + index) for index in range(len(problem.options))]
    for letter, option in zip(letters, problem.options, strict=True):
        named = option.lstrip().startswith(f"({letter})")
        lines.append(
            option if named else f"({letter}) {'' if option == letter else option}".rstrip()
        )
    if problem.answer.strip("() .") in letters:
        lines.append("Answer with the letter of the right option.")
    return "\n".join(lines)


def build_prompt(
    problem: Problem,
    tokens: Tokens,
    grammar: Grammar,
    image_settings: Any,
    system: str | None = None,
    max_pixels: int | None = None,
    prefix: str = "",
    pixels: bool = True,
) -> Prompt:
    """A problem as the model reads it: chat text, ids with expanded image tokens, positions, pixels.

    `system` None: the grammar's own system turn; "": none. `prefix` is put behind the generation prompt. With
    pixels=False images are only measured (their headers are read): ids, positions and grids are the same, and
    `attach_pixels` adds the rest later. Raises ValueError naming the problem when its text spells a special token,
    when image marks and images differ in number, or when the tokenizer has no image token.
    """
    from smallmath_jax.data.positions import mrope_positions

    if max_pixels is not None:
        image_settings = dataclasses.replace(image_settings, max_pixels=max_pixels)
    text = _render(problem, tokens, grammar, system)
    prefix = _open_think(text) + prefix
    text += prefix[len(_open_think(text)) :]
    try:
        grids, patches = _images(problem, image_settings, pixels)
    except (OSError, ValueError) as error:
        raise ValueError(f"problem {problem.id!r}: an image cannot be used ({error})") from error
    ids = _encode(text, prefix, tokens)
    ids = _expand(ids, grids, tokens, image_settings.merge, problem.id)
    positions, following = mrope_positions(
        ids, grids, tokens.image_id, tokens.video_id, image_settings
    )
    return Prompt(
        problem_id=problem.id,
        text=text,
        token_ids=ids,
        positions=positions,
        next_position=int(following),
        pixels=patches,
        grids=grids,
        prefix=prefix,
    )


def build_prompts(
    problems: Sequence[Problem],
    tokens: Tokens,
    grammar: Grammar,
    image_settings: Any,
    *,
    max_tokens: int,
    max_patches: int | None = None,
    over: str = "error",
    **options: Any,
) -> tuple[list[tuple[Problem, Prompt]], dict[str, int]]:
    """Prompts of many problems, with the number dropped for each reason.

    A prompt over `max_tokens`, or with more than `max_patches` patches, raises ValueError (over="error") or is dropped
    whole and counted (over="drop"). `options` go to build_prompt.
    """
    if over not in ("error", "drop"):
        raise ValueError(f"over={over!r}: 'error' or 'drop'")
    kept: list[tuple[Problem, Prompt]] = []
    dropped: dict[str, int] = {}
    for problem in problems:
        prompt = build_prompt(problem, tokens, grammar, image_settings, **options)
        patches = int(prompt.grids.prod(-1).sum())
        reason = _too_big(len(prompt.token_ids), max_tokens, patches, max_patches)
        if not reason:
            kept.append((problem, prompt))
        elif over == "drop":
            name = reason.split(":")[0]
            dropped[name] = dropped.get(name, 0) + 1
        else:
            raise ValueError(
                f"problem {problem.id!r}: {reason}; raise the limit, lower max_pixels, or let such prompts be "
                "dropped and counted"
            )
    return kept, dropped


def _too_big(length: int, max_tokens: int, patches: int, max_patches: int | None) -> str:
    if max_patches is not None and patches > max_patches:
        return f"too_many_patches: {patches} image patches, {max_patches} are allowed"
    if length > max_tokens:
        return f"prompt_too_long: {length} prompt tokens, {max_tokens} are allowed"
    return ""


def attach_pixels(
    prompt: Prompt, problem: Problem, image_settings: Any, max_pixels: int | None = None
) -> Prompt:
    """The prompt with its pixels, for one built with pixels=False and the same settings.

    Raises ValueError when an image now has another grid: its file changed in between.
    """
    if max_pixels is not None:
        image_settings = dataclasses.replace(image_settings, max_pixels=max_pixels)
    grids, pixels = _images(problem, image_settings, True)
    if not np.array_equal(grids, prompt.grids):
        raise ValueError(
            f"problem {problem.id!r}: its images have grids {grids.tolist()}, the prompt was built for "
            f"{prompt.grids.tolist()}; an image file changed, start again"
        )
    return dataclasses.replace(prompt, pixels=pixels)


def _render(problem: Problem, tokens: Tokens, grammar: Grammar, system: str | None) -> str:
    text = user_text(problem)
    _check_text(problem.id, text, tokens)
    if grammar.instruction and tokens.instruct:
        text = f"{text}\n{grammar.instruction}"
    no_system = system == ""
    if system is None:
        system = grammar.system if tokens.instruct else ""
    messages: list[dict[str, Any]] = [{"role": "user", "content": _content(problem, text, tokens)}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    rendered = tokens.tokenizer.apply_chat_template(
        messages,
        chat_template=tokens.chat,
        tokenize=False,
        add_generation_prompt=True,
        no_system=no_system,
    )
    return _SYSTEM_TURN.sub(lambda found: found[1], rendered) if no_system else rendered


def _check_text(problem_id: str, text: str, tokens: Tokens) -> None:
    for mark in (*tokens.tokenizer.all_special_tokens, "<|image_pad|>", "<|video_pad|>"):
        if mark in text and len(mark) > 1:
            raise ValueError(
                f"problem {problem_id!r}: its text spells the special token {mark}; remove it from the problem"
            )


def _content(problem: Problem, text: str, tokens: Tokens) -> str | list[dict[str, str]]:
    """A string, or text and image parts in reading order. Without marks the images come first."""
    marks = text.count(IMAGE_MARK)
    if not problem.images and not marks:
        return text
    if tokens.image_id < 0:
        raise ValueError(
            f"problem {problem.id!r}: it has an image, and {tokens.source or 'this model'} reads text only; "
            "use a vision model or leave such problems out"
        )
    if marks and marks != len(problem.images):
        raise ValueError(
            f"problem {problem.id!r}: {marks} {IMAGE_MARK} marks in the text, {len(problem.images)} images"
        )
    pieces = text.split(IMAGE_MARK) if marks else [""] * len(problem.images) + [text]
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(pieces):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts


def _open_think(text: str) -> str:
    """The "<think>" that some chat templates put behind the generation prompt: graders must know of it."""
    found = re.search(r"<think>\s*\Z", text)
    return found.group() if found else ""


def _encode(text: str, prefix: str, tokens: Tokens) -> np.ndarray:
    """The prefix is encoded apart, so that its ids do not depend on what stands before it."""
    head = text[: len(text) - len(prefix)] if prefix else text
    ids = np.asarray(tokens.tokenizer.encode(head, add_special_tokens=False), np.int32)
    return np.concatenate([ids, encode_after(tokens, prefix)]) if prefix else ids


def _images(
    problem: Problem, settings: Any, with_pixels: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(grids int32 [N, 3], pixels float32 [P, C] or None) of a problem's images."""
    from smallmath_jax.data.images import load_image, patchify

    if not problem.images:
        return np.zeros((0, 3), np.int32), None
    if not with_pixels:
        return np.asarray([_measure(ref, settings) for ref in problem.images], np.int32), None
    found = [patchify(load_image(ref)[None], settings) for ref in problem.images]
    grids = np.asarray([grid for _, grid in found], np.int32).reshape(-1, 3)
    return grids, np.concatenate([pixels for pixels, _ in found])


def _measure(ref: str | bytes, settings: Any) -> tuple[int, int, int]:
    """The grid of an image from its header alone (an embedded data: URL is decoded)."""
    from PIL import Image

    from smallmath_jax.data.images import load_image, smart_resize

    if isinstance(ref, str) and ref.startswith("data:"):
        height, width = load_image(ref).shape[:2]
    else:
        data = ref if isinstance(ref, bytes) else epath.Path(ref).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if image.getexif().get(EXIF_ORIENTATION, 1) in (5, 6, 7, 8):  # a quarter turn
                width, height = height, width
    height, width = smart_resize(height, width, settings)
    return 1, height // settings.patch, width // settings.patch


def _expand(
    ids: np.ndarray, grids: np.ndarray, tokens: Tokens, merge: int, problem_id: str
) -> np.ndarray:
    """Repeats each image token once per merged patch, and checks the count: tokens must equal features."""
    places = np.flatnonzero(ids == tokens.image_id)
    if len(places) != len(grids):
        raise ValueError(
            f"problem {problem_id!r}: the chat template wrote {len(places)} image tokens for {len(grids)} images; "
            "it does not know images, name another one (chat=...)"
        )
    counts = np.ones(len(ids), np.int64)
    counts[places] = grids.prod(-1) // merge**2
    return np.repeat(ids, counts).astype(np.int32)
