"""What every config shares: model presets by mode, engine, optimiser, checkpoints, logging."""

import difflib

from ml_collections import ConfigDict

from smallmath_jax.data.rows import NAMES

# mode -> (hub name, family's grammar limits). Any of them can be replaced by --config.model=FOLDER.
MODELS = {
    "tiny": "tiny",
    "3b": "Qwen/Qwen2.5-VL-3B-Instruct",
    "7b": "Qwen/Qwen2.5-VL-7B-Instruct",
    "math1.5b": "Qwen/Qwen2.5-Math-1.5B",
    "math7b": "Qwen/Qwen2.5-Math-7B",
    "phi3": "microsoft/Phi-3-mini-4k-instruct",
}


def check_mode(mode: str | None, known=tuple(MODELS), default: str = "3b") -> str:
    """The mode, or the default; raises ValueError with the nearest names for an unknown one."""
    if not mode:
        return default
    if mode not in known:
        near = difflib.get_close_matches(mode, known, n=2, cutoff=0.3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown mode {mode!r}; {hint}Known: {', '.join(known)}")
    return mode


def base(task: str, mode: str) -> ConfigDict:
    """Fields every task has."""
    tiny = mode == "tiny"
    config = ConfigDict()
    config.task = task
    config.mode = mode
    config.seed = 0
    config.model = MODELS[mode]  # HF folder (local or gs://), hub name, or "tiny"
    config.init_from = ""  # another run's workdir: continue from its newest checkpoint
    config.compute_dtype = "float32" if tiny else "bfloat16"
    config.remat = "none" if tiny else "full"
    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "model": 1})
    config.prompt = ConfigDict(
        {
            "grammar": "think_answer",  # think_answer | code_steps
            "system": "auto",  # auto: the grammar's own instruction; "": none; else this text
            "prefix": "",  # text put after the generation prompt, for example "<think>"
            "max_tokens": 64 if tiny else 1024,  # longer prompts are dropped and counted
            "step_tokens": True,  # marks of a grammar in steps are tokens of their own; False: text
        }
    )
    config.vision = ConfigDict(
        {
            "min_pixels": 56 * 56 if tiny else 3136,
            "max_pixels": 56 * 56 if tiny else 512 * 28 * 28,  # 512 image tokens
            "max_patches": 16 if tiny else 4096,  # patches of one prompt; more: dropped and counted
        }
    )
    config.engine = ConfigDict(
        {
            "slots": 128 if tiny else 64,  # rows decoded together (per host)
            "cache_length": 128 if tiny else 3072,
            "prefill_chunk": 32 if tiny else 512,
            "decode_steps": 8 if tiny else 32,  # tokens between two looks at the queue
            "pages": 0
            if tiny
            else 64,  # cached prefixes, prefill_chunk tokens each; 0: half of what the slots hold
            # Chips of a host that share one copy of the weights, fewer where it has fewer; the slots are cut over the
            # copies, and these chips share the keys and values of a slot.
            "tensor_parallel": {"3b": 2, "7b": 4, "math7b": 4, "phi3": 4}.get(mode, 1),
        }
    )
    config.data = ConfigDict(
        {
            # Training problems that share text or pictures with these are left out: name what you will evaluate on.
            "decontaminate": () if tiny else ("math500",),
            # What files, hub and TFDS sets call our fields, where the usual names do not find them; none: ignore it.
            "fields": {name: "" for name in NAMES},
        }
    )
    config.lora = ConfigDict({"rank": 0, "alpha": 32.0, "targets": "text/layers/.*"})
    config.freeze = ""  # regex of parameter names that do not train, for example "vision/.*"
    # best: also keep the GRPO checkpoint with the highest value of this metric ("reward", "eval/accuracy"); "": none
    config.checkpoint = ConfigDict({"every": 100, "keep": 2, "best": ""})
    # A host without progress for so many seconds ends itself with its stacks (0: never); covers the first compile.
    config.watchdog_s = 0 if tiny else 1800
    config.log = ConfigDict({"every": 10 if tiny else 1, "samples_every": 20, "samples": 2})
    return config


def optimizer(learning_rate: float, **changes) -> ConfigDict:
    """AdamW settings; `schedule` is constant | linear | cosine, after `warmup_steps`."""
    settings = ConfigDict(
        {
            "name": "adamw",  # adamw | muon (kernels by muon, the rest by AdamW)
            "learning_rate": learning_rate,
            "muon_learning_rate": 0.02,
            "schedule": "constant",
            "warmup_steps": 0,
            "final_fraction": 0.0,  # of the learning rate, at the schedule's end
            "b1": 0.9,
            "b2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.0,
            "clip_norm": 1.0,
        }
    )
    settings.update(changes)
    return settings


def reward() -> ConfigDict:
    """Structured reward of Small-Math-R1, section 3.3; presets paper | literal | safe."""
    return ConfigDict(
        {
            "preset": "paper",
            "r0": 1.0,
            "r1": 1.0,
            "r2": 1.0,
            "ratio": 0.5,
            "target_length": 512,  # think tokens that earn the whole length reward
            "curve": "linear",  # linear | log
            "truncated": "mask",  # mask | broken | score
            "function": "",  # "module:function" replaces the preset
        }
    )


def sampling(max_tokens: int, temperature: float = 1.0) -> ConfigDict:
    return ConfigDict(
        {"temperature": temperature, "top_p": 1.0, "top_k": 0, "max_tokens": max_tokens}
    )


def evaluation(mode: str) -> ConfigDict:
    """What an evaluation runs. `problems` are sources: files, hf:, tfds:, tiny:…, or benchmark names."""
    tiny = mode == "tiny"
    max_tokens = 56 if tiny else 2048
    return ConfigDict(
        {
            "problems": ("tiny:test", "tiny:unseen") if tiny else ("math500",),
            "limit": 600 if tiny else 0,  # problems a source; 0: all
            "greedy": True,
            "samples": 1 if tiny else 0,  # sampled answers a problem, beside greedy
            "k": (1,),
            "sampling": sampling(max_tokens),
            "headline": "sampled"
            if tiny
            else "greedy",  # which of the two is the report's accuracy
            "lenient": True,  # lenient extraction reported beside strict
        }
    )
