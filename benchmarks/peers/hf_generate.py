"""Hugging Face `generate` on torch. Needs `pip install torch==2.13.0 transformers==5.23.0`.

OMP_WAIT_POLICY=PASSIVE TH=1 VENV/bin/python benchmarks/peers/hf_generate.py      # TH: threads
"""

import os

import shape
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("TH", 1)))
    config = Qwen2Config(
        vocab_size=shape.VOCABULARY,
        hidden_size=shape.WIDTH,
        intermediate_size=shape.INTERMEDIATE,
        num_hidden_layers=shape.LAYERS,
        num_attention_heads=shape.HEADS,
        num_key_value_heads=shape.KV_HEADS,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(2, shape.VOCABULARY, (shape.ROWS, shape.PROMPT))
    modes = {
        "greedy": dict(do_sample=False),
        "sampled, T = 1": dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0),
        "sampled, top_p = 0.95": dict(do_sample=True, temperature=1.0, top_k=0, top_p=0.95),
    }
    for name, settings in modes.items():

        def call(_: int, settings=settings) -> None:
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=shape.NEW,
                    min_new_tokens=shape.NEW,
                    **settings,
                )

        shape.measure(f"transformers {name}", call, shape.ROWS * shape.NEW)


if __name__ == "__main__":
    main()
