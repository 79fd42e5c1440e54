"""Tunix's own sampler, and what it pays for a group of one prompt. Needs `pip install google-tunix==0.1.7`.

VENV/bin/python benchmarks/peers/tunix_generate.py
"""

import os

import numpy as np
import shape
from tunix.generate import sampler

EOS = [shape.VOCABULARY + 5]  # never drawn: every row runs to its limit


def make_sampler(cache: int) -> sampler.Sampler:
    config = sampler.CacheConfig(
        cache_size=cache,
        num_layers=shape.LAYERS,
        num_kv_heads=shape.KV_HEADS,
        head_dim=shape.HEAD_DIM,
    )
    return sampler.Sampler(shape.tunix_model(), shape.NumberTokenizer(), config)


def text(random: np.random.Generator, length: int) -> str:
    return " ".join(map(str, random.integers(2, shape.VOCABULARY, length)))


def main() -> None:
    random = np.random.default_rng(0)
    prompts = [text(random, shape.PROMPT) for _ in range(shape.ROWS)]
    made = make_sampler(shape.PROMPT + shape.NEW)
    modes = {
        "greedy": {},
        "sampled, T = 1": dict(temperature=1.0, top_p=1.0, top_k=None),
        "sampled, T = 0.9 (compiles again)": dict(temperature=0.9, top_p=1.0, top_k=None),
        "sampled, top_p = 0.95": dict(temperature=1.0, top_p=0.95, top_k=None),
    }
    for name, settings in modes.items():
        call = lambda repeat, settings=settings: made(
            prompts,
            max_generation_steps=shape.NEW,
            max_prompt_length=shape.PROMPT,
            eos_tokens=EOS,
            seed=repeat,
            **settings,
        )
        shape.measure(f"tunix {name}", call, shape.ROWS * shape.NEW)
    length = int(os.environ.get("P2", 512))
    made, prompt = make_sampler(length + 8), text(random, length)
    for group in (1, 8):
        call = lambda repeat, group=group: made(
            [prompt] * group,
            max_generation_steps=1,
            max_prompt_length=length,
            eos_tokens=EOS,
            temperature=1.0,
            top_p=1.0,
            seed=repeat,
        )
        shape.measure(f"tunix prefill of {length} tokens, group of {group}", call, length)


if __name__ == "__main__":
    main()
