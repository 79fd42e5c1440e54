"""Many hosts, one program: start-up, agreement between hosts, batches and weight copies, the hang watchdog.

Every host runs the same command and calls these functions in the same order. On one host each of them
is a plain local operation, so no caller asks how many hosts there are.
"""

import contextlib
import faulthandler
import glob
import importlib.util
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from smallmath_jax.parallel.mesh import local_mesh, make_mesh
from smallmath_jax.parallel.rules import batch_sharding, shardings

_BEATS: list[Callable[[str], None]] = []  # of the watchdogs that are on
HANG_EXIT_CODE = 86  # a supervisor can tell a hang from a crash, and start the run again


def initialize(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Joins the hosts of a run; call it before the first use of a device. Calling it again changes nothing.

    On a TPU VM everything is read from the VM's metadata. Elsewhere (GPU hosts, CPU tests) give coordinator
    "HOST:PORT", the host count and this host's index, or set SMALLMATH_COORDINATOR, SMALLMATH_HOSTS and
    SMALLMATH_HOST. SMALLMATH_HOSTS=1 alone keeps a TPU VM to itself, without metadata.

    Raises:
      ValueError: only some of the three are given.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = coordinator or os.environ.get("SMALLMATH_COORDINATOR")
    count = int(os.environ.get("SMALLMATH_HOSTS") or 0) if count is None else count
    index = int(os.environ.get("SMALLMATH_HOST") or -1) if index is None else index
    if count == 1:
        return
    given = [bool(coordinator), count > 1, index >= 0]
    if any(given) and not all(given):
        raise ValueError(
            "hosts: coordinator, host count and host index go together; set SMALLMATH_COORDINATOR=HOST:PORT, "
            "SMALLMATH_HOSTS and SMALLMATH_HOST on every host, or none of them"
        )
    if all(given):
        if jax.config.jax_platforms == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes=count, process_id=index)
    elif _has_tpu():
        jax.distributed.initialize()


def _has_tpu() -> bool:
    """Whether this machine has TPU chips that jax will use; looks at files, starts no backend."""
    if "tpu" not in (jax.config.jax_platforms or "tpu") or os.environ.get("TPU_SKIP_MDS_QUERY"):
        return False
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def host_index() -> int:
    """This host's number, 0 for the one that writes what all share."""
    return jax.process_index()


def host_count() -> int:
    return jax.process_count()


def host_names() -> list[str]:
    """The name of every host, in order of their index."""
    return gather(socket.gethostname())


def barrier(name: str) -> None:
    """Waits until every host is here. `name` must be the same on all of them."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Every host's JSON-able value, in host order, on every host."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).ravel()
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def broadcast(value: Any) -> Any:
    """Host 0's JSON-able value on every host; what the others pass is ignored."""
    return gather(value if jax.process_index() == 0 else None)[0]


def any_host(flag: bool) -> bool:
    """Whether the flag is up on any host: SIGTERM reaches one host first, all must stop at the same step."""
    return any(gather(bool(flag)))


def share(items: list[Any]) -> list[Any]:
    """This host's share of a list that is the same on every host: every host_count-th item."""
    return items[jax.process_index() :: jax.process_count()]


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """The rows of a global batch of `rows` that this host brings to `global_batch`, in order.

    Raises ValueError when the mesh does not divide the rows.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shards:
        raise ValueError(
            f"a batch of {rows} rows cannot be cut over data * fsdp = {shards} shards; "
            "make the rows a multiple of it, or move devices from mesh.data or mesh.fsdp to mesh.model"
        )
    pieces = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (piece,) in pieces for row in range(*piece.indices(rows))})


def global_batch(batch: Any, mesh: Mesh, leading: int = 0) -> Any:
    """Global arrays from each host's own rows (`local_rows`), row axis after `leading` uncut axes.

    `batch`: a tree of numpy arrays [..., local rows, ...]; no host ever holds another's rows.
    """
    sharding = batch_sharding(mesh, leading)
    place = lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x))
    return jax.tree.map(place, batch)


def local_copy(model: Any, dtype: Any = jnp.bfloat16, tensor_parallel: int = 1) -> Any:
    """A whole copy of the weights for this host's rollouts: on its own devices, no other host in its programs.

    With `tensor_parallel` = 1 every device of the host holds all of it; else heads, MLP and vocabulary are cut over
    that many devices of the host. The result lives on `local_mesh(tensor_parallel)`.
    Every host must call this together: the weights are gathered across hosts once, in `dtype`.
    """
    local = local_mesh(tensor_parallel)
    whole = make_mesh(-1, 1, tensor_parallel, sorted(jax.devices(), key=_by_host))
    copy = jax.jit(
        lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree),
        out_shardings=shardings(model, whole),
    )(model)

    def pick(x: jax.Array, sharding: Any) -> jax.Array:
        pieces = {shard.device: shard.data for shard in x.addressable_shards}
        devices = sharding.addressable_devices_indices_map(x.shape)
        return jax.make_array_from_single_device_arrays(
            x.shape, sharding, [pieces[device] for device in devices]
        )

    return jax.tree.map(pick, copy, shardings(model, local))


def _by_host(device: Any) -> tuple[int, int]:
    return device.process_index, device.id


@contextlib.contextmanager
def watchdog(
    limit_s: float, stop: Callable[[int], None] = os._exit, every_s: float = 5.0
) -> Iterator[Callable[[str], None]]:
    """Ends this process when no progress was reported for `limit_s` seconds: a hung host is not a dead one.

    Yields `beat(what)`; call it at every step, and with a longer-lived `what` before a long compile (the limit must
    cover it). On a hang all threads' stacks go to stderr and the process exits with HANG_EXIT_CODE; jax's own runtime
    then ends the other hosts, and the same command continues from the last checkpoint. A limit of 0 turns it off.
    Code that knows of no watchdog calls `hosts.beat`.
    """
    last = [time.monotonic(), "the start"]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(every_s, limit_s / 4)):
            idle = time.monotonic() - last[0]
            if idle > limit_s:
                print(
                    f"host {jax.process_index()} ({socket.gethostname()}): no progress for {idle:.0f} s "
                    f"since {last[1]}; stacks follow, exit {HANG_EXIT_CODE}. Start the run again to continue.",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(file=sys.stderr)
                stop(HANG_EXIT_CODE)
                return

    def beat(what: str = "a step") -> None:
        last[:] = [time.monotonic(), what]

    if limit_s > 0:
        threading.Thread(target=watch, name="watchdog", daemon=True).start()
    _BEATS.append(beat)
    try:
        yield beat
    finally:
        _BEATS.remove(beat)
        done.set()


def beat(what: str = "a step") -> None:
    """Tells every watchdog that is on that there was progress; nothing where none is."""
    for one in _BEATS:
        one(what)


def same_everywhere(values: Mapping[str, Any]) -> None:
    """Raises ValueError on every host, naming the first value that differs (a config's field, a data set's digest)."""
    first, *others = gather(dict(values))
    for index, other in enumerate(others, 1):
        for name in dict.fromkeys((*first, *other)):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"host 0 has {name} = {first.get(name)!r}, host {index} has {other.get(name)!r}; "
                    "start every host with the same command, code and data"
                )
