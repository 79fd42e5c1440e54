"""EasyDeL's `.generate`. Needs `pip install easydel pillow torch==2.13.0`.

VENV/bin/python benchmarks/peers/easydel_generate.py
"""

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import shape
from flax import nnx
from transformers import GenerationConfig


def main() -> None:
    config = easydel.Qwen2Config(
        vocab_size=shape.VOCABULARY,
        hidden_size=shape.WIDTH,
        intermediate_size=shape.INTERMEDIATE,
        num_hidden_layers=shape.LAYERS,
        num_attention_heads=shape.HEADS,
        num_key_value_heads=shape.KV_HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attn_mechanism="vanilla",
        sharding_axis_dims=(1, 1, 1, 1, 1),
    )
    ids = np.random.default_rng(0).integers(2, shape.VOCABULARY, (shape.ROWS, shape.PROMPT))
    ids = jnp.asarray(ids, jnp.int32)
    settings = GenerationConfig(
        max_new_tokens=shape.NEW,
        do_sample=False,
        eos_token_id=shape.VOCABULARY - 1,
        pad_token_id=0,
        bos_token_id=1,
    )
    with config.mesh:
        model = easydel.Qwen2ForCausalLM(
            config=config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0)
        )

        def call(_: int) -> None:
            found = model.generate(
                ids, attention_mask=jnp.ones_like(ids), generation_config=settings
            )
            jax.block_until_ready(getattr(found, "sequences", found))

        shape.measure("easydel greedy", call, shape.ROWS * shape.NEW)


if __name__ == "__main__":
    main()
