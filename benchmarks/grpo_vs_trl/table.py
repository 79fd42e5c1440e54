"""Both sides side by side: python benchmarks/grpo_vs_trl/table.py OUT. Exit 1 when ours lies below TRL's range."""

import json
import pathlib
import statistics
import sys


def main() -> None:
    out = pathlib.Path(sys.argv[1])
    means: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    for side in ("ours", "trl"):
        for path in sorted(out.glob(f"{side}-?.json")):
            record = json.loads(path.read_text())
            fifth = max(1, len(record["rewards"]) // 5)
            first, last = (
                statistics.mean(part)
                for part in (record["rewards"][:fifth], record["rewards"][-fifth:])
            )
            means.setdefault(side, []).append(last)
            seconds.setdefault(side, []).append(record["cpu_s"])
            print(
                f"{path.stem}: reward, first fifth {first:.3f}, last fifth {last:.3f}; "
                f"{record['cpu_s']:.0f} CPU-s, {record['wall_s']:.0f} s"
            )
    low, high = min(means["trl"]), max(means["trl"])
    ratio = statistics.median(seconds["trl"]) / statistics.median(seconds["ours"])
    print(
        f"TRL's range {low:.3f} to {high:.3f}; ours {', '.join(f'{mean:.3f}' for mean in means['ours'])}"
    )
    print(f"CPU-seconds, TRL / ours (medians): {ratio:.2f}")
    sys.exit(statistics.mean(means["ours"]) < low)


if __name__ == "__main__":
    main()
