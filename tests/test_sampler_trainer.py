"""Law 2 end to end: what the engine says of the tokens it drew, the trainer says again, pictures and all."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from test_configs import load

from smallmath_jax.data.tiny import tiny_problems
from smallmath_jax.models.tree import map_named
from smallmath_jax.tasks import grpo
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for, with_pixels
from smallmath_jax.tasks.rollouts import make_engine


def test_the_trainer_scores_drawn_tokens_as_the_sampler_did():
    config = load("grpo", "tiny")
    config.engine.slots = 8
    config.grpo.update({"prompts": 4, "group_size": 2, "microbatch_rows": 4})
    config.grpo.sampling.update({"max_tokens": 12, "temperature": 0.7})
    mesh = make_mesh(config)
    policy = load_policy(config, mesh)
    rng = np.random.default_rng(0)  # a fresh tiny model's blocks are the identity: nothing to tell
    noise = lambda _, leaf: leaf + jnp.asarray(0.1 * rng.normal(size=leaf.shape), leaf.dtype)
    policy = dataclasses.replace(policy, model=map_named(noise, policy.model))
    found = tiny_problems("test", 40, 0)
    problems = [p for p in found if p.images][:2] + [p for p in found if not p.images][:2]
    problems, prompts, left_out = prompts_for(problems, policy, config)
    assert not left_out and sum(len(prompt.grids) > 0 for prompt in prompts) == 2
    asked = [with_pixels(*pair, policy) for pair in zip(prompts, problems, strict=True)]
    groups = grpo.sample_groups(make_engine(policy, config), asked, config, 0)
    rows = [
        {
            "token_ids": rollout.token_ids,
            "logprobs": rollout.log_probs,
            "rewards": {"total": float(sample)},
            "extra": {"place": place, "masked": False, "gated": False},
        }
        for place, group in enumerate(groups)
        for sample, rollout in enumerate(group)
    ]
    batch = grpo.group_batch(asked, rows, config)
    trainer = grpo.make_grpo_trainer(policy, prompts, config, mesh)
    again = trainer.with_log_probs(batch.sequences, policy.model, "again")
    for one in again:
        drawn = one.weights > 0
        assert drawn.sum() > 0
        np.testing.assert_allclose(
            one.fields["again"][drawn], one.fields["sampler_log_probs"][drawn], atol=1e-4
        )
