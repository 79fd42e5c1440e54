"""A folder written by transformers through the whole recipe on real problems, and back into transformers.

    python benchmarks/real_data.py OUT --gsm8k=gsm8k_train.jsonl --vision=MATH-Vision/test.jsonl --math500=math500.jsonl

A random tiny Qwen2.5-VL (so the scores mean nothing): SFT on 64 rows of GSM8K, GRPO on rows of MATH-Vision with their
pictures, evaluation on MATH-500, export; then transformers loads the export, and its logits must equal ours.
"""

import argparse
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def write_folder(folder: pathlib.Path) -> None:
    """A random Qwen2_5_VLForConditionalGeneration, its processor settings and a tokenizer, by transformers."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from smallmath_jax.data.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")
    }
    ids |= {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("vision_start", "vision_end")
    }
    end, pad = (tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("im_end", "endoftext"))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
            "eos_token_id": end,
            "pad_token_id": pad,
            "bos_token_id": pad,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(config: str, workdir: pathlib.Path, **fields) -> None:
    words = [sys.executable, "run.py", f"--config=configs/{config}", f"--workdir={workdir}"]
    words += [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    path = f"{ROOT / 'benchmarks'}:{os.environ.get('PYTHONPATH', '')}"
    subprocess.run(words, cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": path})


def brief(case) -> float:
    """The reward of the GRPO steps: a random model is never right, and this differs between its answers."""
    return -len(case.text) / 100


def check_logits(folder: pathlib.Path, problems: list) -> float:
    """Largest difference of logits on prompts, ours against transformers', both from the exported folder."""
    import numpy as np
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    from smallmath_jax.data.batches import collate, make_sequence
    from smallmath_jax.data.images import ImageSettings
    from smallmath_jax.data.prompts import GRAMMARS, build_prompt
    from smallmath_jax.data.tokens import load_tokens
    from smallmath_jax.models import weights
    from smallmath_jax.models.qwen_vl import forward, head_matrix

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model, config = weights.import_folder(str(folder))
    tokens, images = load_tokens(folder), ImageSettings(max_pixels=50176)
    worst = 0.0
    for problem in problems:
        prompt = build_prompt(problem, tokens, GRAMMARS["think_answer"], images)
        sequence = make_sequence(prompt, prompt.token_ids[-1:])  # any token stands for an answer
        ids = torch.tensor(sequence.token_ids[None].astype(np.int64))
        inputs = {"input_ids": ids}
        if prompt.pixels is not None:
            inputs["pixel_values"] = torch.tensor(prompt.pixels)
            inputs["image_grid_thw"] = torch.tensor(prompt.grids)
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        with torch.no_grad():
            expected = theirs(**inputs, use_cache=False).logits[0].numpy()
        patches, length = max(4, int(prompt.grids.prod(-1).sum())), ids.shape[1]
        special = config.image_token_id, config.video_token_id
        batch = collate([[sequence]], length, patches, images, *special)
        hidden = forward(
            model, batch["tokens"], batch["positions"], batch["segment_ids"], batch.get("vision")
        )
        found = np.asarray(hidden @ head_matrix(model).T)[0, :length]
        worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    for name in ("gsm8k", "vision", "math500"):
        parser.add_argument(f"--{name}", type=pathlib.Path, required=True)
    parser.add_argument("--limit", type=int, default=0, help="problems of MATH-500 (0: all)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    write_folder(out / "start")
    long = {"prompt__max_tokens": 3072, "engine__cache_length": 3328, "engine__prefill_chunk": 256}
    long |= {"vision__max_pixels": 50176, "vision__max_patches": 1024, "engine__slots": 16}
    shared = {
        "eval__problems": f"('{arguments.math500.resolve()}',)",
        "eval__limit": arguments.limit,
        **long,
    }
    shared |= {
        "eval__greedy": True,
        "eval__samples": 0,
        "eval__headline": "greedy",
        "eval__forced_prefix": "",
    }
    shared |= {
        "sft__row_length": 2048,
        "sft__row_patches": 1024,
        "sft__rows": 4,
        "sft__microbatch_rows": 4,
    }
    shared |= {
        "sft__optimizer__name": "adamw",
        "sft__worked_steps": 0,
        "sft__steps": 20,
        "sft__problems": 64,
    }
    run(
        "grpo.py:tiny",
        out / "run",
        model=out / "start",
        sft__data=f"('{arguments.gsm8k.resolve()}',)",
        grpo__data=f"('{arguments.vision.resolve()}',)",
        grpo__problems=32,
        grpo__steps=4,
        grpo__prompts=8,
        grpo__group_size=4,
        grpo__updates=1,
        grpo__optimizer__learning_rate=1e-3,  # a few steps that move the weights
        reward__function="real_data:brief",
        reward__truncated="score",
        grpo__row_length=3328,
        grpo__row_patches=1024,
        grpo__microbatch_rows=4,
        eval__before=False,
        **shared,
    )
    from smallmath_jax.data.problems import load_problems
    from smallmath_jax.records import read_parts

    steps = [row["grad_norm"] for row in read_parts(out / "run" / "metrics")]
    print(f"GRPO on pictures: gradient norms {', '.join(f'{norm:.3g}' for norm in steps)}")
    problems = load_problems(str(arguments.vision))[:3] + load_problems(str(arguments.gsm8k))[:3]
    difference = check_logits(out / "run" / "export", problems)
    print(f"logits of the export, transformers against ours: largest difference {difference:.2e}")
    sys.exit(difference > 1e-4 or not all(norm > 0 for norm in steps))


if __name__ == "__main__":
    main()
