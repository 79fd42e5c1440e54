"""Host-only rooms never load jax: they run in worker processes and before any device is touched."""

import pathlib
import subprocess
import sys

import pytest

import smallmath_jax

ROOT = pathlib.Path(smallmath_jax.__file__).parent
HOST_ROOMS = ("data", "verify", "search", "report")


def modules():
    yield "smallmath_jax.records"
    for room in HOST_ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            if parts[-1] not in ("__init__", "__main__"):
                yield ".".join(parts)


PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = sorted({module.split(".")[0] for module in sys.modules} & {"jax", "flax", "torch", "tensorflow"})
    if loaded:
        sys.exit(f"{name} loads {loaded}")
"""


def test_importing_them_all_in_a_fresh_process_loads_no_jax():
    names = list(modules())
    assert len(names) > 5
    run = subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


USES = """
import sys
from smallmath_jax.data.problems import load_problems
from smallmath_jax.data.prompts import GRAMMARS, build_prompt, load_tokens
from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.batches import collate, make_sequence
tokens = load_tokens("tiny")
settings = ImageSettings(max_pixels=56 * 56)
for problem in load_problems("tiny", limit=12):
    prompt = build_prompt(problem, tokens, GRAMMARS["think_answer"], settings)
    collate([[make_sequence(prompt, [1, 2])]], 128, 64, settings, tokens.image_id, tokens.video_id)
sys.exit("jax was loaded" if "jax" in sys.modules else 0)
"""


@pytest.mark.parametrize("program", [USES])
def test_using_them_loads_no_jax(program):
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
