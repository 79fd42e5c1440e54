"""The child process that asks math-verify. Run as a script by `grader`; imports nothing of this project, and no jax.

One JSON object a line on stdin ({"gold", "answer"}), one word a line on stdout: equal | different | unparsable |
error. The first line is `ready`, or `missing` where math-verify is not installed. math-verify's own timeouts are
signals, which a long C call ignores; they are off here, and the parent kills this process instead. Memory is capped,
and the process dies with its parent.
"""

import ctypes
import json
import logging
import os
import resource
import signal
import sys

_PR_SET_PDEATHSIG = 1


def bind_to_parent(parent: int, memory_mb: int) -> None:
    """Caps memory and asks the kernel to end this process with its parent."""
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing a library prints may look like a verdict
    bind_to_parent(int(sys.argv[1]), int(sys.argv[2]))
    logging.disable(logging.CRITICAL)
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        print("missing", file=answers)
        return
    config = [LatexExtractionConfig()]

    def read(text: str) -> list:
        return parse(f"${text}$", extraction_config=config, parsing_timeout=None)

    def opinion(gold: str, answer: str) -> str:
        told = read(gold)
        if not told:
            return "unparsable"
        said = read(answer)
        # math-verify is not symmetric: the gold answer comes first
        same = bool(said) and verify(told, said, float_rounding=12, timeout_seconds=None)
        return "equal" if same else "different"

    opinion("\\frac{1}{2}", "\\{0.5\\}")  # builds the parser's tables
    print("ready", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            told = opinion(request["gold"], request["answer"])
        except Exception:  # whatever sympy or the parser raise on strange text is no opinion
            told = "error"
        print(told, file=answers)


if __name__ == "__main__":
    main()
