"""Running model-written Python: isolated, limited, exact.

    with start_sandbox(SandboxSettings(workers=8)) as sandbox:
        results = sandbox.run_many([("x = 2", "print(x + 1)")])

`docs/sandbox.md` says what it protects against and what it does not.
"""

from smallmath_jax.verify.sandbox.client import Sandbox, start_sandbox
from smallmath_jax.verify.sandbox.protocol import (
    Result,
    SandboxBusy,
    SandboxError,
    SandboxSettings,
)

__all__ = ["Result", "Sandbox", "SandboxBusy", "SandboxError", "SandboxSettings", "start_sandbox"]
