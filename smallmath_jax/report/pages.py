"""The run report: report/index.html, one self-contained page, and report/report.json with every number it shows.

Everything is read back from the workdir's logs, so a report can be made again at any time, of any run.
"""

import base64
import hashlib
import html
import json
import math
import os
from collections.abc import Iterable
from typing import Any

from etils import epath

from smallmath_jax.records import read_parts, to_json, write_text
from smallmath_jax.report import plots

Row = dict[str, Any]
SHOWN_SAMPLES = 12

# Panels of the training curves: title -> metric names; names absent from a log leave no panel.
PANELS = {
    "reward": {"reward": "reward", "spread in a group": "reward_std"},
    "accuracy of rollouts": {"accuracy": "accuracy"},
    "completion length, tokens": {
        "all": "completions/mean_length",
        "right": "length/correct_mean",
        "wrong": "length/wrong_mean",
    },
    "reward parts": {
        "format": "rewards/format/mean",
        "length": "rewards/length/mean",
        "correct": "rewards/correct/mean",
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
    "tokens per second": {"tokens/s": "tokens_per_second"},
}

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1f2937;background:#fff}
h1{font-size:1.6em;margin-bottom:.2em}h2{margin-top:2em;border-bottom:1px solid #e5e7eb;padding-bottom:.2em}
table{border-collapse:collapse;margin:.8em 0}td,th{padding:.25em .8em;border-bottom:1px solid #e5e7eb;text-align:right}
td:first-child,th:first-child{text-align:left}img.plot{max-width:100%}.note{color:#6b7280;font-size:.9em}
.sample{border:1px solid #e5e7eb;border-radius:8px;padding:.7em 1em;margin:.8em 0}.sample pre{white-space:pre-wrap;
background:#f9fafb;padding:.5em;margin:.3em 0;font-size:.85em}.right{color:#047857}.wrong{color:#b91c1c}
.sample img{image-rendering:pixelated;min-width:112px;max-width:320px;border:1px solid #e5e7eb;margin:.3em}
"""


def write_report(
    workdir: str | os.PathLike[str], compare: Iterable[str] = (), wall_s: float | None = None
) -> dict:
    """Writes WORKDIR/report/index.html and report.json; returns what report.json holds."""
    root = epath.Path(workdir)
    evaluations = find_evaluations(root)
    for other in compare:
        for name, found in find_evaluations(epath.Path(other)).items():
            evaluations[f"{epath.Path(other).name}: {name}"] = found
    training = {
        stage: sorted(read_parts(folder), key=lambda row: row["step"])
        for stage, folder in (("sft", root / "sft" / "metrics"), ("train", root / "metrics"))
    }
    training = {stage: rows for stage, rows in training.items() if rows}
    record = report_record(evaluations, training, wall_s)
    config = (
        json.loads((root / "config.json").read_text()) if (root / "config.json").exists() else {}
    )
    write_text(root / "report" / "report.json", json.dumps(json.loads(to_json(record)), indent=1))
    write_text(
        root / "report" / "index.html", page(root.name, record, evaluations, training, config, root)
    )
    return record


def find_evaluations(root: epath.Path) -> dict[str, dict[str, Any]]:
    """name -> {"result", "folder"}; a run's eval/NAME folders, or an evaluation's own workdir."""
    found = {}
    if (root / "result.json").exists():
        found["evaluation"] = {
            "result": json.loads((root / "result.json").read_text()),
            "folder": root,
        }
    folder = root / "eval"
    if folder.exists():
        names = [child.name for child in folder.iterdir() if (child / "result.json").exists()]
        for name in sorted(names, key=lambda name: (not name.startswith("before"), name)):
            result = json.loads((folder / name / "result.json").read_text())
            found[name] = {"result": result, "folder": folder / name}
    return found


def report_record(
    evaluations: dict[str, dict[str, Any]], training: dict[str, list[Row]], wall_s: float | None
) -> dict[str, Any]:
    """What report.json holds: the last evaluation's headline form on top, before and after, every evaluation."""
    record: dict[str, Any] = {}
    results = {name: found["result"] for name, found in evaluations.items()}
    headline = (
        results.get("after") or results.get("evaluation") or next(iter(results.values()), None)
    )
    if headline:
        record |= {
            name: headline[name]
            for name in ("accuracy", "n", "ci", "by_level", "by_subject", "decoding")
        }
    for name in ("before", "after"):
        if name in results:
            record[name] = results[name]
    record["evaluations"] = results
    record["training"] = {
        stage: {"steps": rows[-1]["step"], "first": rows[0], "last": rows[-1]}
        for stage, rows in training.items()
    }
    if wall_s is not None:
        record["wall_s"] = round(wall_s, 1)
    return record


def page(
    title: str,
    record: dict[str, Any],
    evaluations: dict[str, dict[str, Any]],
    training: dict[str, list[Row]],
    config: dict[str, Any],
    root: epath.Path,
) -> str:
    """The whole report as one HTML text without outside links."""
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    ]
    task = config.get("config", {})
    parts.append(
        f"<h1>{html.escape(title)}</h1><p class=note>{html.escape(_subtitle(task, config, record))}</p>"
    )
    if evaluations:
        parts += _accuracy_section({name: found["result"] for name, found in evaluations.items()})
    for stage, rows in training.items():
        name = "SFT cold start" if stage == "sft" else f"Training ({task.get('task', 'run')})"
        parts.append(f"<h2>{name}</h2>{_curves(rows)}")
    if evaluations:
        parts += _sample_section(evaluations, root)
    if config:
        text = html.escape(json.dumps(config, indent=1))
        parts.append(
            f"<h2>Settings</h2><details><summary>config.json</summary><pre>{text}</pre></details>"
        )
    return "\n".join(parts)


def _subtitle(task: dict[str, Any], config: dict[str, Any], record: dict[str, Any]) -> str:
    words = [f"{task.get('task', '')}:{task.get('mode', '')}", f"model {task.get('model', '')}"]
    words += [
        f"seed {task.get('seed', '')}",
        str(config.get("devices", "")),
        f"revision {config.get('revision', '')}",
    ]
    if "wall_s" in record:
        words.append(f"{record['wall_s']:.0f} s in all")
    return " · ".join(word for word in words if word)


def _accuracy_section(results: dict[str, dict[str, Any]]) -> list[str]:
    parts = ["<h2>Accuracy</h2>", _overall_table(results)]
    overall = {name: {"overall": result} for name, result in results.items()}
    parts.append(
        _picture(plots.accuracy_bars(overall, "overall, 95 % Wilson intervals"), "accuracy overall")
    )
    for field, title in (
        ("by_level", "by level"),
        ("by_subject", "by subject"),
        ("by_set", "by problem set"),
    ):
        tables = {name: result[field] for name, result in results.items() if result.get(field)}
        if tables and (field != "by_set" or any(len(table) > 1 for table in tables.values())):
            parts.append(_picture(plots.accuracy_bars(tables, title), f"accuracy {title}"))
            parts.append(_category_table(tables))
    shown = {
        name: result
        for name, result in results.items()
        if name in ("before", "after", "evaluation")
    } or results
    for field, title in (("by_subject", "by subject"), ("by_level", "by level")):
        tables = {name: result[field] for name, result in shown.items()}
        parts.append(
            _picture(plots.correct_pies(tables, f"right answers {title}"), f"right answers {title}")
        )
    return parts


def _overall_table(results: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, result in results.items():
        for decoding in ("sampled", "greedy"):
            if decoding not in result:
                continue
            table = result[decoding]
            for label, cell in {
                "": table,
                **{f" · {s}": t for s, t in table["by_set"].items()},
            }.items():
                if label and len(table["by_set"]) == 1:
                    continue
                lenient = f"{cell['lenient']['accuracy']:.1%}" if "lenient" in cell else ""
                low, high = cell["ci"]
                rows.append(
                    f"<tr><td>{html.escape(name + label)}<td>{decoding}<td><b>{cell['accuracy']:.1%}</b>"
                    f"<td>{low:.1%} – {high:.1%}<td>{cell['n']}<td>{lenient}<td>{cell['mean_length']:.0f}</tr>"
                )
            for kind in ("pass_at_k", "maj_at_k"):
                for k, value in table.get(kind, {}).items():
                    share = value if kind == "pass_at_k" else value["accuracy"]
                    label = f"{name} · {kind.split('_')[0]}@{k}"
                    rows.append(
                        f"<tr><td>{html.escape(label)}<td>{decoding}<td><b>{share:.1%}</b><td><td><td><td></tr>"
                    )
    head = "<tr><th>evaluation<th>decoding<th>accuracy<th>95 % interval<th>problems<th>lenient<th>mean tokens</tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _category_table(tables: dict[str, dict[str, dict[str, Any]]]) -> str:
    categories = sorted({category for table in tables.values() for category in table})
    head = "<tr><th>" + "".join(f"<th>{html.escape(name)}" for name in tables) + "</tr>"
    lines = []
    for category in categories:
        cells = []
        for table in tables.values():
            cell = table.get(category)
            cells.append(f"<td>{cell['accuracy']:.1%} ({cell['n']})" if cell else "<td>")
        lines.append(f"<tr><td>{html.escape(category)}{''.join(cells)}</tr>")
    return f"<details><summary>numbers</summary><table>{head}{''.join(lines)}</table></details>"


def _curves(rows: list[Row]) -> str:
    steps = [row["step"] for row in rows]
    series = {}
    for title, names in PANELS.items():
        found = {
            label: [float(row.get(name, math.nan)) for row in rows]
            for label, name in names.items()
            if any(name in row for row in rows)
        }
        if found:
            series[title] = found
    return _picture(plots.curves(steps, series, "step"), "training curves") if series else ""


def _sample_section(evaluations: dict[str, dict[str, Any]], root: epath.Path) -> list[str]:
    """The same problems through every evaluation of this run, pictures first, chosen by hash and not by eye."""
    own = {
        n: f for n, f in evaluations.items() if n in ("before", "after", "evaluation")
    } or evaluations
    tables = {name: _samples_by_problem(found) for name, found in own.items()}
    shared = set.intersection(*(set(table) for table in tables.values()))
    order = sorted(shared, key=lambda problem: hashlib.sha256(problem.encode()).hexdigest())
    first = next(iter(tables.values()))
    pictured = [problem for problem in order if first[problem]["images"]][: SHOWN_SAMPLES // 2]
    chosen = (
        pictured
        + [problem for problem in order if problem not in pictured][: SHOWN_SAMPLES - len(pictured)]
    )
    parts = ["<h2>Sample completions</h2>", "<p class=note>Chosen by hash of the problem's id.</p>"]
    for problem in chosen:
        row = first[problem]
        pictures = "".join(_image(image, root) for image in row["images"])
        question = html.escape(row["prompt"])
        parts.append(
            f"<div class=sample>{pictures}<pre>{question}</pre><p>gold: <b>{html.escape(row['gold'])}</b></p>"
        )
        for name, table in tables.items():
            sample = table[problem]
            colour = "right" if sample["verdict"] == "correct" else "wrong"
            parts.append(
                f"<p>{html.escape(name)}: <b class={colour}>{sample['verdict']}</b></p>"
                f"<pre>{html.escape(sample['text'])}</pre>"
            )
        parts.append("</div>")
    lengths = {
        name: [len(row["token_ids"]) for row in table.values()] for name, table in tables.items()
    }
    parts.append(_picture(plots.length_histogram(lengths), "completion lengths"))
    return parts


def _samples_by_problem(found: dict[str, Any]) -> dict[str, Row]:
    decoding = found["result"]["decoding"]
    rows = read_parts(found["folder"] / "completions")
    return {
        row["problem_id"]: row
        for row in rows
        if row["extra"]["decoding"] == decoding and row["sample"] == 0
    }


def _image(source: str, root: epath.Path) -> str:
    if not source.startswith("data:"):
        path = epath.Path(source)
        if not path.exists():
            return f"<p class=note>picture {html.escape(source)} is no longer there</p>"
        kind = (
            "jpeg"
            if path.suffix.lower() in (".jpg", ".jpeg")
            else path.suffix.lower().lstrip(".") or "png"
        )
        source = f"data:image/{kind};base64," + base64.b64encode(path.read_bytes()).decode()
    return f'<img src="{source}" alt="the problem\'s picture">'


def _picture(png: bytes, alt: str) -> str:
    return f'<img class=plot alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
