"""Pictures of a run: accuracy bars with intervals, the pies of the right answers, curves. PNG or SVG bytes out.

An SVG takes its text colours from the page it stands in (light or dark) and holds no links; a PNG stands alone.
"""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend is chosen first)

from smallmath_jax.report.markup import escape, visible  # noqa: E402

COLOURS = ("#8a96a5", "#2f6bdb", "#d97706", "#0f9d72", "#8b5cf6", "#d6468f", "#0e97b5", "#76a01b")
SLICES = ("#2f6bdb", "#d97706", "#0f9d72", "#8b5cf6", "#d6468f", "#0e97b5", "#76a01b", "#8a96a5")
INK, MUTED, LINE = "#18212f", "#5b6675", "#dfe3e8"
THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
SMOOTHED_FROM = 40  # points: from here on a curve is drawn thin, its running mean thick
LONG_NAME = 8  # characters: from here on categories are rows, so that no name meets its neighbour
PIE_SLICES = 9  # the rest is one slice

STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": LINE,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.bottom": False,
    "ytick.left": False,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # names are words: a "$" in one is no formula
    "svg.fonttype": "none",
    "svg.hashsalt": "smallmath",
}
NOT_INLINE = r"<!--.*?-->|<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>"


def _rendered(draw: Callable[[], Any], form: str, title: str) -> bytes:
    """The figure that `draw` makes, as `form`: png | svg."""
    with pyplot.rc_context(STYLE):
        figure = draw()
        buffer = io.BytesIO()
        if form == "svg":
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(
                buffer, format="svg", bbox_inches="tight", transparent=True, metadata=nothing
            )
        else:
            figure.savefig(buffer, format=form, bbox_inches="tight", dpi=200)
        pyplot.close(figure)
    return _inline(buffer.getvalue().decode(), title) if form == "svg" else buffer.getvalue()


def _inline(svg: str, title: str) -> bytes:
    """matplotlib's SVG file as an element of an HTML page: no prolog, themed colours, named for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(NOT_INLINE, "", svg, flags=re.S)
    svg = re.sub(r' id="[a-z0-9]+(\.[a-z]+)?_\d+"', "", svg)
    width = float(re.search(r'<svg[^>]*? width="([0-9.]+)pt"', svg)[1])
    size = f'style="max-width:{width * 4 / 3:.0f}px"'  # letters of one size in all of them
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1 {size}", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg = re.sub(r'xlink:href="(#[^"]*)"', r"href='\1'", svg)  # a marker, in the picture itself
    for colour, name in THEMED.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1).encode()


def accuracy_bars(
    tables: Mapping[str, Mapping[str, Mapping[str, Any]]],
    title: str,
    form: str = "png",
    prefix: str = "",
) -> bytes:
    """Grouped bars with their intervals. `tables`: evaluation -> category -> {"accuracy", "n", "ci"}; n may be None.

    Short categories stand side by side, long or many ones below each other. `prefix` comes before each name.
    """
    categories = categories_of(tables)
    names = [visible(f"{prefix}{category}") for category in categories]
    rows = len(categories) > 7 or any(len(name) >= LONG_NAME + len(prefix) for name in names)
    # the number over a bar where there is room for it
    numbered = len(tables) * len(categories) <= 12

    def draw():
        count = max(len(tables), 1)
        width = max(2.8, 5.2 - 0.08 * max((len(name) + 10 for name in names), default=0))
        size = (width, 0.75 + (0.15 + 0.17 * count) * len(categories)) if rows else (5.6, 2.9)
        figure, axes = pyplot.subplots(figsize=size)
        thick = 0.82 / count
        for series, table in enumerate(tables.values()):
            for place, category in enumerate(categories):
                cell = table.get(category)
                if cell and cell["n"] != 0:
                    at = place + (series - (count - 1) / 2) * thick
                    _bar(axes, at, thick, cell, COLOURS[series % len(COLOURS)], rows, numbered)
        labels = []
        for name, category in zip(names, categories, strict=True):
            known = _count(tables, category)
            number = f"  (n = {known})" if rows else f"\nn = {known}"
            labels.append(name + (number if known else ""))
        _share_axis(axes, labels, rows)
        axes.set_title(visible(title), pad=22 if len(tables) > 1 else 8)
        if len(tables) > 1:
            handles = [
                pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[i % len(COLOURS)])
                for i in range(len(tables))
            ]
            _legend_above(axes, handles, list(map(visible, tables)))
        return figure

    return _rendered(draw, form, title)


def categories_of(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The categories of several tables: levels in their order, others as they first come."""
    found = dict.fromkeys(category for table in tables.values() for category in table)
    levels = all(category.isdigit() or category == "unknown" for category in found)
    return sorted(found) if levels else list(found)


def _bar(axes, at, thick, cell, colour, row: bool, numbered: bool) -> None:
    share, (low, high) = 100 * cell["accuracy"], (100 * value for value in cell["ci"])
    if row:
        axes.barh(at, share, thick * 0.9, color=colour)
        axes.plot([low, high], [at, at], color=INK, linewidth=1.1, solid_capstyle="butt")
    else:
        axes.bar(at, share, thick * 0.9, color=colour)
        axes.plot([at, at], [low, high], color=INK, linewidth=1.1, solid_capstyle="butt")
    if numbered:
        place = (high + 1.5, at) if row else (at, high + 1.5)
        side = {"va": "center"} if row else {"ha": "center"}
        axes.text(*place, f"{share:.0f}", fontsize=7.5, color=MUTED, **side)


def _share_axis(axes, labels: list[str], rows: bool) -> None:
    if rows:
        axes.set_yticks(range(len(labels)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 105)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("accuracy, %")
        axes.grid(False, axis="y")
    else:
        axes.set_xticks(range(len(labels)), labels)
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20))
        axes.set_ylabel("accuracy, %")
        axes.grid(False, axis="x")


def _legend_above(axes, handles: list, names: list[str]) -> None:
    """A legend between title and axes, in as many columns as fit."""
    columns = max(1, min(len(names), 4, int(72 / (8 + max(len(name) for name in names)))))
    lines = math.ceil(len(names) / columns)
    axes.set_title(axes.get_title(loc="left"), pad=8 + 14 * lines)
    axes.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.995),
        ncols=columns,
        columnspacing=1.2,
        handlelength=1.1,
        handletextpad=0.5,
        borderaxespad=0,
        borderpad=0.25,
    )


def _count(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], category: str) -> int:
    return max(int(table[category]["n"] or 0) for table in tables.values() if category in table)


def correct_pie(
    table: Mapping[str, Mapping[str, Any]],
    title: str,
    categories: Sequence[str] = (),
    form: str = "png",
) -> bytes:
    """How the right answers spread over categories (Small-Math-R1, section 4.3.4).

    `table`: category -> {"correct", ...}. `categories` fixes the colours over several pies.
    """
    order = list(categories) or sorted(table)
    found = {c: table[c]["correct"] for c in order if c in table and table[c]["correct"] > 0}
    colours = {c: SLICES[place % len(SLICES)] for place, c in enumerate(order)}
    if len(found) > PIE_SLICES:
        largest = sorted(found, key=found.__getitem__, reverse=True)[: PIE_SLICES - 1]
        rest = sum(value for c, value in found.items() if c not in largest)
        found = {c: value for c, value in found.items() if c in largest} | {"others": rest}

    def draw():
        figure, axes = pyplot.subplots(figsize=(5.2, 2.5))
        axes.set_title(visible(title))
        axes.set_anchor("W")
        if not found:
            axes.axis("off")
            axes.text(0, 0.5, "nothing right", color=MUTED)
            return figure
        total = sum(found.values())
        slices, _ = axes.pie(
            list(found.values()),
            colors=[colours.get(c, COLOURS[0]) for c in found],
            startangle=90,
            counterclock=False,
            radius=1.2,
            wedgeprops={"width": 0.55},
        )
        names = [
            f"{visible(c)}: {value:.0f} ({100 * value / total:.0f} %)" for c, value in found.items()
        ]
        axes.text(0, 0, f"{total:.0f}\nright", ha="center", va="center", fontsize=9)
        axes.legend(slices, names, loc="center left", bbox_to_anchor=(1.12, 0.5), handlelength=1)
        return figure

    return _rendered(draw, form, title)


def curves(
    steps: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    title: str,
    step_name: str = "step",
    form: str = "png",
) -> bytes:
    """One panel of training curves. `lines`: name -> values beside `steps` (NaN: absent)."""

    def draw():
        figure, axes = pyplot.subplots(figsize=(3.7, 2.15))
        for colour, (name, values) in zip(COLOURS[1:], lines.items(), strict=False):
            _curve(axes, steps, values, visible(name), colour)
        axes.grid(False, axis="x")
        axes.set_title(visible(title))
        axes.set_xlabel(step_name)
        axes.margins(x=0.01)
        if len(lines) > 1:
            handles, names = axes.get_legend_handles_labels()
            _legend_above(axes, handles, names)
        return figure

    return _rendered(draw, form, title)


def _curve(axes, steps: Sequence[float], values: Sequence[float], name: str, colour: str) -> None:
    if len(values) < SMOOTHED_FROM:
        style = {"marker": "o", "markersize": 4} if len(values) == 1 else {}
        axes.plot(steps, values, color=colour, label=name, linewidth=1.6, **style)
        return
    axes.plot(steps, values, color=colour, linewidth=0.5, alpha=0.35)
    window = max(3, len(values) // 25)
    smooth = []
    for end in range(1, len(values) + 1):
        recent = [value for value in values[max(0, end - window) : end] if not math.isnan(value)]
        smooth.append(sum(recent) / len(recent) if recent else math.nan)
    axes.plot(steps, smooth, color=colour, label=name, linewidth=1.8)


def shares(
    lines: Mapping[str, Sequence[tuple[float, ...]]],
    title: str,
    step_name: str,
    log: bool = False,
    whole_steps: bool = False,
    form: str = "png",
) -> bytes:
    """Shares with intervals over rounds, trajectories or tokens. `lines`: name -> (x, share, low, high), x rising.

    `log`: x on a logarithmic scale and y as far as the lines go; `whole_steps`: a tick at each x.
    """

    def draw():
        figure, axes = pyplot.subplots(figsize=(5.6, 2.9))
        every = sorted({point[0] for points in lines.values() for point in points})
        for place, (name, points) in enumerate(lines.items()):
            x, share, low, high = zip(*points, strict=True)
            colour = COLOURS[1:][place % (len(COLOURS) - 1)]
            percents = [100 * value for value in share]
            axes.plot(
                x,
                percents,
                color=colour,
                label=visible(name),
                linewidth=1.8,
                marker="o",
                markersize=4,
            )
            ends = [[100 * value for value in side] for side in (low, high)]
            axes.fill_between(x, *ends, color=colour, alpha=0.15, linewidth=0)
        if log:
            axes.set_xscale("log")
        if whole_steps or len(every) <= 10:
            axes.set_xticks(every, [f"{x:,.0f}" for x in every])
            axes.set_xticks([], minor=True)
        if not log:
            axes.set_ylim(0, 105)
            axes.set_yticks(range(0, 101, 20))
        axes.set_xlabel(step_name)
        axes.set_ylabel("%")
        axes.grid(False, axis="x")
        axes.set_title(visible(title))
        if len(lines) > 1:
            _legend_above(axes, *axes.get_legend_handles_labels())
        return figure

    return _rendered(draw, form, title)


def score_rows(stats: Mapping[str, Mapping[str, Any]], title: str, form: str = "png") -> bytes:
    """Mean scores in [-1, 1] with intervals. `stats`: name -> {"n", "mean_score", "ci" (optional)}."""

    def draw():
        figure, axes = pyplot.subplots(figsize=(3.4, 0.8 + 0.3 * len(stats)))
        for place, stat in enumerate(stats.values()):
            colour = COLOURS[3] if stat["mean_score"] >= 0 else COLOURS[2]
            axes.barh(place, stat["mean_score"], 0.6, color=colour)
            if stat.get("ci"):
                axes.plot(stat["ci"], [place, place], color=INK, linewidth=1.1)
        names = [f"{name}  (n = {stat['n']:,})" for name, stat in stats.items()]
        axes.set_yticks(range(len(names)), list(map(visible, names)))
        axes.invert_yaxis()
        axes.set_xlim(-1.02, 1.02)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.grid(False, axis="y")
        axes.set_title(visible(title))
        return figure

    return _rendered(draw, form, title)


def length_histogram(lengths: Mapping[str, Sequence[int]], form: str = "png") -> bytes:
    """Completion lengths of each evaluation, in tokens."""

    def draw():
        figure, axes = pyplot.subplots(figsize=(5.6, 2.6))
        top = max((max(found) for found in lengths.values() if len(found)), default=1)
        bins = [top * i / 40 for i in range(41)]
        for colour, (name, found) in zip(COLOURS, lengths.items(), strict=False):
            axes.hist(
                found,
                bins=bins,
                histtype="stepfilled",
                alpha=0.55,
                color=colour,
                label=visible(name),
            )
        axes.set_title("completion lengths")
        axes.set_xlim(0, top * 1.02)
        axes.set_xlabel("tokens")
        axes.set_ylabel("completions")
        axes.grid(False, axis="x")
        if len(lengths) > 1:
            _legend_above(axes, *axes.get_legend_handles_labels())
        return figure

    return _rendered(draw, form, "completion lengths")
