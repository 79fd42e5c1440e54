"""Whether Tunix's sampler keeps EOS in the tokens its GRPO learner trains on. Needs `pip install google-tunix==0.1.7`.

VENV/bin/python benchmarks/peers/tunix_eos.py
"""

import shape
from tunix.generate import sampler

SMALL = dict(
    num_layers=2,
    vocab_size=64,
    embed_dim=32,
    hidden_dim=64,
    num_heads=2,
    head_dim=16,
    num_kv_heads=1,
    rope_theta=10000,
)


def main() -> None:
    config = sampler.CacheConfig(cache_size=64, num_layers=2, num_kv_heads=1, head_dim=16)
    made = sampler.Sampler(shape.tunix_model(**SMALL), shape.NumberTokenizer(), config)
    eos = list(range(2, 10))
    found = made(
        ["11 12 13"] * 4,
        max_generation_steps=24,
        max_prompt_length=8,
        eos_tokens=eos,
        temperature=5.0,
        top_p=1.0,
        seed=3,
    )
    for row in found.tokens:
        ids = [int(token) for token in row]
        print(f"{len(ids)} tokens {ids}, EOS among them: {any(token in eos for token in ids)}")


if __name__ == "__main__":
    main()
