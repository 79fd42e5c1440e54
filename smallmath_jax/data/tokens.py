"""Tokenizers: loading, the ids that matter (end, padding, vision, banned), chat templates, added step marks.

Nothing here needs a model or an accelerator. `transformers` is imported only when a tokenizer is loaded.
"""

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

VISION_MARKS = (
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Marks that open a turn: a policy that may sample them writes the next question itself.
TURN_MARKS = ("<|im_start|>", "<|user|>", "<|system|>")
END_MARKS = ("<|im_end|>", "<|end|>", "<|endoftext|>")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
    "generation_config.json",
)

# A content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...} parts.
_CONTENT = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n" + _CONTENT + "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _chatml(default_system: str) -> str:
    turn = (
        "{% if messages[0]['role'] != 'system' and not no_system %}<|im_start|>system\n"
        + default_system
    )
    return turn + "<|im_end|>\n{% endif %}" + _CHATML


# Jinja chat templates for tokenizers that bring none. `rstar` is the prompt rStar-Math's code trains on; its search
# puts two newlines before the assistant's mark (`rstar_search`): one consistent form is our default.
CHATS = {
    "qwen": _chatml("You are a helpful assistant."),
    "qwen_math": _chatml("Please reason step by step, and put your final answer within \\boxed{}."),
    "bare": _CHATML,
    "phi3": (
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "rstar": (
        "{% for message in messages if message['role'] == 'user' %}<|user|>:\n{{ message['content'] }}"
        "\n<|assistant|>: {% endfor %}"
    ),
    "rstar_search": (
        "{% for message in messages if message['role'] == 'user' %}<|user|>:\n{{ message['content'] }}"
        "\n\n<|assistant|>: {% endfor %}"
    ),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """A tokenizer and the ids every room needs. An id of -1 means that the tokenizer has no such token."""

    tokenizer: Any
    image_id: int
    video_id: int
    vision_start: int
    vision_end: int
    im_end: int  # closes a turn; completion_ids puts it behind a text
    eos_ids: tuple[int, ...]  # sorted; sampling any of them ends a completion
    pad_id: int  # never used to infer padding: it may be an end token too
    banned_ids: np.ndarray  # int32 [K], sorted: vision marks, turn openers, rows without a token
    vocab_rows: int  # rows of the embedding, >= len(tokenizer)
    chat: str | None = None  # Jinja template; None: the tokenizer's own
    # False: no instruction in the prompt, the tiny model learns the form; its tokenizer_config.json says so
    instruct: bool = True
    step_ids: dict[str, int] = dataclasses.field(default_factory=dict)  # added mark -> id
    source: str = ""


def load_tokens(
    source: str | os.PathLike[str], vocab_rows: int | None = None, chat: str | None = None
) -> Tokens:
    """Loads a tokenizer from a folder (local or gs://), "tiny", or a hub name.

    A folder that holds only SentencePiece's `tokenizer.model` loads too. `vocab_rows` is the number of embedding rows
    (default: config.json's vocab_size); `chat` names one of CHATS (default: the tokenizer's own template, else by
    family). Raises ValueError when the folder has no tokenizer, when there are fewer rows than tokens, or for an
    unknown chat.
    """
    source = os.fspath(source)
    if source == "tiny":
        return _tiny_tokens(vocab_rows)
    if source.startswith("gs://"):
        with tempfile.TemporaryDirectory() as local:
            _copy_tokenizer(epath.Path(source), epath.Path(local))
            return _load_folder(local, source, vocab_rows, chat)
    return _load_folder(source, source, vocab_rows, chat)


def _tiny_tokens(vocab_rows: int | None) -> Tokens:
    from smallmath_jax.data.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    template = None if tokenizer.chat_template else CHATS["bare"]
    if vocab_rows is None:  # room for the step marks, and a shape that shards
        vocab_rows = -(-(len(tokenizer) + 16) // 64) * 64
    return make_tokens(tokenizer, vocab_rows, chat=template, source="tiny")


def _copy_tokenizer(source: epath.Path, local: epath.Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            (local / name).write_bytes((source / name).read_bytes())


def _load_folder(folder: str, source: str, vocab_rows: int | None, chat: str | None) -> Tokens:
    if chat is not None and chat not in CHATS:
        raise ValueError(f"unknown chat template {chat!r}; known: {', '.join(CHATS)}")
    tokenizer = _load_tokenizer(folder, source)
    config = _read_json(folder, "config.json")
    generation = _read_json(folder, "generation_config.json")
    text = config.get("text_config") or {}
    if vocab_rows is None:
        vocab_rows = (
            config.get("vocab_size") or text.get("vocab_size") or _highest_id(tokenizer) + 1
        )
    ends = [part.get("eos_token_id") for part in (config, text, generation)]
    return make_tokens(
        tokenizer,
        vocab_rows,
        extra_ends=[end for part in ends for end in _as_list(part)],
        chat=CHATS[chat] if chat else None,
        source=source,
    )


def _load_tokenizer(folder: str, source: str) -> Any:
    import transformers

    local = epath.Path(folder)
    is_folder = local.is_dir()
    if not is_folder and (source.startswith(("gs://", "/", ".", "~")) or local.exists()):
        raise ValueError(
            f"{source}: no such folder; give a Hugging Face folder, a hub name or 'tiny'"
        )
    bare = is_folder and (local / "tokenizer.model").exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        bare = bare and not (local / name).exists()
    if bare:  # only SentencePiece's file: nothing says which class it is, so check what was loaded
        return _load_sentencepiece(folder, source)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{source}: no tokenizer could be loaded from it ({error}); the folder needs tokenizer.json, "
            "vocab.json with merges.txt, or tokenizer.model"
        ) from error


def _load_sentencepiece(folder: str, source: str) -> Any:
    import sentencepiece
    import transformers

    path = os.path.join(folder, "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
    for probe in ("x = 3\n\n  y_1 is 0.5 (a b)", "Let's reason: 12 + 30 = 42."):
        ours = tokenizer.encode(probe, add_special_tokens=False)
        if ours != reference.encode(probe):
            raise ValueError(
                f"{path}: transformers reads this SentencePiece model differently from sentencepiece itself "
                f"({ours} against {reference.encode(probe)}); convert it to a tokenizer.json first"
            )
    return tokenizer


def _read_json(folder: str, name: str) -> dict[str, Any]:
    """A JSON file of a local folder or a hub repository; {} when there is none."""
    path = epath.Path(folder) / name
    if not epath.Path(folder).is_dir():
        from transformers.utils import cached_file

        try:
            found = cached_file(folder, name, _raise_exceptions_for_missing_entries=False)
        except OSError:  # offline and not in the cache: the tokenizer's own end token remains
            found = None
        if found is None:
            return {}
        path = epath.Path(found)
    return json.loads(path.read_text()) if path.exists() else {}


def make_tokens(
    tokenizer: Any,
    vocab_rows: int,
    *,
    extra_ends: Iterable[int] = (),
    chat: str | None = None,
    source: str = "",
) -> Tokens:
    """Tokens of a loaded tokenizer. Raises ValueError when it has ids past `vocab_rows`."""
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values())
    if highest >= vocab_rows:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {highest}, the model only {vocab_rows} vocabulary rows; "
            "they do not belong together"
        )
    get = lambda mark: vocabulary.get(mark, -1)
    ends = {get(mark) for mark in END_MARKS} | {*extra_ends, tokenizer.eos_token_id}
    ends = {int(end) for end in ends if end is not None and 0 <= end < vocab_rows}
    if not ends:
        raise ValueError(
            f"{source}: the tokenizer names no end token (eos_token); add one to its config"
        )
    turn_end = next((get(mark) for mark in END_MARKS if get(mark) >= 0), tokenizer.eos_token_id)
    pad = tokenizer.pad_token_id
    pad = get("<|endoftext|>") if pad is None else pad
    if chat is None and not tokenizer.chat_template:
        chat = CHATS[_family(vocabulary)]
    return Tokens(
        tokenizer=tokenizer,
        image_id=get("<|image_pad|>"),
        video_id=get("<|video_pad|>"),
        vision_start=get("<|vision_start|>"),
        vision_end=get("<|vision_end|>"),
        im_end=int(turn_end),
        eos_ids=tuple(sorted(ends)),
        pad_id=int(pad if pad is not None and pad >= 0 else min(ends)),
        banned_ids=_banned(vocabulary, vocab_rows, ends),
        vocab_rows=int(vocab_rows),
        chat=chat,
        instruct=bool(tokenizer.init_kwargs.get("instruct", True)),
        source=source,
    )


def _family(vocabulary: dict[str, int]) -> str:
    if "<|im_start|>" in vocabulary:
        return "qwen"
    return "phi3" if "<|assistant|>" in vocabulary and "<|end|>" in vocabulary else "rstar"


def _banned(vocabulary: dict[str, int], rows: int, ends: set[int]) -> np.ndarray:
    banned = np.ones(rows, bool)
    banned[list(vocabulary.values())] = False
    for mark in VISION_MARKS + TURN_MARKS:
        if mark in vocabulary and vocabulary[mark] not in ends:
            banned[vocabulary[mark]] = True
    return np.flatnonzero(banned).astype(np.int32)


def add_step_tokens(tokens: Tokens, marks: Iterable[str]) -> Tokens:
    """Gives each mark a token of its own, in the first unused vocabulary rows (Qwen2.5: 151665 on).

    The marks are ordinary added tokens, not special ones: decoding that skips special tokens keeps them. The new
    `step_ids` say which rows the model must initialise. Raises ValueError when the vocabulary has no room.
    """
    marks = tuple(marks)
    tokenizer = copy.deepcopy(tokens.tokenizer)
    vocabulary = tokenizer.get_vocab()
    missing = [mark for mark in marks if mark not in vocabulary]
    free = tokens.vocab_rows - 1 - max(vocabulary.values())
    if len(missing) > free:
        raise ValueError(
            f"{tokens.source}: {len(missing)} step marks need vocabulary rows, the model has {free} unused; "
            "use the text form (prompt.step_tokens=False)"
        )
    tokenizer.add_tokens(_added_tokens(missing))
    vocabulary = tokenizer.get_vocab()
    return dataclasses.replace(
        tokens,
        tokenizer=tokenizer,
        banned_ids=_banned(vocabulary, tokens.vocab_rows, set(tokens.eos_ids)),
        step_ids={mark: vocabulary[mark] for mark in marks},
    )


def _added_tokens(marks: list[str]) -> list[Any]:
    from tokenizers import AddedToken

    return [AddedToken(mark, special=False, normalized=False) for mark in marks]


def encode_after(tokens: Tokens, text: str, before: str = "\n") -> np.ndarray:
    """Ids of `text` as they are when it follows `before`: int32 [N].

    SentencePiece puts a space before the first word of what it is given; behind a context it does not.
    """
    encode = lambda string: tokens.tokenizer.encode(string, add_special_tokens=False)
    head, whole = encode(before), encode(before + text)
    ids = whole[len(head) :] if whole[: len(head)] == head else encode(text)
    return np.asarray(ids, np.int32)


def completion_ids(text: str, tokens: Tokens, before: str = "\n") -> np.ndarray:
    """Ids of a completion, its end token included: int32 [N]. `before` is the prompt's prefix, if it has one.

    Raises ValueError when the text itself spells an end token or a banned one: the policy could never sample it.
    """
    ids = encode_after(tokens, text, before or "\n")
    wrong = set(ids.tolist()) & ({*tokens.eos_ids} | set(tokens.banned_ids.tolist()))
    if wrong:
        names = ", ".join(tokens.tokenizer.convert_ids_to_tokens(sorted(wrong)))
        raise ValueError(
            f"a solution spells the special token(s) {names}; remove them from the text: {text[:80]!r}"
        )
    return np.append(ids, np.int32(tokens.im_end))


def decode(tokens: Tokens, ids: Iterable[int]) -> str:
    """Text of completion ids: end tokens dropped, step marks kept, no clean-up of spaces."""
    kept = [int(token) for token in ids if int(token) not in tokens.eos_ids]
    return tokens.tokenizer.decode(
        kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _highest_id(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab().values())


def _as_list(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
