"""Shared by the sandbox's tests: starting it with limits that make attacks end soon."""

import dataclasses

from smallmath_jax.verify.sandbox import Result, Sandbox, SandboxSettings

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
