"""Checkpoints by orbax: asynchronous, the newest N and the best one kept, restored onto any mesh.

A step's folder holds three items: `model` (parameters by slash name), `rest` (step and optimizer moments) and
`cursor` (JSON: where the data stood). Arrays are stored by name, so neither flax's nor optax's classes are in the
file, and a model is read without its moments. A folder gets its final name only when it is complete.
"""

import errno
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from smallmath_jax.models.tree import map_named, named_leaves
from smallmath_jax.parallel import hosts
from smallmath_jax.train.step import TrainState

_UNFINISHED = ".orbax-checkpoint-tmp"
RETRY_PAUSES = (
    2.0,
    10.0,
    30.0,
)  # seconds before a checkpoint that could not be reached is read again
# What object stores and tensorstore say of a whole file that they do not hand over now.
_OUT_OF_REACH = re.compile(
    r"unavailable|deadline.exceeded|aborted|cancelled|permission_denied|unauthenticated|timed out"
    r"|(http|status|code|error)\W{1,3}(code\W{1,3})?(429|50[0-4])\b"
)


class Checkpoints:
    """The checkpoints of one run, in `folder` (local or gs://). Every host makes the same calls in the same order.

    Args:
        folder: made when it is not there.
        keep: newest checkpoints kept.
        best_metric: also keep the checkpoint with the best value of this metric of `save`; "" for none.
        best_mode: "max" or "min".
        asynchronous: write in the background; `save` then returns when the arrays are copied.
    """

    def __init__(
        self,
        folder: str | epath.Path,
        keep: int = 2,
        best_metric: str = "",
        best_mode: str = "max",
        asynchronous: bool = True,
    ):
        self.folder = epath.Path(folder)
        if not str(folder).startswith("gs://"):
            self.folder = self.folder.expanduser().resolve()  # orbax takes absolute paths only
        best_of = (lambda metrics: metrics[best_metric]) if best_metric else None
        kept = [policies.LatestN(keep)]
        if best_of:
            kept.append(policies.BestN(get_metric_fn=best_of, reverse=best_mode == "min", n=1))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            best_fn=best_of,
            best_mode=best_mode,
            step_format_fixed_length=8,
            enable_async_checkpointing=asynchronous,
        )
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the best metric among those kept; None without `best_metric`."""
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        cursor: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        """Starts writing a checkpoint; the state may be donated to the next update at once.

        Logs up to `step` must be published before (`MetricWriter.flush`): a checkpoint never runs ahead of its logs.
        A step that is there already is not written again.

        Args:
            cursor: JSON-able, given back by `restore` with "step" added.
            metrics: must hold `best_metric`, when there is one.

        Raises:
            OSError: this or the previous write failed for want of disk space.
        """
        if step in self._manager.all_steps():
            return
        items = {
            "model": ocp.args.StandardSave(_by_name(state.model)),
            "rest": ocp.args.StandardSave(_rest(state)),
            "cursor": ocp.args.JsonSave({**(cursor or {}), "step": step}),
        }
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        write = lambda: self._manager.save(
            step, args=ocp.args.Composite(**items), metrics=numbers or None, force=True
        )
        self._guard(write, step)

    def wait(self) -> None:
        """Waits until what was saved is complete on disk. Raises as `save`."""
        self._guard(self._manager.wait_until_finished, self._manager.latest_step())

    def close(self) -> None:
        """`wait`, and frees the background threads."""
        self._guard(self._manager.close, self._manager.latest_step())

    def restore(
        self, like: TrainState, shardings: TrainState | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """(state, cursor) of the newest checkpoint that can be read, or None when there is none.

        What a kill left unfinished is deleted. A checkpoint that every host finds damaged is set aside as
        `damaged-STEP`, with a message, and the one before it is read; one that is out of reach on any host is tried
        again after RETRY_PAUSES, by all hosts together. Call it once, before the first `save`.

        Args:
            like: a state of the wanted shapes and dtypes: arrays or jax.ShapeDtypeStruct.
            shardings: of the result, on any mesh; None: as `like`.

        Raises:
            ValueError: the checkpoint holds other parameters, naming the first difference.
            OSError: the newest checkpoint is out of reach, or the hosts do not agree on it; nothing is moved.
            MemoryError: it does not fit; so does RESOURCE_EXHAUSTED of the device, as it is.
            RuntimeError: there are checkpoints and none can be read.
        """
        self._drop_unfinished()
        target = like if shardings is None else _placed(like, shardings)
        steps = hosts.broadcast(sorted(self._manager.all_steps(), reverse=True))
        damaged: dict[int, Exception] = {}
        for step in steps:
            wanted = {"model": _by_name(target.model), "rest": _rest(target)}
            found, error = self._read_together(step, wanted)
            if error is not None:
                damaged[step] = error
                continue
            self._set_aside(damaged, step)
            rest = _from_names({"step": target.step, "opt_state": target.opt_state}, found["rest"])
            model = _from_names(target.model, found["model"])
            return TrainState(rest["step"], model, rest["opt_state"]), found["cursor"]
        if damaged:
            step, error = next(iter(damaged.items()))
            raise RuntimeError(
                f"{self.folder}: none of the checkpoints {steps} can be read; the newest ({step}) says: {error}. "
                "Give a new --workdir to start again, or restore the folder from a copy"
            ) from error
        return None

    def restore_model(self, like: Any, shardings: Any = None, step: int = -1) -> Any:
        """The model of a checkpoint, without its moments: step -1 is the newest. Changes nothing in the folder.

        Raises:
            FileNotFoundError: no such checkpoint.
            ValueError: it holds other parameters.
        """
        steps = sorted(self._manager.all_steps())
        step = steps[-1] if step == -1 and steps else step
        if step not in steps:
            raise FileNotFoundError(
                f"{self.folder}: no checkpoint of step {step}; there are {steps or 'none'}"
            )
        target = like if shardings is None else _placed(like, shardings)
        try:
            found = self._read(step, {"model": _by_name(target)})
        except _Different as error:
            raise ValueError(str(error)) from None
        return _from_names(target, found["model"])

    def _open(self) -> ocp.CheckpointManager:
        handlers = {
            "model": ocp.StandardCheckpointHandler(),
            "rest": ocp.StandardCheckpointHandler(),
            "cursor": ocp.JsonCheckpointHandler(),
        }
        return ocp.CheckpointManager(self.folder, options=self._options, item_handlers=handlers)

    def _read(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
        items: dict[str, Any] = {"cursor": ocp.args.JsonRestore()}
        for item, tree in wanted.items():
            self._check_names(step, item, tree)
            items[item] = ocp.args.StandardRestore(jax.tree.map(_abstract, tree))
        return dict(self._manager.restore(step, args=ocp.args.Composite(**items)).items())

    def _read_together(
        self, step: int, wanted: dict[str, Any]
    ) -> tuple[dict[str, Any], None] | tuple[None, Exception]:
        """(what every host has read, None), or (None, error) when every host finds the checkpoint damaged.

        All hosts take the same turns and come to the same end. Raises as `restore` for everything else.
        """
        for pause in (*RETRY_PAUSES, None):
            found, error = None, None
            try:
                found = self._read(step, wanted)
            except Exception as caught:  # orbax and tensorstore raise many kinds for damaged files
                error = caught
            told = hosts.gather([_kind(error), _first_line(error)])
            kinds = [kind for kind, _ in told]
            if set(kinds) == {"read"}:
                return found, None
            if set(kinds) == {"damaged"}:
                return None, error
            if "memory" in kinds or "different" in kinds or pause is None:
                break
            _say(
                f"checkpoint {self.folder}/{step:08d}: {_by_host(told)}; trying again in {pause} s"
            )
            time.sleep(pause)
        if isinstance(error, _Different):
            raise ValueError(str(error)) from None
        if _kind(error) == "memory":
            raise error
        kind = "memory" if "memory" in kinds else "out of reach"
        raise (MemoryError if kind == "memory" else OSError)(
            f"{self.folder / f'{step:08d}'} is not read by every host: {_by_host(told)}. Nothing was changed; "
            "start again with the same command when the folder can be read"
        ) from error

    def _check_names(self, step: int, item: str, tree: Any) -> None:
        """Raises _Different when the checkpoint holds other names or shapes than `tree`."""
        metadata = self._manager.item_metadata(step)[item]
        if metadata is None:
            raise FileNotFoundError(f"{self.folder / f'{step:08d}'} has no {item}")
        stored = {name: tuple(leaf.shape) for name, leaf in named_leaves(metadata)}
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(tree)}
        for name in sorted(set(stored) | set(wanted)):
            if stored.get(name) != wanted.get(name):
                raise _Different(
                    f"{self.folder / f'{step:08d}'}: {item} {name} has shape {stored.get(name, 'none')} in the "
                    f"checkpoint and {wanted.get(name, 'none')} in this run; use the config the run was started with, "
                    "or a new --workdir"
                )

    def _drop_unfinished(self) -> None:
        if hosts.host_index() == 0:
            for path in self.folder.glob(f"*{_UNFINISHED}*"):
                _say(f"{path.name} was cut off while it was written; it is deleted")
                path.rmtree()
        hosts.barrier("drop unfinished checkpoints")

    def _set_aside(self, damaged: dict[int, Exception], restored: int) -> None:
        """Moves damaged folders out of the way, so that their steps can be saved again."""
        if not damaged:
            return
        for step, error in damaged.items():
            _say(
                f"checkpoint {self.folder}/{step:08d} cannot be read ({_first_line(error)}); it is set aside as "
                f"damaged-{step:08d}, continuing from step {restored}"
            )
            failed = hosts.broadcast(self._move(step) if hosts.host_index() == 0 else "")
            if failed:
                raise OSError(
                    f"{self.folder / f'{step:08d}'} is damaged and cannot be set aside: {failed}. Move it away by "
                    "hand, then start again with the same command"
                )
        self._manager.reload()

    def _move(self, step: int) -> str:
        """Renames a step's folder to damaged-STEP; what went wrong, or ""."""
        source, target = self.folder / f"{step:08d}", self.folder / f"damaged-{step:08d}"
        try:
            if target.exists():
                target.rmtree()
            source.rename(target)
        except OSError as error:
            return _first_line(error)
        return ""

    def _guard(self, action: Callable[[], Any], step: int | None) -> None:
        """Runs a write; a full disk becomes one message that says what to do."""
        try:
            action()
        except Exception as error:
            if not _disk_is_full(error):
                raise
            raise OSError(
                errno.ENOSPC,
                f"the disk is full: checkpoint of step {step} in {self.folder} could not be written"
                f"{_space(self.folder)}. Free space or lower config.checkpoint.keep, then give the same command: "
                "earlier checkpoints are whole",
            ) from error


class _Different(Exception):
    """The checkpoint is whole, but of another model or optimizer."""


def _kind(error: Exception | None) -> str:
    """read | different | memory | out of reach | damaged: what an attempt to read a checkpoint came to."""
    if error is None:
        return "read"
    if isinstance(error, _Different):
        return "different"
    chain = list(_chain(error))
    texts = " ".join(str(one) for one in chain).lower()
    memory = any(isinstance(one, MemoryError) for one in chain)
    if memory or "resource_exhausted" in texts or "out of memory" in texts:
        return "memory"
    content = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
    refused = any(isinstance(one, OSError) and not isinstance(one, content) for one in chain)
    return "out of reach" if refused or _OUT_OF_REACH.search(texts) else "damaged"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: Exception | None) -> str:
    text = str(error).strip() if error is not None else "read"
    return text.splitlines()[0] if text else repr(error)


def _by_host(told: list[list[str]]) -> str:
    """What each host came to, those that agree told once."""
    lines: dict[str, list[int]] = {}
    for host, (kind, reason) in enumerate(told):
        lines.setdefault("read" if kind == "read" else f"{kind} ({reason})", []).append(host)
    return "; ".join(f"host {', '.join(map(str, who))}: {what}" for what, who in lines.items())


def _by_name(tree: Any) -> dict[str, Any]:
    """Nested dicts of a tree's leaves: text/layers/q/kernel -> {"text": {"layers": ...}}."""
    nested: dict[str, Any] = {}
    for name, leaf in named_leaves(tree):
        *folders, last = name.split("/")
        place = nested
        for folder in folders:
            place = place.setdefault(folder, {})
        place[last] = leaf
    return nested


def _rest(state: TrainState) -> dict[str, Any]:
    return _by_name({"step": state.step, "opt_state": state.opt_state})


def _from_names(like: Any, nested: dict[str, Any]) -> Any:
    leaves = dict(named_leaves(nested))
    return map_named(lambda name, _: leaves[name], like)


def _placed(like: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        like,
        shardings,
    )


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _disk_is_full(error: BaseException) -> bool:
    full = lambda one: isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(full(one) or "no space left on device" in str(one).lower() for one in _chain(error))


def _space(folder: epath.Path) -> str:
    if str(folder).startswith("gs://"):
        return ""
    usage = shutil.disk_usage(folder)
    return f" ({usage.free / 2**30:.1f} of {usage.total / 2**30:.1f} GiB are free)"


def _say(message: str) -> None:
    if hosts.host_index() == 0:
        print(message, file=sys.stderr, flush=True)
