"""Writes OUT/problems.jsonl and OUT/start: a tiny Qwen2 (transformers' own), fine-tuned by us on the embedded problems.

python benchmarks/grpo_vs_trl/prepare.py OUT
"""

import argparse
import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from smallmath_jax.data.tiny import tiny_problems, tiny_tokenizer  # noqa: E402


def write_folder(folder: pathlib.Path) -> None:
    """A random Qwen2ForCausalLM with the embedded tokenizer, written by transformers."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_problems(out: pathlib.Path) -> None:
    """Text problems: some with solutions in both styles for the start, others for GRPO."""
    from smallmath_jax.data.tiny import worked_solution

    drawn = tiny_problems("train", 16000, seed=11, image_share=0.0)
    problems = list({problem.id: problem for problem in drawn}.values())
    taught = len(problems) * 6 // 7
    with open(out / "sft.jsonl", "w") as file:
        for index, problem in enumerate(problems[:taught]):
            text = worked_solution(problem, "think_answer", "terse" if index % 5 < 3 else "worked")
            think = text.partition("<think>")[2].partition("</think>")[0]
            row = {
                "id": problem.id,
                "problem": problem.problem,
                "answer": problem.answer,
                "solution": think,
            }
            file.write(json.dumps(row) + "\n")
    with open(out / "problems.jsonl", "w") as file:
        for problem in problems[taught:]:
            file.write(
                json.dumps({"id": problem.id, "problem": problem.problem, "answer": problem.answer})
                + "\n"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_problems(out)
    write_folder(out / "random")
    run = [sys.executable, "run.py", "--config=configs/sft.py:tiny", f"--workdir={out}/sft"]
    run += [
        f"--config.model={out}/random",
        f"--config.sft.data=('{out}/sft.jsonl',)",
        "--config.sft.problems=0",
        "--config.prompt.system=",  # the chat template alone, as TRL renders it
    ]
    # not problems.jsonl: what shares ten words with an evaluated problem would be left out of the lessons
    run += ["--config.eval.problems=('tiny:test',)", "--config.eval.before=False"]
    run += ["--config.eval.limit=300", "--config.sft.steps=1200"]
    subprocess.run(run, cwd=ROOT, check=True)
    (out / "start").symlink_to((out / "sft" / "export").resolve())


if __name__ == "__main__":
    main()
