"""Exported folders in transformers 4.49, 4.57 and 5: same logits, tokens, chat text and pixels in each.

    python tests/check_transformers_versions.py [--cache DIR] [--versions 4.49.0 4.57.6]

Tiny random models are saved by the installed transformers, imported, exported, and loaded in one virtual environment
a version (made with pip under DIR, kept for the next time) and in the one running. The reference is the original
model in the installed version. Prints a table; exits 1 when a cell is wrong. Part of `.ci/run --full`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

LOGITS = 1e-4  # fp32; the versions differ from each other by up to 3e-5 on the same weights
PIXELS = 1e-5
CHAT = [{"role": "user", "content": "How many circles are there?"}]
# Single digits: transformers 5 reads any tokenizer beside a qwen2 model with Qwen's own splitting, which cuts them.
TEXT = "1 + 2 = 3<|im_end|>\n<think>there are 7 circles</think>"

# Runs in the other environments: nothing of ours, nor jax, is installed there.
LOADER = """
import json, pathlib, sys
import numpy as np, torch, transformers
from transformers import AutoImageProcessor, AutoTokenizer, GenerationConfig
report = {}
text, chat = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    config = transformers.AutoConfig.from_pretrained(folder)
    build = getattr(transformers, config.architectures[0])
    model, info = build.from_pretrained(
        folder, torch_dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    case = dict(np.load(pathlib.Path(folder).parent / "case.npz"))
    ids = torch.tensor(case["ids"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = 0.0
    if "pixels" in case:
        inputs["pixel_values"] = torch.tensor(case["pixels"])
        inputs["image_grid_thw"] = torch.tensor(case["grid"])
        if transformers.__version__.startswith("5"):
            inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
        processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        seen = processor(images=[case["image"]], return_tensors="np")
        pixels = float(np.abs(seen["pixel_values"] - case["pixels"]).max())
    with torch.no_grad():
        logits = model.eval()(**inputs, use_cache=False).logits[0].numpy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    report[folder] = {
        "logits": float(np.abs(logits - case["logits"]).max()),
        "pixels": pixels,
        "keys": [len(info[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        "tokens": tokenizer.encode(text),
        "chat": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "eos": GenerationConfig.from_pretrained(folder).eos_token_id,
        "dtype": str(config.torch_dtype if hasattr(config, "torch_dtype") else config.dtype),
    }
print("REPORT" + json.dumps(report))
"""


def export_all(root: pathlib.Path) -> list[pathlib.Path]:
    """Saves, imports and exports each tiny model in fp32 and bf16; writes inputs and reference logits beside it."""
    import tiny_hf
    import torch

    from smallmath_jax.data.tiny_tokenizer import tiny_tokenizer
    from smallmath_jax.models import weights

    folders = []
    for kind in tiny_hf.KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            base = root / f"{kind}-{str(dtype).removeprefix('torch.')}"
            tiny_hf.make(kind, dtype).save_pretrained(base / "original")
            model = tiny_hf.make(
                kind
            )  # model.to(bfloat16).float() would have rotary tables in bf16
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter.to(dtype))
            case = tiny_hf.example(kind)
            case["logits"] = tiny_hf.torch_logits(model, case)
            np.savez(base / "case.npz", **case)
            imported, config = weights.import_folder(base / "original")
            out = base / "export"
            weights.export_folder(
                imported,
                config,
                out,
                source=base / "original",
                tokenizer=tiny_tokenizer(),
                max_shard_bytes=60_000 if dtype == torch.float32 else 5_000_000_000,
            )
            folders.append(out)
    return folders


def environment(version: str, cache: pathlib.Path) -> str:
    """The python of a virtual environment with this version of transformers, made when it is not there."""
    folder = cache / f"transformers-{version}"
    python = folder / "bin/python"
    probe = "import torch, PIL, transformers; print(transformers.__version__)"
    if python.exists():
        found = subprocess.run([python, "-c", probe], capture_output=True, text=True)
        if found.stdout.strip() == version:
            return str(python)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    packages = ["torch==2.13.0", f"transformers=={version}", "pillow", "jinja2"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return str(python)


def load(python: str, folders: list[pathlib.Path]) -> dict[str, dict]:
    """What the transformers of `python` makes of each folder; RuntimeError with its output when it fails."""
    command = [python, "-W", "ignore", "-c", LOADER, json.dumps([TEXT, CHAT]), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    if done.returncode or not lines:
        raise RuntimeError(f"{python}: loading failed\n{done.stdout}{done.stderr}")
    return json.loads(lines[-1].removeprefix("REPORT"))


def wrong(row: dict, folder: str) -> list[str]:
    """The names of the cells that are not as they should be."""
    from smallmath_jax.data.tiny_tokenizer import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    eos = row["eos"] if isinstance(row["eos"], list) else [row["eos"]]
    checks = {
        "logits": row["logits"] < LOGITS,
        "pixels": row["pixels"] < PIXELS,
        "keys": row["keys"] == [0, 0, 0],
        "tokens": row["tokens"] == tokenizer.encode(TEXT),
        "chat": row["chat"] == chat,
        "eos": 2 in eos,
        "dtype": row["dtype"].removeprefix("torch.") in folder,
    }
    return [name for name, good in checks.items() if not good]


def main() -> int:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = pathlib.Path(tempfile.gettempdir()) / "smallmath-transformers"
    parser.add_argument("--cache", type=pathlib.Path, default=default)
    parser.add_argument("--versions", nargs="*", default=["4.49.0", "4.57.6"])
    options = parser.parse_args()
    pythons = {transformers.__version__: sys.executable}
    for version in options.versions:
        pythons.setdefault(version, environment(version, options.cache))
    faults = 0
    with tempfile.TemporaryDirectory() as root:
        folders = export_all(pathlib.Path(root))
        print(
            f"{'transformers':14}{'export':24}{'max |d logits|':>16}{'max |d pixels|':>16}  verdict"
        )
        for version in sorted(pythons):
            for folder, row in load(pythons[version], folders).items():
                name = pathlib.Path(folder).parent.name
                bad = wrong(row, name)
                faults += len(bad)
                verdict = f"WRONG: {', '.join(f'{key} {row[key]}' for key in bad)}" if bad else "ok"
                print(f"{version:14}{name:24}{row['logits']:16.1e}{row['pixels']:16.1e}  {verdict}")
    print("all equal" if not faults else f"{faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
