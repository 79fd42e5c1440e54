"""The records that cross rooms, the keys of every random draw, and log parts on disk.

Records are frozen dataclasses. A log is a folder of immutable parts, each published whole: the same on a local
disk and on gs://, where objects cannot be appended to (design: law 6).
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epath


@dataclasses.dataclass(frozen=True)
class Problem:
    """One problem of any source. `images` are paths or encoded image bytes, in reading order."""

    id: str
    problem: str  # text; "<image>" marks where each image stands (none: images come first)
    answer: str
    images: tuple[str | bytes, ...] = ()
    solution: str | None = None
    level: int | None = None  # 1 (easy) .. 5
    subject: str | None = None
    options: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    template: str | None = None  # embedded problems: the template's name
    meta: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Where its set took it from (NuminaMath: "amc_aime", "olympiads" ...); "" where the set does not say."""
        return str(self.meta.get("source") or "")

    @property
    def accepted(self) -> tuple[str, ...]:
        """Every gold answer: any of them is right. `answer` is the first."""
        return tuple(self.meta.get("accepted") or (self.answer,))


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A problem as the model reads it. Positions are data: computed here once, used everywhere (law 3)."""

    problem_id: str
    text: str  # rendered chat text, one vision token pair an image, before expansion
    token_ids: np.ndarray  # int32 [T], image tokens expanded
    positions: np.ndarray  # int32 [3, T] (t, h, w)
    next_position: int  # position of the first completion token on all three axes
    pixels: np.ndarray | None = (
        None  # float32 [P, C * 2 * 14 * 14], in the order of Hugging Face's processor
    )
    grids: np.ndarray = dataclasses.field(  # int32 [N, 3] patches (t, h, w) of each image
        default_factory=lambda: np.zeros((0, 3), np.int32)
    )
    prefix: str = ""  # text put after the generation prompt; graders read prefix + completion


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. All fields are traced per row: changing them never recompiles."""

    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off


@dataclasses.dataclass(frozen=True)
class Completion:
    """One sampled answer, as a line of completions/*.jsonl."""

    problem_id: str
    sample: int
    prompt: str
    text: str
    token_ids: list[int]
    logprobs: list[float]
    stop_reason: str  # eos | stop | length
    answer: str | None = None  # extracted
    gold: str = ""
    verdict: str = ""  # correct | wrong | no_answer | unparsable_gold | timeout
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    policy_version: int = 0
    step: int = 0
    level: int | None = None
    subject: str | None = None
    template: str | None = None
    images: tuple[str, ...] = ()  # paths, or data: URLs of embedded pictures
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Node:
    """One step of a search tree. `tag` is its place: "0" the root, "0.2.1" the first child of its second child."""

    tag: str
    text: str  # what the policy wrote, then what the sandbox appended; "" at the root
    token_ids: list[
        int
    ]  # the same as ids, in the same order: ids travel, text is never re-tokenised
    written: int  # the first `written` ids are the policy's, the rest were appended
    log_prob: float  # sum over the written ids, under the sampling distribution
    kind: str  # root | open | answer | error | too_deep | invalid
    visit_count: int
    value_sum: float  # Q-value = value_sum / visit_count, 0 when never visited
    score: float | None = None  # first score the preference model gave
    answer: str | None = None  # extracted, answer nodes only
    verdict: str = ""  # answer nodes, where the gold answer is known
    status: str = ""  # the sandbox's verdict on this step's code ("" where none ran)
    output: str = ""  # its standard output, exact
    error: str = ""  # the tail of its standard error
    errors: int = 0  # failed steps in a row, this one included
    rollout: int = 0  # the rollout that made it, from 0

    @property
    def q_value(self) -> float:
        """Mean value; without a visit, the initial value if there is one, else 0."""
        return self.value_sum / max(self.visit_count, 1)

    @property
    def parent(self) -> str:
        """The parent's tag; "" for the root."""
        return self.tag.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class Tree:
    """A searched problem, as a line of trees/*.jsonl. `nodes` are in the order of their creation, the root first."""

    problem_id: str
    problem: str
    gold: str
    nodes: list[Node]
    chosen: str = ""  # tag of the answer node the search settled on; "" for none
    rollouts: int = 0  # rollouts taken, wasted ones included
    wasted: int = 0  # rollouts that ended on an exhausted node
    tokens: int = 0  # tokens the policy wrote, filtered candidates included
    stopped: str = ""  # why the search ended: rollouts | exhausted | decided | confident | failed
    seed: int = 0
    round: int = 0
    level: int | None = None
    subject: str | None = None
    source: str = ""
    template: str | None = None
    images: tuple[str, ...] = ()  # paths, or data: URLs of embedded pictures
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings, sandbox tier, ...


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """Two continuations of one prefix, as a line of pairs/*.jsonl."""

    problem_id: str
    prefix_ids: list[int]  # tokens after the prompt up to the step; empty at the root
    chosen_ids: list[int]
    rejected_ids: list[int]
    positives: (
        int  # chosen and rejected siblings of this prefix: the loss is divided by their product
    )
    negatives: int
    margin: float  # Q-value of the chosen step minus that of the rejected one
    kind: str  # step | trajectory
    chosen: str = ""  # the texts, for reading
    rejected: str = ""


def draw_key(*parts: Any) -> np.ndarray:
    """A uint32 [2] key of a random draw, from what names the draw: (seed, problem, step, sample ...) (law 5)."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return np.frombuffer(digest[:8], np.uint32).copy()


def to_json(record: Any) -> str:
    """One JSON line of a dataclass or dict; numpy scalars and arrays become plain numbers and lists."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        record = dataclasses.asdict(record)
    return _encodable(json.dumps(record, default=_plain, ensure_ascii=False, allow_nan=True))


def _encodable(text: str) -> str:
    """The text with half surrogate pairs, which UTF-8 has no bytes for, as \\udXXX: JSON reads them back."""
    return text.encode("utf-8", "backslashreplace").decode()


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(
        f"{type(value).__name__} cannot be written as JSON; convert it before logging it"
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Publishes a file whole: a reader sees the old file or the new one, never a torn one.

    Raises OSError naming the file, of which nothing is left then, for example on a full disk.
    """
    target, text = epath.Path(path), _encodable(text)
    target.parent.mkdir(parents=True, exist_ok=True)
    if str(path).startswith("gs://"):  # one object, one upload: already atomic
        target.write_text(text)
        return
    partial = target.parent / f".{target.name}.{os.getpid()}.partial"
    try:
        partial.write_text(text)
        os.replace(partial, target)
    except OSError as error:  # a full disk's names no file, and half a file would keep it full
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(target)) from error


def write_part(folder: str | os.PathLike[str], name: str, rows: Iterable[Any]) -> None:
    """Writes `folder/name` (one JSON object a line), whole or not at all."""
    write_text(epath.Path(folder) / name, "".join(to_json(row) + "\n" for row in rows))


def read_parts(folder: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """All rows of a folder's parts, in name order. Raises ValueError naming a torn line."""
    root = epath.Path(folder)
    if not root.exists():
        return
    for path in sorted(root.glob("*.jsonl"), key=lambda part: part.name):
        # Bytes: as text, lines would also end at U+0085 and U+2028, which a model may write and JSON leaves as they are
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                yield json.loads(line)
            except ValueError as error:  # torn inside a character, too
                raise ValueError(
                    f"{path}, line {number}: not a JSON object ({error}); the part is damaged, delete or restore it"
                ) from error
