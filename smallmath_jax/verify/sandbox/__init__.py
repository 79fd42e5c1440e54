"""Running model-written Python: isolated, limited, exact.

    with start_sandbox(SandboxSettings(workers=8)) as sandbox:
        results = sandbox.run_many([("x = 2", "print(x + 1)")])

`docs/sandbox.md` says what it protects against and what it does not.
"""

from typing import TYPE_CHECKING, Any

from smallmath_jax.verify.sandbox.protocol import (
    Result,
    SandboxBusy,
    SandboxError,
    SandboxSettings,
)

if TYPE_CHECKING:
    from smallmath_jax.verify.sandbox.client import Sandbox, start_sandbox

__all__ = ["Result", "Sandbox", "SandboxBusy", "SandboxError", "SandboxSettings", "start_sandbox"]


def __getattr__(name: str) -> Any:
    """The client on first use: workers import this package too, and what they have loaded every fork copies."""
    if name not in ("Sandbox", "start_sandbox"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smallmath_jax.verify.sandbox import client

    return getattr(client, name)
