"""The small shape every side runs: Qwen2, 8 layers, width 256, vocabulary 8192 (9.7M parameters, fp32), on CPU.

Variables of the environment: B rows decoded together (8), P prompt tokens (64), N new tokens (128), R repeats (5).
"""

import os
import statistics
import time
from collections.abc import Callable

LAYERS, WIDTH, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 8, 256, 1024, 8, 2, 32, 8192
ROWS = int(os.environ.get("B", 8))
PROMPT = int(os.environ.get("P", 64))
NEW = int(os.environ.get("N", 128))
REPEATS = int(os.environ.get("R", 5))


def measure(name: str, call: Callable[[int], object], tokens: int) -> None:
    """Prints the first call's seconds, then medians of tokens a second and tokens a CPU-second (all threads)."""
    wall, cpu = [], []
    for repeat in range(REPEATS + 1):
        started, used = time.perf_counter(), time.process_time()
        call(repeat)
        wall.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    first, wall, cpu = wall[0], wall[1:], cpu[1:]
    print(
        f"{name}: {tokens / statistics.median(cpu):.0f} tok/CPU-s, {tokens / statistics.median(wall):.0f} tok/s, "
        f"{statistics.median(cpu):.2f} CPU-s a call [{min(cpu):.2f}, {max(cpu):.2f}]; first call {first:.1f} s",
        flush=True,
    )


class NumberTokenizer:
    """For Tunix's sampler: "5 6 7" <-> [5, 6, 7]."""

    def encode(self, text: str, **_: object) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: object) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> None:
        return None

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0


def tunix_model(**changes: object) -> object:
    """Tunix's own Qwen2 of this shape, random."""
    from flax import nnx
    from tunix.models.qwen2 import model

    settings = dict(
        num_layers=LAYERS,
        vocab_size=VOCABULARY,
        embed_dim=WIDTH,
        hidden_dim=INTERMEDIATE,
        num_heads=HEADS,
        head_dim=HEAD_DIM,
        num_kv_heads=KV_HEADS,
        norm_eps=1e-6,
        rope_theta=1_000_000,
        use_tied_embedding=True,
    )
    return model.Qwen2(model.ModelConfig(**(settings | changes)), rngs=nnx.Rngs(0))
