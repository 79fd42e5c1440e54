"""A policy from a config: tokenizer, model, image settings, weights on their devices."""

import dataclasses
import json
import re
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath
from flax import nnx

from smallmath_jax.data.batches import Sequence
from smallmath_jax.data.images import ImageSettings
from smallmath_jax.data.prompts import GRAMMARS, attach_pixels, build_prompts
from smallmath_jax.data.tokens import Tokens, add_step_tokens, load_tokens
from smallmath_jax.models import folders, lora, weights
from smallmath_jax.models.config import ModelConfig, tiny_config
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.parallel import mesh as meshes
from smallmath_jax.parallel import rules
from smallmath_jax.records import Problem, Prompt
from smallmath_jax.train.checkpoint import Checkpoints

Reader = TypeVar("Reader", Prompt, Sequence)
VOCABULARY_ROWS = ("text/embed", "text/lm_head")  # [V, D]
KEPT_PIXEL_BYTES = 2**30  # decoded pictures kept in host memory; beyond it they are read when used


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model and what is needed to talk to it. `source` is the HF folder it came from (None: tiny)."""

    config: ModelConfig
    tokens: Tokens
    images: ImageSettings
    model: QwenVL
    source: str | None


def compute_dtype(config: Any) -> jnp.dtype:
    return jnp.dtype(config.compute_dtype)


def make_mesh(config: Any) -> jax.sharding.Mesh:
    return meshes.make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.model)


def load_policy(config: Any, mesh: jax.sharding.Mesh) -> Policy:
    """The policy that `config.model` and `config.init_from` name, fp32 master weights sharded over `mesh`.

    Raises ValueError or FileNotFoundError saying what is missing, before any training.
    """
    source = base_model(config.init_from) if config.init_from else config.model
    policy = (
        _tiny_policy(config, mesh) if source == "tiny" else _folder_policy(source, config, mesh)
    )
    marks = step_marks(config.prompt.grammar, config.prompt.step_tokens)
    if config.init_from:  # its marks keep their rows, whatever is asked of it now
        before = run_config(config.init_from)["prompt"]
        marks = tuple(
            {
                **dict.fromkeys(step_marks(before["grammar"], before["step_tokens"])),
                **dict.fromkeys(marks),
            }
        )
    policy = with_step_tokens(policy, marks)
    if config.init_from:
        policy = dataclasses.replace(
            policy, model=restore_run(config.init_from, policy.model, mesh)
        )
    if config.lora.rank:
        policy = dataclasses.replace(policy, model=add_lora(policy.model, config, mesh))
    _check_freeze(policy, config)
    return policy


def step_marks(grammar: str, step_tokens: bool) -> tuple[str, ...]:
    """The marks of a grammar that are tokens of their own."""
    return GRAMMARS[grammar].marks if step_tokens else ()


def settle_grammar(config: Any) -> None:
    """Sets a `config.prompt.grammar` of "auto": that of the run in `init_from` and its form, else think_answer."""
    if config.prompt.grammar != "auto":
        return
    config.prompt.grammar = "think_answer"
    if config.init_from:
        before = run_config(config.init_from)["prompt"]
        config.prompt.grammar = before["grammar"]
        config.prompt.step_tokens = before["step_tokens"]


def _check_freeze(policy: Policy, config: Any) -> None:
    """Raises ValueError for a `freeze` that has no effect: a misspelt one would train everything in silence."""
    if not config.freeze:
        return
    if config.lora.rank:
        raise ValueError(
            "config.freeze and config.lora.rank: with adapters nothing else trains; leave freeze empty"
        )
    names = [name for name, _ in named_leaves(policy.model)]
    if not any(re.fullmatch(config.freeze, name) for name in names):
        some = ", ".join(names[:: max(len(names) // 6, 1)])
        raise ValueError(
            f"config.freeze={config.freeze!r} matches the whole name of no parameter; names look like {some}"
        )


def base_model(workdir: str) -> str:
    """The folder (or "tiny") that a run's weights first came from: its tokenizer and shapes hold for the run."""
    config = run_config(workdir)
    return base_model(config["init_from"]) if config["init_from"] else config["model"]


def run_config(workdir: str) -> dict[str, Any]:
    """The resolved config a run wrote. Raises FileNotFoundError when `workdir` is no run."""
    root = epath.Path(workdir)
    # A stage's folder has its run's: the cold start of a GRPO run, a round's policy (RUN/round_2/sft)
    places = (root, root.parent, root.parent.parent) if (root / "checkpoints").exists() else (root,)
    found = [place / "config.json" for place in places if (place / "config.json").exists()]
    path = found[0] if found else root / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir}: no config.json of a run there; give the folder a run printed as its workdir "
            "(a Hugging Face folder goes into --config.model)"
        )
    record = json.loads(path.read_text())
    if "config" not in record:
        raise ValueError(
            f"{workdir}: a Hugging Face folder and not a run's workdir; give it as --config.model, or the workdir it "
            "was exported from"
        )
    return record["config"]


def restore_run(workdir: str, model: QwenVL, mesh: jax.sharding.Mesh, step: int = -1) -> QwenVL:
    """The model of a run's newest (or given) checkpoint, on this run's devices, its LoRA merged."""
    settings = ml_collections.ConfigDict(run_config(workdir))
    if settings.lora.rank:
        model = add_lora(model, settings, mesh)
    try:
        return lora.merge_lora(restore_model(newest_checkpoints(workdir), model, mesh, step))
    except ValueError as error:
        if "value_head" not in str(error):
            raise
        raise ValueError(
            f"init_from={workdir}: a preference model, and no policy; it goes into --config.judge"
        ) from error


def restore_model(
    folder: epath.Path, model: QwenVL, mesh: jax.sharding.Mesh, step: int = -1
) -> QwenVL:
    """The model of a checkpoints folder, as `model` is shaped."""
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore_model(
            like=model, shardings=rules.shardings(model, mesh), step=step
        )


def newest_checkpoints(workdir: str) -> epath.Path:
    """The checkpoints folder of a run's policy: its own, else its SFT stage's, else that of its last finished round.

    Raises FileNotFoundError when there is none yet, ValueError for a Hugging Face folder.
    """
    run_config(workdir)
    root = epath.Path(workdir)
    for folder in (root / "checkpoints", root / "sft" / "checkpoints"):
        if _has_steps(folder):
            return folder
    return _of_last_round(root, "sft") or _no_checkpoint(
        root,
        f"{root} has no checkpoint in checkpoints/ or sft/checkpoints/; has the run saved one yet?",
    )


def judge_checkpoints(workdir: str) -> epath.Path:
    """The checkpoints folder of a run's preference model: its own, or that of its last finished round.

    Raises FileNotFoundError when there is none yet, ValueError when the run trains no preference model.
    """
    root = epath.Path(workdir)
    if "ppm" not in run_config(workdir):
        raise ValueError(
            f"judge={workdir}: that run trains no preference model; give the workdir of configs/ppm.py or "
            "configs/evolve.py"
        )
    if _has_steps(root / "checkpoints"):
        return root / "checkpoints"
    return _of_last_round(root, "ppm") or _no_checkpoint(
        root, f"{root} has no checkpoint in checkpoints/; has the run saved one yet?"
    )


def _has_steps(folder: epath.Path) -> bool:
    return folder.exists() and any(child.name.isdigit() for child in folder.iterdir())


def _of_last_round(root: epath.Path, stage: str) -> epath.Path | None:
    """A stage's checkpoints in the last round of a self-evolution whose every stage is done."""
    done = root.glob("round_*/evaluate/done.json") if root.exists() else ()
    rounds = [path.parent.parent for path in done if (path.parent.parent / stage).exists()]
    last = max(rounds, key=lambda path: int(path.name.removeprefix("round_")), default=None)
    return last / stage / "checkpoints" if last else None


def _no_checkpoint(root: epath.Path, otherwise: str) -> NoReturn:
    if root.exists() and any(root.glob("round_*")):
        first = f"; its first policy is {root}/bootstrap" if (root / "bootstrap").exists() else ""
        raise FileNotFoundError(f"{root}: no round of this self-evolution is finished yet{first}")
    raise FileNotFoundError(otherwise)


def copied(policy: Policy) -> Policy:
    """The policy with weights of its own: training uses those it is given up."""
    return dataclasses.replace(policy, model=jax.tree.map(jnp.copy, policy.model))


def add_lora(model: QwenVL, config: Any, mesh: jax.sharding.Mesh) -> QwenVL:
    adapted = lora.add_lora(
        model, config.lora.rank, config.lora.alpha, config.lora.targets, jax.random.key(config.seed)
    )
    return jax.device_put(adapted, rules.shardings(adapted, mesh))


def with_step_tokens(policy: Policy, marks: tuple[str, ...]) -> Policy:
    """The policy with a token for each mark its tokenizer lacks; a new token's rows are the mean of all others.

    Raises ValueError when the vocabulary has no unused rows left.
    """
    known = policy.tokens.tokenizer.get_vocab()
    tokens = add_step_tokens(policy.tokens, marks) if marks else policy.tokens
    fresh = [tokens.step_ids[mark] for mark in marks if mark not in known]
    if not fresh:
        return dataclasses.replace(policy, tokens=tokens)
    used = jnp.asarray(sorted(known.values()), jnp.int32)

    def filled(name: str, leaf: jax.Array) -> jax.Array:
        if name not in VOCABULARY_ROWS:
            return leaf
        rows = leaf.at[jnp.asarray(fresh)].set(leaf[used].mean(0))
        return jax.device_put(rows, leaf.sharding)

    return dataclasses.replace(policy, tokens=tokens, model=map_named(filled, policy.model))


def trainable(config: Any) -> str | None:
    """Regex of the names that train: with LoRA its leaves and a value head, else all but `config.freeze`."""
    if config.lora.rank:
        return r".*/lora_[ab]|value_head/.*"
    return rf"(?!(?:{config.freeze})$).*" if config.freeze else None


def _tiny_policy(config: Any, mesh: jax.sharding.Mesh) -> Policy:
    tokens = load_tokens("tiny")
    model_config = tiny_config(
        vocab_size=tokens.vocab_rows,
        image_token_id=tokens.image_id,
        video_token_id=tokens.video_id,
        vision_start_token_id=tokens.vision_start,
        vision_end_token_id=tokens.vision_end,
        eos_ids=tokens.eos_ids,
        pad_id=tokens.pad_id,
    )
    make = lambda: _ready_to_learn(QwenVL(model_config, rngs=nnx.Rngs(config.seed)))
    model = jax.jit(make, out_shardings=rules.shardings(jax.eval_shape(make), mesh))()
    return Policy(model_config, tokens, _image_settings(config, model_config), model, None)


def _ready_to_learn(model: QwenVL) -> QwenVL:
    """Kernels of standard deviation 1 / sqrt(inputs), and blocks that begin as the identity.

    The usual 0.02 suits widths of thousands; at width 128 it costs a third of the cold start.
    """

    def scaled(name: str, kernel: jax.Array) -> jax.Array:
        if not name.endswith("/kernel"):
            return kernel
        if name.split("/")[-2] in ("o", "down", "proj"):
            return jnp.zeros_like(kernel)
        return kernel / kernel.std() * kernel.shape[-2] ** -0.5

    return map_named(scaled, model)


def _folder_policy(source: str, config: Any, mesh: jax.sharding.Mesh) -> Policy:
    folder = folders.locate(source)
    model_config = weights.read_config(folder)
    tokens = load_tokens(folder, vocab_rows=model_config.text.vocab_size)
    model, model_config = weights.import_folder(
        folder, shardings=lambda abstract: rules.shardings(abstract, mesh)
    )
    return Policy(model_config, tokens, _image_settings(config, model_config), model, folder)


def _image_settings(config: Any, model_config: ModelConfig) -> ImageSettings:
    settings = ImageSettings(
        min_pixels=config.vision.min_pixels, max_pixels=config.vision.max_pixels
    )
    vision = model_config.vision
    if vision is None:
        return settings
    return dataclasses.replace(
        settings,
        patch=vision.patch,
        temporal_patch=vision.temporal_patch,
        merge=vision.merge,
        window=vision.window,
        tokens_per_second=vision.tokens_per_second,
    )


def prompts_for(
    problems: list[Problem], policy: Policy, config: Any, prefix: str | None = None
) -> tuple[list[Problem], list[Prompt], dict[str, int]]:
    """Prompts of the problems that fit; what did not fit is counted by reason, never cut.

    Pictures are decoded here when all their patches fit into KEPT_PIXEL_BYTES, else at their use (`with_pixels`).
    """
    system = config.prompt.system
    told = [
        problem for problem in problems if not problem.images or policy.config.vision is not None
    ]
    pairs, dropped = build_prompts(
        told,
        policy.tokens,
        GRAMMARS[config.prompt.grammar],
        policy.images,
        max_tokens=config.prompt.max_tokens,
        max_patches=config.vision.max_patches,
        over="drop",
        system=None if system == "auto" else system,
        prefix=config.prompt.prefix if prefix is None else prefix,
        pixels=False,
    )
    if len(told) < len(problems):
        dropped["image_for_a_text_model"] = len(problems) - len(told)
    patches = sum(int(prompt.grids.prod(-1).sum()) for _, prompt in pairs)
    if patches and patches * policy.config.vision.patch_values * 4 <= KEPT_PIXEL_BYTES:
        pairs = [(problem, with_pixels(prompt, problem, policy)) for problem, prompt in pairs]
    return [problem for problem, _ in pairs], [prompt for _, prompt in pairs], dropped


def with_pixels(reader: Reader, problem: Problem, policy: Policy) -> Reader:
    """The prompt or sequence with its pictures decoded; itself when it has none or has them already."""
    if reader.pixels is not None or not len(reader.grids):
        return reader
    return attach_pixels(reader, problem, policy.images)
