"""Does self-evolution learn? A table of finished runs of configs/evolve.py:tiny; exit 1 where the gate is not met.

    python benchmarks/evolve_gate.py workdirs/seed0 workdirs/seed1 workdirs/seed2

Gate: in each run round 4's sampled pass@1 at least 8 points above the bootstrap's on >= 500 held-out problems, majority
and coverage up, at most 1,500 s; over all runs the Wilson intervals of before and after apart, and 64 rollouts solving
more of what 16 left than a fresh 16.

Two tables more, ungated: ways to choose among answers at near equal tokens (16 samples, and the rollout of a search
that comes closest), and where 8 samples leave a judge something to choose, in text and in pictures.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from smallmath_jax.records import read_parts  # noqa: E402
from smallmath_jax.report.metrics import wilson  # noqa: E402
from smallmath_jax.search.vote import scale_of  # noqa: E402
from smallmath_jax.tasks import ballots, evolve_measures  # noqa: E402

HEADS = "run|s|n|pass@1|gain|majority of 8|coverage of 8|search|of what 16 left: fresh 16, 64|gate"

KINDS = "run|problems|n|one sample|majority of 8|likeliest of 8|best of 8 by PPM|coverage of 8"


def line(name: str, report: dict) -> tuple[str, bool]:
    """One row of the table, and whether the run meets its part of the gate."""
    first, last = report["rounds"][0], report["rounds"][-1]
    gain = last["accuracy"] - first["accuracy"]
    rises = all(last[field] > first[field] for field in ("majority (8)", "coverage (8)"))
    met = gain >= 0.08 and rises and first["n"] >= 500 and report["wall_s"] <= 1500
    way = " -> ".join(f"{100 * one['accuracy']:.1f}" for one in report["rounds"])
    cells = [name, f"{report['wall_s']:.0f}", str(first["n"]), way, f"{100 * gain:+.1f}"]
    for field in ("majority (8)", "coverage (8)"):
        cells.append(f"{100 * first[field]:.1f} -> {100 * last[field]:.1f}")
    cells.append(f"{100 * last['search_accuracy']:.1f} of {last['search_accuracy_n']}")
    tried = last["tried_more"]
    cells.append(f"{last['solved_by_control']}, {last['solved_by_64']} of {tried}")
    return "| " + " | ".join([*cells, "yes" if met else "no"]) + " |", met


def pooled(reports: list[dict]) -> tuple[str, bool]:
    """What all runs together say."""
    sides = []
    for place in (0, -1):
        rounds = [report["rounds"][place] for report in reports]
        count = sum(one["n"] for one in rounds)
        right = sum(one["accuracy"] * one["n"] for one in rounds)
        sides.append((right / count, *wilson(right, count)))
    last = [report["rounds"][-1] for report in reports]
    fresh, more = (sum(one[f"solved_by_{name}"] for one in last) for name in ("control", "64"))
    tried = sum(one["tried_more"] for one in last)
    told = " -> ".join(f"{mean:.1%} [{low:.1%}, {high:.1%}]" for mean, low, high in sides)
    met = sides[1][1] > sides[0][2] and more > fresh
    return f"All: {told}; of {tried} that 16 left, a fresh 16 solves {fresh}, 64 {more}.", met


def kinds(workdir: pathlib.Path, last: int) -> list[str]:
    """Rows of the third table: text and picture problems of the last round's evaluation, over 8 samples."""
    names = (ballots.MAJORITY, ballots.LIKELY, ballots.BEST, ballots.COVERAGE)
    measures = ballots.measures(names, scale_of("ppm"))
    rows = list(read_parts(workdir / f"round_{last}" / "evaluate" / "completions"))
    lines = []
    for kind, pictured in (("text", False), ("pictures", True)):
        some = [row for row in rows if bool(row["images"]) == pictured]
        cases = [ballots.first(case, 8) for case in evolve_measures.sample_cases(some)]
        shares = ballots.shares(cases, measures)
        alone = [one.verdict == "correct" for case in cases for one in case.answers]
        share = sum(alone) / (8 * len(cases))
        cells = [f"{100 * one:.1f}" for one in (share, *(shares[n]["accuracy"] for n in names))]
        lines.append("| " + " | ".join([workdir.name, kind, str(len(cases)), *cells]) + " |")
    return lines


def equal_tokens(reports: list[dict]) -> list[str]:
    """Rows of the second table: a measure, its mean tokens a problem, its accuracy in each run."""
    budget = reports[0]["scaling"]["majority"][-1]["tokens"]
    lines = []
    for name in reports[0]["scaling"]:
        near = [
            min(report["scaling"][name], key=lambda point: abs(point["tokens"] - budget))
            for report in reports
        ]
        spent = [point["tokens"] for point in near]
        spent = dict.fromkeys(f"{one:.0f}" for one in (min(spent), max(spent)))
        cells = [name, " to ".join(spent), *(f"{100 * point['accuracy']:.1f}" for point in near)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    asked = parser.parse_args()
    reports = [json.loads((one / "report" / "report.json").read_text()) for one in asked.workdirs]
    heads = HEADS.split("|")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    found = [line(one.name, report) for one, report in zip(asked.workdirs, reports, strict=True)]
    for row, _ in found:
        print(row)
    told, apart = pooled(reports)
    print(f"\n{told}\n")
    heads = ["", "tokens", *(one.name for one in asked.workdirs)]
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    print("\n".join(equal_tokens(reports)) + "\n")
    heads = KINDS.split("|")
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for one, report in zip(asked.workdirs, reports, strict=True):
        print("\n".join(kinds(one, len(report["rounds"]) - 1)))
    sys.exit(not (apart and all(met for _, met in found)))


if __name__ == "__main__":
    main()
