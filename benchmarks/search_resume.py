"""Real problems searched by the real command, killed and resumed: no problem twice, none lost, the same trees (law 6).

    python benchmarks/search_resume.py OUT --problems=math500.jsonl --train=math_rest.jsonl

The policy is the tiny one, fine-tuned on lessons written here: problems of --train, each behind it a program of a few
random operations on the numbers in its text. It learns the form of code steps on long prompts and no mathematics, and
is never meant to be right; what counts is that its steps run and its trees are deep. The problems are the first
--limit rows whose prompt has at most --prompt tokens. They are searched twice: undisturbed, and with --kills kills
(SIGKILL). How far a start comes before its kill is drawn evenly from the first third of the CPU time that the
undisturbed run took: time on the clock says little on a machine that others use. Exit 1 where law 6 is broken, where
fewer than half of the steps run, or where the median tree is less than 4 deep.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

STEP_TOKENS = 24
PATH_TOKENS = 160  # of the steps and outputs behind a prompt
LARGEST = 999  # of a lesson's values
SFT = {
    "sft.steps": 500,
    "sft.worked_steps": 0,
    "sft.terse_share": 0.0,
    "sft.problems": 0,
    "eval.before": False,
    "eval.after": False,
    "export": False,
}


# ---- what the policy learns


def lesson(problem: str, source: random.Random) -> tuple[str, str]:
    """(solution in the grammar `code_steps`, what it prints): 4 to 6 assignments, printed, boxed."""
    found = [int(word) for word in re.findall(r"\d+", problem) if len(word) < 3]
    lines, values = [], {}
    for name in "abcdef"[: source.randint(4, 6)]:
        number = source.choice(found) if found and source.random() < 0.7 else source.randint(1, 20)
        if not values or source.random() < 0.25:
            text, value = str(number), number
        else:
            text, value = operation(values, number, source)
        lines.append(f"{name}={text}")
        values[name] = value
    steps = "".join(f"{line}<end_of_step>\n" for line in lines)
    return (
        f"<code>\n{steps}print({name})\n<end_of_code>\n<output>{value}<end_of_output>\n"
        f"<answer>\\boxed{{{value}}}<end_of_answer>"
    ), str(value)


def operation(values: dict[str, int], number: int, source: random.Random) -> tuple[str, int]:
    """An operation on a known name whose result is neither undefined nor large, as text and value."""
    while True:
        left = source.choice(list(values))
        right, held = number, source.choice(list(values))
        word = str(number)
        if source.random() < 0.4:
            right, word = values[held], held
        sign = source.choice("+-*" if right == 0 else "+-*/")
        text = f"{left}{'//' if sign == '/' else sign}{word}"
        value = eval(text, {}, dict(values))  # of names and operators drawn here
        if abs(value) <= LARGEST:
            return text, value


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_lessons(train: pathlib.Path, path: pathlib.Path, seed: int) -> None:
    from smallmath_jax.data.problems import load_problems

    rows = []
    for problem in load_problems(str(train)):
        solution, printed = lesson(problem.problem, random.Random(f"{seed} {problem.id}"))
        rows.append({"problem": problem.problem, "answer": printed, "solution": solution})
    write_rows(path, rows)


def write_problems(source: pathlib.Path, path: pathlib.Path, limit: int, longest: int) -> int:
    """Writes the first `limit` problems with prompts of at most `longest` tokens; returns how many were passed over."""
    from smallmath_jax.data.images import ImageSettings
    from smallmath_jax.data.problems import load_problems
    from smallmath_jax.data.prompts import GRAMMARS, build_prompt
    from smallmath_jax.data.tokens import load_tokens

    tokens, kept, passed = load_tokens("tiny"), [], 0
    for problem in load_problems(str(source)):
        prompt = build_prompt(problem, tokens, GRAMMARS["code_steps"], ImageSettings())
        if len(prompt.token_ids) > longest:
            passed += 1
            continue
        fields = ("id", "problem", "answer", "level", "subject")
        kept.append({name: getattr(problem, name) for name in fields})
        if len(kept) == limit:
            write_rows(path, kept)
            return passed
    raise SystemExit(f"{source}: {len(kept)} problems fit {longest} prompt tokens, not {limit}")


# ---- the real commands


def command(config: str, workdir: pathlib.Path, fields: dict) -> list[str]:
    words = [sys.executable, "run.py", f"--config=configs/{config}", f"--workdir={workdir}"]
    return words + [f"--config.{name}={value}" for name, value in fields.items()]


def shared(longest: int) -> dict:
    return {
        "prompt.grammar": "code_steps",
        "prompt.max_tokens": longest,
        "engine.cache_length": longest + PATH_TOKENS,
    }


def search_fields(out: pathlib.Path, arguments: argparse.Namespace) -> dict:
    return {
        **shared(arguments.prompt),
        "init_from": out / "policy",
        "problems": f"('{out / 'problems.jsonl'}',)",
        "limit": 0,
        "search.rollouts": 8,
        "search.candidates": 8,
        "sampling.max_tokens": STEP_TOKENS,
        "sandbox.modules": "()",  # the programs import nothing
        "seed": arguments.seed,
    }


def run(words: list[str]) -> float:
    """Runs a command to its end; returns the CPU seconds it took, its children's included."""
    process = subprocess.Popen(words, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(words)}")
    return usage.ru_utime + usage.ru_stime


@dataclasses.dataclass(frozen=True)
class Kill:
    cpu_s: float  # of the process since its start
    saved: int  # trees in published parts by then


def cpu_seconds(process: int) -> float:
    """CPU time of a live process without its children, from Linux's /proc."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_killed(
    words: list[str], workdir: pathlib.Path, kills: int, span_s: float, seed: int
) -> list[Kill]:
    """Starts the command, kills it (that process alone) at a random moment, `kills` times; then lets it end."""
    source, done = random.Random(seed), []
    for number in range(1, kills + 1):
        after = source.uniform(0, span_s)
        process = subprocess.Popen(words, cwd=ROOT)
        while process.poll() is None and cpu_seconds(process.pid) < after:
            time.sleep(0.1)
        if process.poll() is not None:
            raise SystemExit(f"the search ended before kill {number}: more problems, fewer kills")
        process.kill()
        process.wait()
        done.append(Kill(after, len(saved(workdir))))
        print(f"killed after {after:.0f} CPU-seconds, {done[-1].saved} trees saved", flush=True)
    run(words)
    return done


# ---- law 6


def saved(workdir: pathlib.Path) -> list[dict]:
    from smallmath_jax.records import read_parts

    return list(read_parts(workdir / "trees"))


def by_problem(rows: list[dict]) -> dict[tuple, dict]:
    return {(row["problem_id"], row["seed"]): row for row in rows}


def depth(row: dict) -> int:
    """Steps of the tree's longest path."""
    return max(node["tag"].count(".") for node in row["nodes"])


def differences(first: dict, second: dict) -> list[str]:
    """Names of the fields in which two trees differ; records of a search hold no times."""
    return [name for name in first | second if first.get(name) != second.get(name)]


def report(whole: list[dict], killed: list[dict], kills: list[Kill], ids: list[str]) -> bool:
    """Prints the table; returns whether law 6 held and the trees are such as were asked for."""
    nodes = [node for row in whole for node in row["nodes"]]
    ran = [node["status"] for node in nodes if node["status"]]
    ok = ran.count("ok") / len(ran)
    depths = sorted(depth(row) for row in whole)
    first, second = by_problem(whole), by_problem(killed)
    twice = len(killed) - len(second)
    lost = len(set(ids) - {name for name, _ in second})
    unlike = {key: differences(first[key], second[key]) for key in first if key in second}
    equal = sum(not found for found in unlike.values())
    histogram = ", ".join(f"{deep}: {n}" for deep, n in sorted(collections.Counter(depths).items()))
    statuses = ", ".join(f"{name} {n}" for name, n in collections.Counter(ran).most_common())
    answers = sum(node["kind"] == "answer" for node in nodes)
    solved = sum(any(node["verdict"] == "correct" for node in row["nodes"]) for row in whole)
    lines = {
        "problems": len(whole),
        "nodes": f"{len(nodes):,}",
        "steps executed": f"{len(ran):,} ({statuses})",
        "of them ok": f"{ok:.1%}",
        "answers; problems with a right one": f"{answers:,}; {solved}",
        "depth: median": f"{statistics.median(depths):g}",
        "depth: trees": histogram,
        "killed after CPU-seconds (trees saved by then)": ", ".join(
            f"{kill.cpu_s:.0f} ({kill.saved})" for kill in kills
        ),
        "problems twice": twice,
        "problems lost": lost,
        "trees equal to the undisturbed run's": f"{equal} of {len(first)}",
    }
    print("\n| | |\n|---|---|")
    print("\n".join(f"| {name} | {value} |" for name, value in lines.items()))
    for key, found in unlike.items():
        if found:
            print(f"differs: {key}: {', '.join(found)}")
    lawful = not twice and not lost and equal == len(first) == len(ids)
    return lawful and ok >= 0.5 and statistics.median(depths) >= 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--problems", type=pathlib.Path, required=True, help="MATH-500, say")
    parser.add_argument("--train", type=pathlib.Path, required=True, help="problems for the policy")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=200, help="problems")
    parser.add_argument("--prompt", type=int, default=192, help="tokens of the longest prompt")
    arguments = parser.parse_args()
    out, started = arguments.out.resolve(), time.time()
    if (out / "whole").exists():
        raise SystemExit(f"{out}: holds an earlier run's trees; give a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_lessons(arguments.train, out / "lessons.jsonl", arguments.seed)
    passed = write_problems(
        arguments.problems, out / "problems.jsonl", arguments.limit, arguments.prompt
    )
    print(f"{arguments.limit} problems; {passed} before the last of them have longer prompts")
    taught = {
        **shared(arguments.prompt),
        **SFT,
        "seed": arguments.seed,
        "sft.data": f"('{out / 'lessons.jsonl'}',)",
        "sft.row_length": arguments.prompt + PATH_TOKENS,
        "data.decontaminate": f"('{out / 'problems.jsonl'}',)",
    }
    run(command("sft.py:tiny", out / "policy", taught))
    fields = search_fields(out, arguments)
    taken = run(command("search.py:tiny", out / "whole", fields))
    words = command("search.py:tiny", out / "killed", fields)
    kills = run_killed(words, out / "killed", arguments.kills, taken / 3, arguments.seed)
    ids = [json.loads(line)["id"] for line in (out / "problems.jsonl").read_text().splitlines()]
    good = report(saved(out / "whole"), saved(out / "killed"), kills, ids)
    print(f"{time.time() - started:.0f} s", file=sys.stderr)
    sys.exit(not good)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
