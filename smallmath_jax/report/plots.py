"""Pictures of a run: accuracy bars with intervals, the pies of the right answers, training curves. PNG bytes out."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

COLOURS = ("#9aa5b1", "#2563eb", "#d97706", "#059669", "#7c3aed", "#db2777", "#0891b2", "#65a30d")
SMOOTHED_FROM = 40  # points: from here on a curve is drawn thin, its running mean thick


def _png(draw: Callable[[], Any]) -> bytes:
    with pyplot.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.alpha": 0.25,
            "axes.axisbelow": True,
            "figure.dpi": 110,
        }
    ):
        figure = draw()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        pyplot.close(figure)
    return buffer.getvalue()


def accuracy_bars(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> bytes:
    """Grouped bars with Wilson intervals. `tables`: evaluation -> category -> {"accuracy", "n", "ci"}."""
    categories = sorted({category for table in tables.values() for category in table})

    def draw():
        width = max(4.5, 0.55 * len(categories) * max(len(tables), 1) + 1.5)
        figure, axes = pyplot.subplots(figsize=(min(width, 13), 3.2))
        bar = 0.8 / max(len(tables), 1)
        for series, (name, table) in enumerate(tables.items()):
            for place, category in enumerate(categories):
                cell = table.get(category)
                if not cell or not cell["n"]:
                    continue
                x = place + (series - (len(tables) - 1) / 2) * bar
                low, high = cell["ci"]
                share = cell["accuracy"]
                label = name if place == 0 else None
                axes.bar(
                    x, 100 * share, bar * 0.92, color=COLOURS[series % len(COLOURS)], label=label
                )
                axes.errorbar(
                    x,
                    100 * share,
                    [[100 * max(0.0, share - low)], [100 * max(0.0, high - share)]],
                    color="#1f2937",
                    capsize=2,
                    linewidth=0.9,
                )
        labels = [f"{c}\n(n={_count(tables, c)})" for c in categories]
        axes.set_xticks(range(len(categories)), labels, rotation=0 if len(categories) < 7 else 25)
        axes.set_ylabel("accuracy, %")
        axes.set_ylim(0, 100)
        axes.set_title(title, loc="left", fontsize=10)
        if len(tables) > 1:
            handles = [
                pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[i % len(COLOURS)])
                for i in range(len(tables))
            ]
            axes.legend(handles, list(tables), frameon=False, fontsize=8, ncols=min(len(tables), 4))
        return figure

    return _png(draw)


def _count(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], category: str) -> int:
    return max(int(table[category]["n"]) for table in tables.values() if category in table)


def correct_pies(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], title: str) -> bytes:
    """How the right answers spread over categories, one pie an evaluation (Small-Math-R1, section 4.3.4)."""
    categories = sorted({category for table in tables.values() for category in table})
    palette = {c: pyplot.get_cmap("tab10")(i % 10) for i, c in enumerate(categories)}

    def draw():
        figure, row = pyplot.subplots(
            1, len(tables), figsize=(3.6 * len(tables), 3.3), squeeze=False
        )
        for axes, (name, table) in zip(row[0], tables.items(), strict=True):
            shares = {
                c: table[c]["correct"] for c in categories if c in table and table[c]["correct"] > 0
            }
            if shares:
                axes.pie(
                    list(shares.values()),
                    labels=list(shares),
                    colors=[palette[c] for c in shares],
                    autopct="%1.0f%%",
                    textprops={"fontsize": 7.5},
                )
            else:
                axes.text(0.5, 0.5, "nothing right", ha="center", transform=axes.transAxes)
                axes.axis("off")
            axes.set_title(name, fontsize=9)
        figure.suptitle(title, fontsize=10)
        return figure

    return _png(draw)


def curves(
    steps: Sequence[int], series: Mapping[str, Mapping[str, Sequence[float]]], step_name: str
) -> bytes:
    """A grid of training curves. `series`: panel title -> line name -> values beside `steps` (NaN: absent)."""

    def draw():
        columns = min(3, len(series))
        lines = math.ceil(len(series) / columns)
        figure, grid = pyplot.subplots(
            lines, columns, figsize=(4.1 * columns, 2.5 * lines), squeeze=False
        )
        for axes in grid.flat[len(series) :]:
            axes.axis("off")
        for axes, (title, found) in zip(grid.flat, series.items(), strict=False):
            for colour, (name, values) in zip(COLOURS[1:], found.items(), strict=False):
                _curve(axes, steps, values, name, colour)
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel(step_name, fontsize=8)
            if len(found) > 1:
                axes.legend(frameon=False, fontsize=7)
        figure.tight_layout()
        return figure

    return _png(draw)


def _curve(axes, steps: Sequence[int], values: Sequence[float], name: str, colour: str) -> None:
    if len(values) < SMOOTHED_FROM:
        axes.plot(steps, values, color=colour, label=name, linewidth=1.4)
        return
    axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
    window = max(3, len(values) // 25)
    smooth = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        smooth.append(sum(recent) / len(recent) if recent else math.nan)
    axes.plot(steps, smooth, color=colour, label=name, linewidth=1.6)


def length_histogram(lengths: Mapping[str, Sequence[int]]) -> bytes:
    """Completion lengths of each evaluation, in tokens."""

    def draw():
        figure, axes = pyplot.subplots(figsize=(5.5, 2.6))
        top = max((max(found) for found in lengths.values() if len(found)), default=1)
        bins = [top * i / 40 for i in range(41)]
        for colour, (name, found) in zip(COLOURS, lengths.items(), strict=False):
            axes.hist(found, bins=bins, histtype="stepfilled", alpha=0.5, color=colour, label=name)
        axes.set_xlabel("completion length, tokens")
        axes.set_ylabel("completions")
        axes.legend(frameon=False, fontsize=8)
        return figure

    return _png(draw)
