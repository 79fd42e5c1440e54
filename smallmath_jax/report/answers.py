"""The report's sections on many answers to a problem: which is chosen, accuracy against cost, what early stops save.

Made from an evaluation's result.json (fields `votes`, `leaves`, `tokens`, `scaling`, `stopping`: tasks.searched says
what they hold) and from a self-evolution run's record (`scaling`, `stopping`).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from smallmath_jax.report import plots
from smallmath_jax.report.markup import escape, percent, table

Share = Mapping[str, Any]


def cell(share: Share | None, interval: bool = True) -> str:
    """{"accuracy", "n", "ci"} as a table cell."""
    if share is None:
        return "–"
    text = f"<b>{percent(share['accuracy'])}</b>"
    if interval and share.get("n"):
        low, high = share["ci"]
        text += f"<br><small>{percent(low)} – {percent(high)}, n = {share['n']}</small>"
    return text


def sections(
    results: Mapping[str, Mapping[str, Any]], pictures: Callable[..., str]
) -> dict[str, str]:
    """Section title -> HTML, of the evaluations that chose among several answers; empty without any."""
    found = {name: result for name, result in results.items() if result.get("votes")}
    parts, named = {}, len(results) > 1  # whose numbers: another run may be compared
    for name, result in found.items():
        before = f"{name}: " if named else ""
        draw = lambda key, *data, name=name, **options: pictures(
            f"{name}_{key}".replace("/", "_").replace(" ", "_"), *data, **options
        )
        parts[f"{before}Choosing among {result['answers']}"] = votes_section(result, draw)
        if result.get("scaling"):
            parts[f"{before}Accuracy against cost"] = scaling_section(result["scaling"], draw)
        if result.get("stopping"):
            parts[f"{before}What early stops save"] = stopping_section(result["stopping"], draw)
    return parts


def votes_section(result: Mapping[str, Any], pictures: Callable[..., str]) -> str:
    """A row a way of choosing; columns: all, each problem set; levels and subjects folded away."""
    single = result.get("search") or result.get("sampled")
    rows = {"one alone (pass@1)": single} if single else {}
    rows |= result["votes"]
    text = _by_field(rows, "by_set")
    tokens = result.get("tokens")
    if tokens:
        sets = ", ".join(f"{escape(name)} {mean:,.0f}" for name, mean in tokens["by_set"].items())
        text += f"<p class=note>Mean tokens of one: <b>{tokens['mean']:,.0f}</b> ({sets}).</p>"
    if result.get("leaves"):
        text += f"<h3>all answers of one search</h3>{_by_field(result['leaves'], 'by_set')}"
    for field, title in (("by_level", "by level"), ("by_subject", "by subject")):
        shown = _by_field(rows, field, interval=False)
        text += f"<details><summary>{title}</summary>{shown}</details>"
    bars = {"overall": {name: share for name, share in rows.items()}}
    return (
        text + f"<div class=grid>{pictures('votes', plots.accuracy_bars, bars, 'by choice')}</div>"
    )


def _by_field(rows: Mapping[str, Share], field: str, interval: bool = True) -> str:
    labels = plots.categories_of({name: row.get(field) or {} for name, row in rows.items()})
    if field == "by_set" and len(labels) < 2:
        labels = []
    ungradable = any(row.get("ungradable") for row in rows.values())
    body = []
    for name, row in rows.items():
        groups = row.get(field) or {}
        body.append([escape(name), cell(row, interval)])
        body[-1] += [cell(groups.get(label), interval) for label in labels]
        body[-1] += [str(row.get("ungradable", 0))] if ungradable else []
    head = ["", "all", *map(escape, labels), *(["could not be graded"] if ungradable else [])]
    return table(head, body)


def scaling_section(
    scaling: Mapping[str, Sequence[Mapping[str, Any]]], pictures: Callable[..., str]
) -> str:
    """Accuracy against trajectories and against tokens, a line a method (figure 3)."""
    drawn, rows = [], []
    for axis, words in (("trajectories", "trajectories"), ("tokens", "tokens a problem")):
        lines = {
            method: sorted(
                (float(point[axis]), point["accuracy"], *point.get("ci", [point["accuracy"]] * 2))
                for point in points
                if point.get(axis)
            )
            for method, points in scaling.items()
        }
        lines = {method: points for method, points in lines.items() if points}
        if lines:
            title = f"accuracy by {words}"
            drawn.append(pictures(f"scaling_{axis}", plots.shares, lines, title, words, log=True))
    for method, points in scaling.items():
        for point in points:
            number, tokens = point.get("trajectories"), point.get("tokens")
            rows.append(
                [
                    escape(method),
                    "–" if number is None else f"{number:g}",
                    "–" if tokens is None else f"{tokens:,.0f}",
                    cell(point),
                ]
            )
    head = ["method", "trajectories", "tokens a problem", "accuracy"]
    shown = f"<details><summary>numbers</summary>{table(head, rows)}</details>"
    return f"<div class=grid>{''.join(drawn)}</div>{shown}"


def stopping_section(rows: Sequence[Mapping[str, Any]], _pictures: Callable[..., str]) -> str:
    """Tokens saved and accuracy kept, a row an early stop and way of choosing; the full run beside it."""
    body = [
        [
            escape(row["units"]),
            escape(row["choice"]),
            escape(row["stop"]),
            f"{row['units_taken']:.1f}",
            percent(row["tokens_saved"]),
            cell(row),
            percent(row["full_accuracy"]),
        ]
        for row in rows
    ]
    head = ["of", "chosen by", "stop", "taken", "tokens saved", "accuracy", "without the stop"]
    note = (
        "<p class=note>Full runs, cut where the rule would have ended them. decided: the rest cannot change the vote; "
        "confident: the leading answer stays ahead with that probability.</p>"
    )
    return note + table(head, body)
