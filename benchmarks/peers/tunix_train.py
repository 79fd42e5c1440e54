"""Tunix's SFT step and its GRPO loss step, token-mean and without KL. Needs `pip install google-tunix==0.1.7`.

VENV/bin/python benchmarks/peers/tunix_train.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import shape
from tunix.rl import (
    algo_core,  # noqa: F401  (registers "grpo")
    common,
    function_registry,
)
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer, utils


def trainer(learning_rate: float) -> peft_trainer.PeftTrainer:
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=100)
    return peft_trainer.PeftTrainer(shape.tunix_model(), optax.adamw(learning_rate), config)


def time_step(name: str, made: peft_trainer.PeftTrainer, batch: object) -> None:
    step, _ = made.jit_train_and_eval_step(False, True)
    call = lambda _: jax.block_until_ready(step(batch)[0])
    shape.measure(f"tunix {name} step", call, shape.ROWS * (shape.PROMPT + shape.NEW))


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, object]:
    mask = batch.input_tokens != 0
    return dict(
        input_tokens=batch.input_tokens,
        input_mask=batch.input_mask,
        positions=utils.build_positions_from_mask(mask),
        attention_mask=utils.make_causal_attn_mask(mask),
    )


def main() -> None:
    random = np.random.default_rng(0)
    size = (shape.ROWS, shape.PROMPT + shape.NEW)
    tokens = jnp.asarray(random.integers(2, shape.VOCABULARY, size), jnp.int32)
    batch = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=jnp.ones(size, bool))
    time_step("SFT", trainer(1e-5).with_gen_model_input_fn(model_input), batch)

    settings = grpo_learner.GRPOConfig(
        num_generations=shape.ROWS,
        num_iterations=1,
        beta=0.0,
        epsilon=0.2,
        loss_agg_mode="token-mean",
    )
    settings.temperature = 1.0
    loss = function_registry.get_policy_loss_fn("grpo")
    made = trainer(1e-6)
    made.with_loss_fn(
        lambda model, train_example: loss(
            model, train_example, algo_config=settings, pad_id=0, eos_id=1
        ),
        has_aux=True,
    )
    made.with_gen_model_input_fn(lambda example: {"train_example": example})
    advantages = random.standard_normal(shape.ROWS).astype(np.float32)
    example = common.TrainExample(
        prompt_ids=jnp.broadcast_to(tokens[:1, : shape.PROMPT], (shape.ROWS, shape.PROMPT)),
        prompt_mask=jnp.ones((shape.ROWS, shape.PROMPT), bool),
        completion_ids=tokens[:, shape.PROMPT :],
        completion_mask=jnp.ones((shape.ROWS, shape.NEW), bool),
        advantages=jnp.asarray((advantages - advantages.mean()) / advantages.std()),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )
    time_step("GRPO", made, example)


if __name__ == "__main__":
    main()
