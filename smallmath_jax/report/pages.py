"""The run report: report/index.html, one self-contained page, and report/report.json with every number it shows.

Everything is read back from the workdir's logs, so a report can be made again at any time, of any run: one without
pictures, levels or evaluations, or one that has not finished, shows what is there. The plots also lie in report/plots
as PNG files, for slides. A self-evolution run's own sections are in report/evolution.py.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.records import read_parts, to_json, write_text
from smallmath_jax.report import answers, evolution, plots, samples
from smallmath_jax.report.data import data_section
from smallmath_jax.report.markup import document, escape, figure, percent, table

Row = dict[str, Any]

# Folders of report/ that may hold an index of search trees -> how the report's contents name it.
TREE_FOLDERS = {"trees": "Search trees", "trees_held_out": "Searches of held-out problems"}

# Panels of the training curves: title -> metric names; names absent from a log leave no panel.
PANELS = {
    "reward": {"reward": "reward", "spread in a group": "reward_std"},
    "reward parts": {
        "format": "rewards/format/mean",
        "length": "rewards/length/mean",
        "correct": "rewards/correct/mean",
    },
    "accuracy of rollouts": {"accuracy": "accuracy"},
    "completion length, tokens": {
        "all": "completions/mean_length",
        "right": "length/correct_mean",
        "wrong": "length/wrong_mean",
    },
    "groups": {
        "all right": "groups/all_correct",
        "all wrong": "groups/all_wrong",
        "mixed": "groups/mixed",
    },
    "loss": {"loss": "loss"},
    "entropy, nats": {"entropy": "entropy"},
    "gradient norm": {"before clipping": "grad_norm"},
    "truncated share": {"truncated": "completions/clipped_ratio"},
    "clip fraction": {"low": "clip_ratio/low_mean", "high": "clip_ratio/high_mean"},
    "sampler against trainer": {
        "mean |log-prob difference|": "sampling/sampling_logp_difference/mean"
    },
    "token accuracy": {"token accuracy": "mean_token_accuracy"},
    "preference accuracy": {"training": "accuracy/pairs", "held out": "eval/accuracy"},
    "tokens per second": {"tokens/s": "tokens_per_second"},
}
CATEGORIES = {"by_level": "by level", "by_subject": "by subject", "by_set": "by problem set"}


def write_report(
    workdir: str | os.PathLike[str], compare: Iterable[str] = (), wall_s: float | None = None
) -> dict:
    """Writes WORKDIR/report/index.html, report.json and plots/*.png; returns what report.json holds.

    `compare`: workdirs of other runs whose evaluations are shown beside this one's. WORKDIR/evolution.json, if there,
    has the shape that evolution.py states; its fields join report.json. Search trees that trees.write_tree_index put
    into a folder of TREE_FOLDERS are linked.
    """
    root = epath.Path(workdir)
    evaluations = find_evaluations(root)
    for label, other in _labels(compare).items():
        for name, found in find_evaluations(other).items():
            evaluations[f"{label}: {name}"] = found
    training = {
        stage: sorted(read_parts(folder), key=lambda row: row["step"])
        for stage, folder in (("sft", root / "sft" / "metrics"), ("train", root / "metrics"))
    }
    training = {stage: rows for stage, rows in training.items() if rows}
    rounds = evolution.read(root)
    record = report_record(evaluations, training, wall_s, rounds)
    path = root / "config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    if judged := find_judge(root):
        record["reward_model"] = judged
    if told := config.get("training_data"):
        record["training_data"] = told
    write_text(root / "report" / "report.json", json.dumps(json.loads(to_json(record)), indent=1))
    pictures = Pictures()
    trees = [name for name in TREE_FOLDERS if (root / "report" / name / "index.html").exists()]
    text = page(root.name, record, evaluations, training, config, pictures, trees)
    write_text(root / "report" / "index.html", text)
    pictures.write(root / "report" / "plots")
    return record


def _labels(workdirs: Iterable[str]) -> dict[str, epath.Path]:
    """label -> workdir: the shortest ends of their paths that tell them apart."""
    folders = [epath.Path(name) for name in dict.fromkeys(str(epath.Path(w)) for w in workdirs)]
    longest = max((len(folder.parts) for folder in folders), default=0)
    for count in range(1, longest + 1):
        labels = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, folders, strict=True)) if folders else {}


class Pictures:
    """The plots of one page, each drawn as SVG for the page and as PNG for its file."""

    def __init__(self):
        self._files: dict[str, bytes] = {}

    def __call__(self, name: str, draw, *data, caption: str = "", **options) -> str:
        """The <figure> of `draw(*data, form="svg", **options)`; its PNG is kept as NAME.png."""
        self._files[name] = draw(*data, form="png", **options)
        return figure(draw(*data, form="svg", **options), caption)

    def write(self, folder: epath.Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (folder / f"{name}.png").write_bytes(content)


def find_evaluations(root: epath.Path) -> dict[str, dict[str, Any]]:
    """name -> {"result", "folder"}; a run's eval/NAME folders, or an evaluation's own workdir."""
    found = {}
    if (root / "result.json").exists():
        result = json.loads((root / "result.json").read_text())
        if "accuracy" in result:  # a reward model's training tells of its pairs instead
            found["evaluation"] = {"result": result, "folder": root}
    folder = root / "eval"
    if folder.exists():
        names = [child.name for child in folder.iterdir() if (child / "result.json").exists()]
        for name in sorted(names, key=lambda name: (not name.startswith("before"), name)):
            result = json.loads((folder / name / "result.json").read_text())
            found[name] = {"result": result, "folder": folder / name}
    return found


def find_judge(root: epath.Path) -> dict[str, Any] | None:
    """What the training of a reward model in this workdir says of its held-out pairs; None for other runs."""
    path = root / "result.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if "held_out_pairs" in found else None


def report_record(
    evaluations: dict[str, dict[str, Any]],
    training: dict[str, list[Row]],
    wall_s: float | None,
    rounds: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What report.json holds: the last evaluation's headline form on top, before and after, every evaluation."""
    record: dict[str, Any] = {}
    results = {name: found["result"] for name, found in evaluations.items()}
    headline = (
        results.get("after")
        or results.get("evaluation")
        or next(iter(results.values()), None)
        or evolution.headline(rounds or {})
    )
    if headline:
        fields = ("accuracy", "n", "ci", "by_level", "by_subject", "decoding")
        record |= {name: headline[name] for name in fields if name in headline}
    for name in ("before", "after"):
        if name in results:
            record[name] = results[name]
    record["evaluations"] = results
    record["training"] = {
        stage: {"steps": rows[-1]["step"], "first": rows[0], "last": rows[-1]}
        for stage, rows in training.items()
    }
    record |= rounds or {}
    if wall_s is not None:
        record["wall_s"] = round(wall_s, 1)
    return record


def page(
    title: str,
    record: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    training: dict[str, list[Row]],
    config: dict[str, Any],
    pictures: Pictures,
    trees: Sequence[str] = (),
) -> str:
    """The whole report as one HTML text. `trees`: names in TREE_FOLDERS, of the indices that lie beside it."""
    task = config.get("config", {})
    results = {name: found["result"] for name, found in evaluations.items()}
    sections: dict[str, str] = {}
    if results:
        sections["Accuracy"] = accuracy_section(results, pictures)
        sections["Where the right answers are"] = pies_section(results, pictures)
    sections |= answers.sections(results, pictures)
    sections |= evolution.sections(record, pictures)
    for stage, rows in training.items():
        name = "SFT cold start" if stage == "sft" else f"Training ({task.get('task', 'run')})"
        sections[name] = curves_section(rows, stage, pictures)
    sections |= samples.sections(evaluations, pictures)
    if told := data_section(config.get("training_data", {})):
        sections["Training data"] = told
    if config:
        text = escape(json.dumps(config, indent=1))
        sections["Settings"] = f"<details><summary>config.json</summary><pre>{text}</pre></details>"
    sections = {name: text for name, text in sections.items() if text}
    anchors = {name: f"s{place}" for place, name in enumerate(sections)}
    contents = "".join(f"<a href='#{anchors[name]}'>{escape(name)}</a>" for name in sections)
    contents += "".join(f"<a href='{name}/index.html'>{TREE_FOLDERS[name]} →</a>" for name in trees)
    body = [
        "<main><header class=top><p class=eyebrow>smallmath_jax · run report</p>",
        f"<h1>{escape(title)}</h1><ul class=facts>{_facts(task, config, record)}</ul>",
        hero(record),
        f"<nav class=contents aria-label=Contents>{contents}</nav></header>",
        *(
            f"<section id={anchors[name]}><h2>{escape(name)}</h2>{text}</section>"
            for name, text in sections.items()
        ),
        "</main>",
    ]
    return document(title, ["base.css", "report.css"], "\n".join(body))


def _facts(task: dict[str, Any], config: dict[str, Any], record: dict[str, Any]) -> str:
    words = []
    if task.get("task"):
        words.append(":".join(str(task[name]) for name in ("task", "mode") if task.get(name)))
    words += [f"{name} {task[name]}" for name in ("model", "seed") if name in task]
    words += [str(config["devices"])] if config.get("devices") else []
    words += [f"revision {config['revision']}"] if config.get("revision") else []
    if "wall_s" in record:
        words.append(duration(record["wall_s"]))
    return "".join(f"<li>{escape(word)}</li>" for word in words)


def duration(seconds: float) -> str:
    """Seconds as one reads them: 48 s, 10 min 10 s, 7 h 5 min."""
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def hero(record: dict[str, Any]) -> str:
    """The few numbers one remembers; says so when there is no evaluation yet."""
    before, after = record.get("before"), record.get("after")
    cells = []
    if before and after:
        gain = 100 * (after["accuracy"] - before["accuracy"])
        cells.append(_cell(percent(before["accuracy"]), "before training"))
        cells.append(_cell(percent(after["accuracy"]), "after training", lead=True))
        cells.append(_cell(f"{gain:+.1f}", "points gained"))
    elif "accuracy" in record and not record.get("rounds"):
        which = "before training; the run has not finished" if before else "accuracy"
        cells.append(_cell(percent(record["accuracy"]), which, lead=True))
    if rounds := record.get("rounds"):
        cells += _round_cells(rounds)
    elif "ci" in record:
        low, high = record["ci"]
        cells.append(
            _cell(f"{100 * low:.0f}–{100 * high:.0f}%", f"95 % interval, {record['n']} problems")
        )
    if judged := record.get("reward_model"):
        if (share := judged["held_out_accuracy"]) is not None:
            cells.append(_cell(percent(share), "held-out pairs in the right order", lead=True))
        cells.append(_cell(f"{judged['held_out_pairs']:,}", "pairs held out"))
        cells.append(_cell(f"{judged['trained_on']:,}", "pairs or examples learnt from"))
    if not cells:
        return "<p class=note>No evaluation yet: this run has not finished.</p>"
    return f"<div class=hero>{''.join(cells)}</div>"


def _round_cells(rounds: list[dict[str, Any]]) -> list[str]:
    """The last round's shares, those of the first beside them."""
    cells = []
    for name, words in evolution.SHARES.items():
        known = [(r, evolution.value(r.get(name))) for r in rounds]
        known = [(evolution.round_name(r), share) for r, share in known if share is not None]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            about = f"{words}, {last}" + (f" ({first}: {percent(start)})" if len(known) > 1 else "")
            cells.append(_cell(percent(end), about, lead=name == "search_accuracy"))
    return cells


def _cell(number: str, words: str, lead: bool = False) -> str:
    return f"<div{' class=lead' if lead else ''}><b>{number}</b><span>{escape(words)}</span></div>"


def accuracy_section(results: dict[str, dict[str, Any]], pictures: Pictures) -> str:
    overall = {name: {"overall": result} for name, result in results.items()}
    rows = {
        field: {name: result[field] for name, result in results.items() if result.get(field)}
        for field in CATEGORIES
    }
    if not any(len(found) > 1 for found in rows["by_set"].values()):
        rows["by_set"] = {}
    known = lambda found: any(set(groups) != {"unknown"} for groups in found.values())
    drawn = [
        pictures("accuracy", plots.accuracy_bars, overall, "overall"),
        *(
            _category_plot(field, title, rows[field], pictures)
            for field, title in CATEGORIES.items()
            if rows[field] and known(rows[field])
        ),
    ]
    note = "<p class=note>Whiskers and intervals: 95 %, Wilson's method, over problems.</p>"
    notes = "".join(f"<p class=note>{line}</p>" for line in accuracy_notes(results))
    return overall_table(results) + note + notes + f"<div class=grid>{''.join(drawn)}</div>"


def accuracy_notes(results: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of the table must know: problems left out, and what a forced or an unseen row is."""
    lines = []
    for name, result in results.items():
        left_out = result.get("left_out") or {}
        if left_out:
            reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
            lines.append(
                f"<b>{escape(name)}: {sum(left_out.values())} problems were left out</b> ({escape(reasons)}); "
                "the accuracy is of the others."
            )
    if any(name.endswith("_forced") for name in results):
        lines.append(
            "<b>forced</b>: the beginning of a worked solution is put behind the prompt. Where a forced row before "
            "training is as good as one after it, training chose a better style and taught nothing new."
        )
    if any("tiny:unseen" in (result.get("by_set") or {}) for result in results.values()):
        lines.append("<b>tiny:unseen</b>: kinds of problems that no training problem is of.")
    return lines


def _category_plot(field: str, title: str, tables: dict, pictures: Pictures) -> str:
    prefix = "level " if field == "by_level" else ""
    drawn = pictures(f"accuracy_{field}", plots.accuracy_bars, tables, title, prefix=prefix)
    return f"<div>{drawn}{category_table(tables)}</div>"


def overall_table(results: dict[str, dict[str, Any]]) -> str:
    """Every evaluation, decoding and problem set; pass@k and maj@k in a table of their own."""
    rows, chances = [], []
    for name, result in results.items():
        for decoding in ("sampled", "greedy", "search"):
            found = result.get(decoding)
            if not found:
                continue
            sets = found.get("by_set", {})
            shown = {"": found} if len(sets) < 2 else sets
            for label, cell in shown.items():
                low, high = cell["ci"]
                rows.append(
                    [
                        escape(name),
                        escape(label),
                        decoding,
                        f"<b>{percent(cell['accuracy'])}</b>",
                        f"{percent(low)} – {percent(high)}",
                        str(cell["n"]),
                        percent(cell["lenient"]["accuracy"]) if "lenient" in cell else "",
                        percent(cell["no_answer"]) if "no_answer" in cell else "",
                        f"{cell['mean_length']:.0f}" if "mean_length" in cell else "",
                    ]
                )
            chances += _chance_rows(name, decoding, found)
    head = ["evaluation", "problems of", "decoding", "accuracy", "95 % interval", "problems"]
    head += ["lenient", "no answer", "mean tokens"]
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    text = table([head[p] for p in kept], [[row[p] for p in kept] for row in rows])
    if chances:
        text += "<h3>pass@k and maj@k</h3>"
        text += table(["evaluation", "k", "pass@k", "maj@k", "95 % interval of maj@k"], chances)
    return text


def _chance_rows(name: str, decoding: str, found: dict[str, Any]) -> list[list[str]]:
    """pass@k beside maj@k; with k = 1 alone they are the accuracy again, and stay out."""
    chances, votes = found.get("pass_at_k", {}), found.get("maj_at_k", {})
    if set(chances) <= {"1"}:
        return []
    rows = []
    for k, chance in chances.items():
        vote = votes.get(k)
        interval = " – ".join(percent(end) for end in vote["ci"]) if vote else ""
        rows.append(
            [
                escape(f"{name}, {decoding}"),
                escape(k),
                percent(chance),
                percent(vote["accuracy"]) if vote else "",
                interval,
            ]
        )
    return rows


def category_table(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    categories = plots.categories_of(tables)
    rows = []
    for category in categories:
        cells = [found.get(category) for found in tables.values()]
        shown = [f"{percent(cell['accuracy'])} ({cell['n']})" if cell else "" for cell in cells]
        rows.append([escape(category), *shown])
    head = ["", *(escape(name) for name in tables)]
    return f"<details><summary>numbers</summary>{table(head, rows)}</details>"


def pies_section(results: dict[str, dict[str, Any]], pictures: Pictures) -> str:
    """Small-Math-R1's pies (section 4.3.4): the right answers' spread over subjects and levels, before and after."""
    own = {n: r for n, r in results.items() if n in ("before", "after", "evaluation")} or results
    parts = []
    for field in ("by_subject", "by_level"):
        tables = {name: result[field] for name, result in own.items() if result.get(field)}
        categories = plots.categories_of(tables)
        if categories in ([], ["unknown"]):
            continue
        prefix = "level " if field == "by_level" else ""
        for place, (name, found) in enumerate(tables.items()):
            named = {prefix + category: cell for category, cell in found.items()}
            parts.append(
                pictures(
                    f"right_answers_{field}_{place}",
                    plots.correct_pie,
                    named,
                    f"{name}: right answers {CATEGORIES[field]}",
                    categories=[prefix + category for category in categories],
                )
            )
    return f"<div class=grid>{''.join(parts)}</div>" if parts else ""


def curves_section(rows: list[Row], stage: str, pictures: Pictures) -> str:
    steps = [row["step"] for row in rows]
    parts = []
    for title, names in PANELS.items():
        found = {
            label: [number(row.get(name)) for row in rows]
            for label, name in names.items()
            if any(name in row for row in rows)
        }
        if found:
            file_name = f"{stage}_{title}".replace(" ", "_").replace("|", "").replace(",", "")
            parts.append(pictures(file_name, plots.curves, steps, found, title))
    return f"<div class='grid small'>{''.join(parts)}</div>" if parts else ""


def number(value: Any) -> float:
    """A logged value as a number; NaN for one that is absent."""
    return math.nan if value is None else float(value)
