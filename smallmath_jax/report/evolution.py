"""The report's sections of a self-evolution run (rStar-Math): rounds, test-time scaling, backtracking, theorems.

They are made from WORKDIR/evolution.json, whose fields also go into report.json. Each field is optional, and a section
stands in the page only when its field does. A *share* is {"accuracy", "n", "ci": [low, high]}, as everywhere in
report.json, or a bare number in [0, 1] where no interval is known, or null.

    rounds          [round, ...] in order; 0 is the model before the first round (tables 4 and 6 of the paper). All have
                    the same fields, null where a round has nothing:
        round               0, 1, 2, ...
        accuracy            number: pass@1 of the round's policy; beside it n and accuracy_ci: [low, high]
        search_accuracy     number: the round's policy and preference model searching together; search_accuracy_n, _ci
        solved              number: training problems with a right trajectory so far; solved_n, solved_ci
        coverage_by_level   {level: share}: the same by level
        by_level, by_subject, by_set  {level, subject or problem set: share}: pass@1
        search_by_set       {problem set: share}: search accuracy by benchmark
        tokens_by_set       {problem set: number}: mean tokens of a sampled trajectory
        search_tokens_by_set  {problem set: number}: of a complete search
        anything else       a number or text (policy, rollouts, candidates, sft_examples, pairs, tokens, wall_s, ...):
                            a row of the table
    scaling         {method: [point, ...]}; point = {"trajectories", "tokens", "accuracy", "n", "ci"}, tokens a problem
    stopping        [row, ...] of tasks.ballots.stopping: early stops, tokens saved, accuracy kept
    backtracking    {"trees", "nodes", "count", "above", "left_out", "median_fall", "examples": [example, ...],
                    "by_round": {round: {"trees", "nodes", "count"}}}: trees whose chosen path leaves a step behind that
                    search had tried first and scored lower as it went on; of trees that a preference model scored
                    (`nodes` of their nodes), `left_out` being the others; `above`: those whose branch taken never
                    scored as low.
                    example = {"problem_id", "problem", "gold", "answer", "prefix": [step, ...], "left": [step, ...],
                    "taken": [step, ...], "images": [...], "page": address of the tree's page}
                    step = {"tag", "text", "score", "q"}: score the preference model's, q the Q-value, or null
    theorems        {"theorem": stat, "other": stat, "within": {"n", "mean"}, "by_theorem": {name: stat},
                    "examples": [step + "theorem" + "page", ...]}, of steps that a preference model scored
                    stat = {"n", "trees", "mean_score", "ci": [low, high], "mean_q"}
    reward_models   {policy: {"pass@1": share, "+ ORM": share, "+ PQM": share, "+ PPM": share}} (table 8, figure 5)
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.report import answers, plots
from smallmath_jax.report.markup import data_url, escape, percent, picture, table

FIELDS = ("rounds", "scaling", "stopping", "backtracking", "theorems", "reward_models")
SHARES = {
    "accuracy": "pass@1",
    "search_accuracy": "with search",
    "solved": "training problems solved",
}
GROUPED = {  # field -> (title, what comes before a category's name)
    "coverage_by_level": ("coverage by level", "level "),
    "by_level": ("pass@1 by level", "level "),
    "by_subject": ("pass@1 by subject", ""),
    "by_set": ("pass@1 by problem set", ""),
    "search_by_set": ("with search, by problem set", ""),
}
TOKENS = {  # field -> title of a table of plain numbers
    "tokens_by_set": "mean tokens of a sampled trajectory, by problem set",
    "search_tokens_by_set": "mean tokens of a search, by problem set",
}
SHOWN_EXAMPLES = 6
Share = Mapping[str, Any] | float | None


def read(root: epath.Path) -> dict[str, Any]:
    """WORKDIR/evolution.json, empty where there is none. Raises ValueError naming a field that is not known."""
    path = root / "evolution.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    for name in found:
        if name not in FIELDS:
            raise ValueError(f"{path}: no field {name!r}; known: {', '.join(FIELDS)}")
    return found


def headline(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """The last round's pass@1 in the headline form of report.json; None where there is none."""
    last = next(
        (r for r in reversed(found.get("rounds", ())) if value(r.get("accuracy")) is not None), None
    )
    if last is None:
        return None
    by_level = {name: as_cell(share) for name, share in (last.get("by_level") or {}).items()}
    by_subject = {name: as_cell(share) for name, share in (last.get("by_subject") or {}).items()}
    return round_cell(last, "accuracy") | {"by_level": by_level, "by_subject": by_subject}


def round_fields(name: str, share: Mapping[str, Any] | None) -> dict[str, Any]:
    """A share as a round has it: a plain number, its n and interval beside it; nulls for None."""
    read = share or {"accuracy": None, "n": None, "ci": None}
    return {name: read["accuracy"], count_of(name): read["n"], f"{name}_ci": read["ci"]}


def count_of(name: str) -> str:
    """The field with the problems that a round's share is of."""
    return "n" if name == "accuracy" else f"{name}_n"


def round_cell(found: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """`round_fields` read back, as {"accuracy", "n", "ci"}; None where there is none."""
    cell = as_cell(found.get(name))
    if cell and found.get(f"{name}_ci"):
        cell |= {"n": found.get(count_of(name)), "ci": found[f"{name}_ci"]}
    return cell


def sections(record: Mapping[str, Any], pictures: Callable[..., str]) -> dict[str, str]:
    """Section title -> HTML, for the fields that `record` (report.json) has."""
    writers = {
        "rounds": ("Rounds of self-evolution", rounds_section),
        "scaling": ("Test-time scaling", answers.scaling_section),
        "stopping": ("What early stops save", answers.stopping_section),
        "reward_models": ("Policy and reward model", reward_models_section),
        "backtracking": ("Backtracking", backtracking_section),
        "theorems": ("Steps that apply a theorem", theorems_section),
    }
    return {
        title: write(record[name], pictures)
        for name, (title, write) in writers.items()
        if record.get(name)
    }


def value(share: Share) -> float | None:
    """The share as a number; None where it is not known."""
    return share["accuracy"] if isinstance(share, Mapping) else share


def as_cell(share: Share) -> dict[str, Any] | None:
    """The share as {"accuracy", "n", "ci"}: a bare number has no n, and itself as interval."""
    if isinstance(share, Mapping) or share is None:
        return dict(share) if share else None
    return {"accuracy": share, "n": None, "ci": [share, share]}


def _words(share: Share, interval: bool = True) -> str:
    """A share as a table cell."""
    if value(share) is None:
        return "–"
    text = f"<b>{percent(value(share))}</b>"
    if interval and isinstance(share, Mapping) and share.get("n"):
        low, high = share["ci"]
        text += f"<br><small>{percent(low)} – {percent(high)}, n = {share['n']}</small>"
    return text


def round_name(found: Mapping[str, Any]) -> str:
    return "base" if found["round"] == 0 else f"round {found['round']}"


def rounds_section(rounds: Sequence[Mapping[str, Any]], pictures: Callable[..., str]) -> str:
    """The table of rounds, curves over rounds, coverage by level."""
    names = [round_name(found) for found in rounds]
    known = [name for name in SHARES if any(value(found.get(name)) is not None for found in rounds)]
    rows = [
        [escape(SHARES[name]), *(_words(round_cell(found, name)) for found in rounds)]
        for name in known
    ]
    beside = {"round", *SHARES, *map(count_of, SHARES), *(f"{name}_ci" for name in SHARES)}
    plain = {
        name: None
        for found in rounds
        for name, content in found.items()
        if name not in beside and not isinstance(content, Mapping | list)
    }
    filled = lambda name: any(found.get(name) is not None for found in rounds)
    plain = {name: None for name in plain if name not in GROUPED | TOKENS and filled(name)}
    for name in plain:
        cells = (found.get(name) for found in rounds)
        rows.append([escape(name.replace("_", " ")), *(_plain(cell) for cell in cells)])
    text = table(["", *(escape(name) for name in names)], rows)
    drawn = []
    if known:
        lines = {SHARES[name]: _points(rounds, name) for name in known}
        drawn.append(pictures("rounds", plots.shares, lines, "by round", "round", whole_steps=True))
    for field, (title, prefix) in GROUPED.items():
        if tables := _by_round(rounds, field):
            # names that are no bare level ("GSM8K", "Olympiad") say themselves what they are
            before = prefix if all(c.isdigit() for cells in tables.values() for c in cells) else ""
            drawn.append(
                pictures(f"rounds_{field}", plots.accuracy_bars, tables, title, prefix=before)
            )
            text += _grouped_table(title, tables)
    for field, title in TOKENS.items():
        text += _tokens_table(title, {round_name(found): found.get(field) for found in rounds})
    return f"{text}<div class=grid>{''.join(drawn)}</div>"


def _tokens_table(title: str, rows: Mapping[str, Mapping[str, float] | None]) -> str:
    known = {name: found for name, found in rows.items() if found}
    if not known:
        return ""
    sets = list(dict.fromkeys(label for found in known.values() for label in found))
    body = [
        [escape(name), *(f"{found[one]:,.0f}" if one in found else "–" for one in sets)]
        for name, found in known.items()
    ]
    return f"<h3>{escape(title)}</h3>{table(['', *map(escape, sets)], body)}"


def _plain(cell: Any) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, bool | str):
        return escape(cell)
    return escape(f"{cell:,.4g}" if isinstance(cell, float) else f"{cell:,}")


def _points(rounds: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, ...]]:
    """(round, share, low, high) of the rounds that know it."""
    cells = [(found["round"], round_cell(found, name)) for found in rounds]
    return [(number, cell["accuracy"], *cell["ci"]) for number, cell in cells if cell]


def _by_round(
    rounds: Sequence[Mapping[str, Any]], field: str
) -> dict[str, dict[str, dict[str, Any]]]:
    """round's name -> category -> cell, of the rounds that have the field."""
    tables = {}
    for found in rounds:
        cells = {str(name): as_cell(share) for name, share in (found.get(field) or {}).items()}
        cells = {name: cell for name, cell in cells.items() if cell}
        if cells:
            tables[round_name(found)] = cells
    return tables


def _grouped_table(title: str, tables: Mapping[str, Mapping[str, Any]]) -> str:
    categories = plots.categories_of(tables)
    rows = [
        [escape(name), *(_words(cells.get(category), False) for category in categories)]
        for name, cells in tables.items()
    ]
    head = ["", *(escape(category) for category in categories)]
    return f"<h3>{escape(title)}</h3>{table(head, rows)}"


def reward_models_section(
    models: Mapping[str, Mapping[str, Share]], pictures: Callable[..., str]
) -> str:
    """Policies against the ways their answers are chosen (figure 5): which of the two decides?"""
    methods = list(dict.fromkeys(method for found in models.values() for method in found))
    rows = [
        [escape(policy), *(_words(found.get(method)) for method in methods)]
        for policy, found in models.items()
    ]
    tables = {
        method: {
            policy: cell
            for policy, found in models.items()
            if (cell := as_cell(found.get(method))) is not None
        }
        for method in methods
    }
    drawn = pictures("reward_models", plots.accuracy_bars, tables, "by policy and reward model")
    return table(["policy", *(escape(method) for method in methods)], rows) + drawn


def backtracking_section(found: Mapping[str, Any], pictures: Callable[..., str]) -> str:
    """How often search left a branch whose score fell for a sibling that won, with examples (figure 4)."""
    text = ""
    if found.get("trees"):
        share = found["count"] / found["trees"]
        text = (
            f"<p>In <b>{found['count']:,}</b> of {found['trees']:,} trees ({percent(share)}) the search went down one "
            "branch first, saw its score fall, and answered from a sibling."
        )
        if found.get("median_fall") is not None:
            text += f" Half of these falls are of {found['median_fall']:.3f} or more."
        if found.get("above") is not None:
            text += f" In {found['above']:,} of these trees the branch taken never scored as low."
        text += "</p>"
    if found.get("nodes") is not None:
        text += (
            f"<p class=note>Scores are the preference model's alone: {found['nodes']:,} scored nodes. "
            f"{found.get('left_out', 0):,} trees searched without one are left out.</p>"
        )
    if found.get("by_round"):
        rows = [
            [escape(name), f"{cell['trees']:,}"]
            + [f"{cell['nodes']:,}" if "nodes" in cell else "–", f"{cell['count']:,}"]
            + [percent(cell["count"] / cell["trees"]) if cell["trees"] else "–"]
            for name, cell in found["by_round"].items()
        ]
        head = ["round", "trees", "scored nodes", "with backtracking", "share"]
        text += table(head, rows)
    return text + "".join(_example(one) for one in found.get("examples", [])[:SHOWN_EXAMPLES])


def _example(example: Mapping[str, Any]) -> str:
    shown = "".join(picture(image) for image in example.get("images", ()) if data_url(image))
    steps = [
        *(_step(step, "", "") for step in example.get("prefix", ())),
        *(_step(step, "left", "left behind") for step in example.get("left", ())),
        *(_step(step, "chosen", "taken instead") for step in example.get("taken", ())),
    ]
    link = _tree_link(example)
    return (
        f"<article class=sample><div class=question>{shown}<div><p>{escape(example.get('problem', ''))}</p>"
        f"<p class=gold>right answer <b>{escape(example.get('gold', ''))}</b>, answered "
        f"<b>{escape(example.get('answer', ''))}</b>{link}</p></div></div>"
        f"<ol class=path>{''.join(steps)}</ol></article>"
    )


def _tree_link(example: Mapping[str, Any]) -> str:
    page = str(example.get("page", ""))
    # only an address inside the report: a javascript: or http: one is no page of ours
    return f" · <a href='{escape(page)}'>the whole tree</a>" if page and ":" not in page else ""


def _step(step: Mapping[str, Any], kind: str, words: str) -> str:
    score = "–" if step.get("score") is None else f"{step['score']:+.3f}"
    q_value = "" if step.get("q") is None else f" · Q {step['q']:+.3f}"
    note = f" · {escape(words)}" if words else ""
    return (
        f"<li class='{kind}'><span class=note>score <b>{score}</b>{q_value}{note}{_tree_link(step)}</span>"
        f"<pre>{escape(str(step.get('text', '')).strip())}</pre></li>"
    )


def theorems_section(found: Mapping[str, Any], pictures: Callable[..., str]) -> str:
    """Preference-model scores of steps that name a theorem against those of other steps (section 5)."""
    stats = {
        name: stat
        for name, stat in (
            ("all that apply a theorem", found.get("theorem")),
            ("all other steps", found.get("other")),
            *(found.get("by_theorem") or {}).items(),
        )
        if stat and stat["n"]
    }
    if not stats:
        return ""
    rows = [
        [
            escape(name),
            f"{stat['n']:,}",
            f"{stat['trees']:,}" if stat.get("trees") else "–",
            f"<b>{stat['mean_score']:+.3f}</b>",
            " – ".join(f"{end:+.3f}" for end in stat["ci"]) if stat.get("ci") else "",
            f"{stat['mean_q']:+.3f}" if stat.get("mean_q") is not None else "",
        ]
        for name, stat in stats.items()
    ]
    head = ["steps", "count", "trees", "mean score", "95 % interval", "mean Q-value"]
    drawn = pictures("theorems", plots.score_rows, stats, "preference model's score")
    if not (found.get("theorem") or {}).get("n"):
        drawn += "<p class=note>None of these steps names a theorem.</p>"
    steps = "".join(
        _step(one, "chosen", str(one.get("theorem", ""))) for one in found.get("examples", ())
    )
    if (found.get("within") or {}).get("n"):
        within = found["within"]
        drawn += (
            f"<p>Within one tree, steps that apply a theorem score <b>{within['mean']:+.3f}</b> above the others "
            f"(mean over {within['n']:,} trees that have both).</p>"
        )
    examples = f"<details><summary>examples</summary><ol class=path>{steps}</ol></details>"
    return table(head, rows) + drawn + (examples if steps else "")
