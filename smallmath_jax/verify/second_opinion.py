"""The process that asks math-verify. Run as a script by `grader`; imports nothing of this project, and no jax.

It loads math-verify once and forks for every request, so an opinion that hangs (math-verify's own timeouts are
signals, which a long C call ignores; they are off here) costs one small process, the next one starts warm within
milliseconds, and no opinion depends on the ones before it. Memory is capped; all of it dies with the grader.

One JSON object a line on stdin ({"gold", "answer", "cpu_s", "wall_s"}), one word a line on stdout: equal | different |
unparsable | error | timeout. The first line is `ready`, or `missing` where math-verify is not installed.
"""

import ctypes
import json
import logging
import os
import resource
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1


def bind_to_parent(parent: int) -> None:
    """Asks the kernel to end this process with its parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)


def cap_resources(memory_mb: int) -> None:
    """Caps memory; forbids core dumps and files."""
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def opinion(gold: str, answer: str) -> str:
    """What math-verify says. It is not symmetric: the gold answer comes first."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    told, said = (
        parse(f"${text}$", extraction_config=config, parsing_timeout=None)
        for text in (gold, answer)
    )
    if not told:
        return "unparsable"
    same = bool(said) and verify(told, said, float_rounding=12, timeout_seconds=None)
    return "equal" if same else "different"


def ask_in_fork(request: dict) -> str:
    """One opinion in a process of its own, which the kernel ends at its CPU limit and we at its wall limit."""
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        told = "error"
        try:
            bind_to_parent(parent)
            # Unhandled, it ends even a long C call. libtpu has processes ignore it, and their children inherit that.
            signal.signal(signal.SIGPROF, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
            told = opinion(request["gold"], request["answer"])
        except BaseException:  # whatever sympy or the parser raise on strange text is no opinion
            told = "error"
        finally:
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    poll = select.poll()
    poll.register(reading, select.POLLIN | select.POLLHUP)
    in_time = bool(poll.poll(request["wall_s"] * 1000))
    told = os.read(reading, 64).decode() if in_time else "timeout"
    os.close(reading)
    if not in_time:
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return "timeout"
    return told or "error"  # the kernel ended it, for memory


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing a library prints may look like a verdict
    bind_to_parent(int(sys.argv[1]))
    cap_resources(int(sys.argv[2]))
    logging.disable(logging.CRITICAL)
    try:
        opinion("\\frac{1}{2}", "\\{0.5\\}")  # loads everything and builds the parser's tables
    except ImportError:
        print("missing", file=answers)
        return
    print("ready", file=answers)
    for line in sys.stdin:
        print(ask_in_fork(json.loads(line)), file=answers)


if __name__ == "__main__":
    main()
