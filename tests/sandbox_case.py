"""Shared by the sandbox's tests: starting it with limits that make attacks end soon."""

import dataclasses
import os
import pathlib
import sys

from smallmath_jax.verify.sandbox import Result, Sandbox, SandboxSettings, linux

# The wall limit is far away: on a busy machine a program may wait long for its CPU time.
SMALL = SandboxSettings(
    workers=1,
    cpu_seconds=0.4,
    wall_seconds=90.0,
    memory_mb=150,
    output_bytes=100_000,
    memo_entries=0,
    snapshots=3,
)


def small(**changes) -> SandboxSettings:
    return dataclasses.replace(SMALL, **changes)


def run(sandbox: Sandbox, code: str, prefix: str = "") -> Result:
    return sandbox.run_many([(prefix, code)])[0]


def run_all(sandbox: Sandbox, *codes: str, prefix: str = "") -> list[Result]:
    return sandbox.run_many([(prefix, code) for code in codes])


def become_nobody() -> None:
    """Goes on as user 65534; a home that only root may enter is opened, in this process's mount namespace alone."""
    root = str(pathlib.Path(__file__).parent.parent)
    folders = [root, *map(os.path.realpath, (sys.prefix, sys.base_prefix))]
    linux.call("unshare", linux.CLONE_NEWNS)
    linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    for folder in folders:
        parts = folder.split("/")
        for end in range(2, len(parts) + 1):
            place = "/".join(parts[:end])
            if not os.stat(place).st_mode & 1:
                opened = os.open(folder, os.O_PATH)
                linux.mount("tmpfs", place, "tmpfs", 0, "mode=755")
                os.makedirs(folder, exist_ok=True)
                linux.mount(f"/proc/self/fd/{opened}", folder, "", linux.MS_BIND | linux.MS_REC)
                os.close(opened)
                break
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
