"""TRL's side: GRPOTrainer with the settings of reward.py; writes OUT/trl-SEED.json. Needs torch and trl only.

VENV/bin/python benchmarks/grpo_vs_trl/trl_side.py OUT --seed 0
"""

import argparse
import json
import pathlib
import resource
import time

from reward import SETTINGS, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    started = time.time()
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    start = str((arguments.out / "start").resolve())
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.eos_token, tokenizer.padding_side = "<|im_end|>", "left"
    rows = [json.loads(line) for line in open(arguments.out / "problems.jsonl")]
    for row in rows:  # rendered here, so that both sides read the same tokens
        message = [{"role": "user", "content": row["problem"]}]
        row["prompt"] = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )

    def reward(completions, answer, **_):
        return [score(text, gold) for text, gold in zip(completions, answer, strict=True)]

    config = GRPOConfig(
        output_dir=str(arguments.out / f"trl-{arguments.seed}"),
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,
        max_steps=SETTINGS["steps"],
        per_device_train_batch_size=SETTINGS["prompts"] * SETTINGS["group_size"],
        num_generations=SETTINGS["group_size"],
        max_completion_length=SETTINGS["max_tokens"],
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=SETTINGS["clip_norm"],
        epsilon=SETTINGS["epsilon"],
        beta=0.0,
        loss_type="dapo",  # tokens of the whole batch, as our denominator "batch"
        temperature=1.0,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=start,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    used = resource.getrusage(resource.RUSAGE_SELF)
    record = {
        "rewards": rewards,
        "cpu_s": used.ru_utime + used.ru_stime,
        "wall_s": time.time() - started,
    }
    (arguments.out / f"trl-{arguments.seed}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
