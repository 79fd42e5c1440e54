"""One problem, answered: the reasoning and the answer, printed."""

from typing import Any

from smallmath_jax.data.images import load_image
from smallmath_jax.data.tokens import decode
from smallmath_jax.records import Problem, draw_key
from smallmath_jax.rollout.engine import Limits
from smallmath_jax.tasks import runs
from smallmath_jax.tasks.policy import load_policy, make_mesh, prompts_for
from smallmath_jax.tasks.rollouts import Request, make_engine, run_requests, sampling_of
from smallmath_jax.verify import rewards
from smallmath_jax.verify.answers import extract

REMEDIES = {
    "prompt_too_long": "raise prompt.max_tokens",
    "too_many_patches": "lower vision.max_pixels or raise vision.max_patches",
    "image_for_a_text_model": "it reads no pictures, give a vision model",
}


def run(config: Any, workdir: str) -> None:
    """Prints the model's reasoning and its answer to `config.problem`."""
    if not config.problem:
        raise ValueError('say what to solve: --config.problem="What is 3 * 7?"')
    if config.image:
        load_image(config.image)  # a missing picture is told before the weights load
    images = (config.image,) if config.image else ()
    problem = Problem(id="asked", problem=config.problem, answer="", images=images)
    runs.prepare_process()
    policy = load_policy(config, make_mesh(config))
    _, prompts, dropped = prompts_for([problem], policy, config)
    if dropped:
        told = ", ".join(f"{reason} ({REMEDIES[reason]})" for reason in dropped)
        raise ValueError(f"the problem does not fit this model: {told}")
    limits = Limits(max_tokens=config.sampling.max_tokens)
    keys = draw_key(config.seed, "solve", config.problem)[None]
    request = Request(prompts[0], keys, limits, sampling_of(config.sampling))
    ((_, (rollout,)),) = run_requests(make_engine(policy, config), [request])
    text = decode(policy.tokens, rollout.token_ids)
    parsed = rewards.parse_think_answer(text, prompts[0].prefix)
    answer = extract(text, mode="lenient", prefix=prompts[0].prefix)
    print(parsed.think if parsed.well_formed else prompts[0].prefix + text)
    print(f"\nanswer: {answer if answer is not None else 'none found'}")
    if rollout.stop_reason == "length":
        print(
            f"(stopped at {config.sampling.max_tokens} tokens; --config.sampling.max_tokens=N allows more)"
        )
