"""The report's section on training data: what became of each source, by reason, and under which licences."""

from collections.abc import Mapping
from typing import Any

from smallmath_jax.report.markup import escape, table


def data_section(told: Mapping[str, Mapping[str, Any]]) -> str:
    """A row a source of `training_data` in config.json (tasks.sources.training_problems); "" without any."""
    rows = [
        [
            escape(source),
            f"{found['problems']:,}",
            f"<b>{found['kept']:,}</b>",
            *(_counts(found.get(name, {})) for name in ("dropped", "origin", "licence")),
        ]
        for source, found in told.items()
    ]
    head = ["source", "problems", "kept", "left out, by reason", "kept, by origin", "licence"]
    return table(head, rows) if rows else ""


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "<br>".join(f"{escape(name)} ({count:,})" for name, count in ordered) or "–"
