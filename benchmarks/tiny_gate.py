"""Does the tiny recipe learn? A table of finished runs, and whether each meets the gate; exit 1 where one does not.

    python benchmarks/tiny_gate.py workdirs/seed0 workdirs/seed1 workdirs/seed2 [--picture=docs/tiny_report.png]

Gate, sampled at T = 1 on >= 500 held-out problems: the cold start at 30-45 %, GRPO at least 15 points above it, the
95 % Wilson intervals apart, all in at most 600 s.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from smallmath_jax.report import plots  # noqa: E402


def line(name: str, report: dict) -> tuple[str, bool]:
    """One row of the table, and whether the gate is met."""
    found = report["evaluations"]
    before, after = found["before"]["sampled"], found["after"]["sampled"]
    gain = after["accuracy"] - before["accuracy"]
    apart = after["ci"][0] > before["ci"][1]
    met = (
        0.30 <= before["accuracy"] <= 0.45
        and gain >= 0.15
        and apart
        and min(before["n"], after["n"]) >= 500
        and report["wall_s"] <= 600
    )
    cells = [name, f"{report['wall_s']:.0f}", str(after["n"])]
    for table in (before, after):
        cells.append(f"{table['accuracy']:.1%} [{table['ci'][0]:.1%}, {table['ci'][1]:.1%}]")
    cells.append(f"{100 * gain:+.1f}")
    for decoding, label in (("greedy", "tiny:test"), ("sampled", "tiny:unseen")):
        pair = [found[n][decoding]["by_set"][label]["accuracy"] for n in ("before", "after")]
        cells.append(f"{pair[0]:.1%} -> {pair[1]:.1%}")
    forced = [
        found.get(f"{n}_forced", {}).get("sampled", {}).get("accuracy") for n in ("before", "after")
    ]
    cells.append(" -> ".join("?" if value is None else f"{value:.1%}" for value in forced))
    cells.append("yes" if met else "no")
    return "| " + " | ".join(cells) + " |", met


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path)
    parser.add_argument("--picture", type=pathlib.Path)
    arguments = parser.parse_args()
    print(
        "| run | s | n | cold start | after GRPO | gain | greedy | unseen templates | worked style forced | gate |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    met = True
    for workdir in arguments.workdirs:
        report = json.loads((workdir / "report" / "report.json").read_text())
        row, fine = line(workdir.name, report)
        print(row)
        met &= fine
    if arguments.picture:
        report = json.loads((arguments.workdirs[0] / "report" / "report.json").read_text())
        tables = {name: report["evaluations"][name]["by_subject"] for name in ("before", "after")}
        title = "Sampled at T = 1, before and after GRPO"
        arguments.picture.write_bytes(plots.accuracy_bars(tables, title))
    sys.exit(not met)


if __name__ == "__main__":
    main()
