"""The embedded tokenizer: byte-level BPE with Qwen2.5's splitting rule and special tokens, built in code.

The merges are learned here, by plain BPE on the pieces of the embedded templates with ties broken by name, so the
vocabulary is the same on every machine and needs no file. It saves and loads as any Hugging Face tokenizer.
"""

from collections import Counter
from functools import lru_cache

from smallmath_jax.data.tiny_templates import TEMPLATES, THINGS, WHO

MERGES = 330  # enough for every word of the templates to be one token
ADDED = (  # Qwen2.5's, in its order; the flag says special (skipped when decoding)
    *((name, True) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")),
    *(
        (f"<|{name}_{end}|>", True)
        for name in ("object_ref", "box", "quad")
        for end in ("start", "end")
    ),
    *((f"<|{name}|>", True) for name in ("vision_start", "vision_end", "vision_pad")),
    *((f"<|{name}|>", True) for name in ("image_pad", "video_pad")),
    *((name, False) for name in ("<tool_call>", "</tool_call>")),
    *((f"<|fim_{name}|>", False) for name in ("prefix", "middle", "suffix", "pad")),
    *((f"<|{name}|>", False) for name in ("repo_name", "file_sep")),
)
# Qwen2.5's rule (words take one leading mark or space), but two digits are one token where Qwen2.5 has two: a model
# this small learns sums from whole numbers in a tenth of the steps (docs/lab_notes.md).
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2.5-VL's template without its default system turn: prompts stay short.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FRAMES = (
    "user\n", "assistant\n", "system\n",
    "<think>Steps:\n1</think><answer>1</answer>", "<think>Quick</think><answer>1/1</answer>",
    "<code>\na=1+1\nprint(a)\n", 'print(a,b,sep="/")\n<output>1', "<answer>\\boxed{1}", "a=b//k*2",
)  # fmt: skip


def tiny_tokenizer():
    """A transformers PreTrainedTokenizerFast; a new object at every call (callers may add tokens)."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    vocabulary, merges = _vocabulary()
    core = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    core.add_tokens(
        [AddedToken(name, special=special, normalized=False) for name, special in ADDED]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[name for name, special in ADDED[3:] if special],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        instruct=False,  # data.tokens: no instruction in the prompt; an exported folder says so too
    )


@lru_cache(maxsize=1)
def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token -> id (256 bytes, then merges) and the merges in rank order."""
    from tokenizers import Regex, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words = Counter(piece for text in _corpus() for piece, _ in split.pre_tokenize_str(text))
    learned = learn_merges({word: min(count, 3) for word, count in words.items()}, MERGES)
    numbers = [(tens, ones) for tens in "123456789" for ones in "0123456789"]
    merges = [*numbers, *(pair for pair in learned if pair not in numbers)]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    return {token: index for index, token in enumerate(tokens)}, merges


def learn_merges(words: dict[str, int], limit: int) -> list[tuple[str, str]]:
    """Byte-pair encoding: the most frequent neighbouring pair becomes a token, until `limit` or every word is one.

    `words` maps a word to its weight. Equal counts go to the pair first in the alphabet, so the result is unique.
    """
    spelled = {word: tuple(word) for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < limit:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in zip(parts, parts[1:], strict=False):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spelled = {word: _merged(parts, best) for word, parts in spelled.items()}
    return merges


def _merged(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def _corpus() -> list[str]:
    holes = dict.fromkeys("abcdhijkmnoprsuvwxy", "1")
    texts = [
        template.text.format(who=who, things=things, **holes)
        for template in TEMPLATES.values()
        for who, things in zip(WHO, THINGS, strict=True)
    ]
    return [*texts, *FRAMES]
