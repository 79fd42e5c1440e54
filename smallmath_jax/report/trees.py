"""The search-tree pages: one self-contained HTML file a searched problem, and an index of many.

A page holds the tree as an indented outline (rows in sight only, so 20,000 nodes answer as fast as 20), the whole tree
as a small map, and the selected node in full; it works by keyboard and by mouse ("?" on the page lists the keys), and
`PAGE.html#0.2.1` opens it at that node. Node texts are written by a model: they reach the page as JSON that cannot
leave its element, and from there only as text; the page's policy lets no script run but its own.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from etils import epath

from smallmath_jax.records import Node, Tree, write_text
from smallmath_jax.report.markup import asset, document, escape, percent, picture, script_json
from smallmath_jax.report.metrics import UNGRADABLE
from smallmath_jax.report.samples import badge
from smallmath_jax.search.tree import policy_shares

STOPPED = {
    "rollouts": "all rollouts taken",
    "exhausted": "nothing left to expand",
    "decided": "more rollouts could not change the answer",
    "confident": "confident in the answer",
}
# What the page tells of Tree.extra and of its settings; the rest is the search's own book-keeping.
TOLD = {
    "failure": "failed:",
    "rollouts_saved": "rollouts saved",
    "tokens_saved": "tokens saved",
    "duplicates": "repeated candidates",
    "sandbox_tier": "sandbox",
    "policy_version": "policy version",
}
SETTINGS = {
    "guidance": "guided by",
    "candidates": "candidates a step",
    "max_depth": "at most deep",
    "exploration": "exploration c",
    "prior": "weight of the prior",
}
SHAPES = 500  # trees: a larger index leaves the small pictures of their shapes out
SHAPE_NODES = 120
FIELDS = (
    "tag parent kind text visits q prior score logp written appended answer verdict status output error errors"
).split()


def write_tree_page(tree: Tree, path: str | os.PathLike[str], index: str = "") -> None:
    """Writes one tree as a page of its own. `index`: the address of the index page, for a link back.

    Raises ValueError when the tree has no nodes.
    """
    write_text(path, tree_page(tree, index))


def write_tree_index(
    trees: Iterable[Tree], folder: str | os.PathLike[str], title: str = "Search trees"
) -> None:
    """Writes a page a tree, and FOLDER/index.html over them: sortable, searchable, one row a tree.

    Trees are taken one at a time, so a stream of them need not fit in memory. Raises ValueError for a tree without
    nodes.
    """
    root = epath.Path(folder)
    rows, totals, shapes = [], Counter(), []
    for tree in trees:
        name = page_name(tree)
        write_tree_page(tree, root / name, index="index.html")
        rows.append(_index_row(tree, name))
        shapes.append(_shape(tree) if len(shapes) < SHAPES else "")
        totals += _totals(tree)
    write_text(root / "index.html", _index_page(title, rows, shapes, totals))


def page_name(tree: Tree) -> str:
    """The file name of a tree's page in an index folder: readable, and one for each (problem, round, seed)."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", tree.problem_id).strip("-")[:48]
    key = f"{tree.problem_id}\x1f{tree.round}\x1f{tree.seed}".encode("utf-8", "surrogatepass")
    return f"{words or 'tree'}-{hashlib.sha256(key).hexdigest()[:8]}.html"


def tree_page(tree: Tree, index: str = "") -> str:
    """The page's text."""
    if not tree.nodes:
        raise ValueError(
            f"tree of problem {tree.problem_id!r} has no nodes: there is nothing to show"
        )
    back = f"<p class=eyebrow><a href='{escape(index)}'>← all trees</a></p>" if index else ""
    chosen = _chosen(tree)
    verdict = badge(chosen.verdict) if chosen else badge("no_answer")
    shown = "".join(picture(image) for image in tree.images)
    header = [
        f"<header>{back}<h1>{escape(tree.problem_id)} {verdict}</h1>",
        f"<dl class=stats>{_stats(tree, chosen)}</dl>",
        "<details class=problem open><summary>the problem</summary><div class=statement>",
        f"{shown}<p>{escape(tree.problem)}</p></div>",
        f"<p class=note>{escape(_about(tree))}</p></details></header>",
    ]
    body = "\n".join(
        [
            *header,
            asset("tree.html"),
            f'<script type="application/json" id="data">{script_json(_data(tree))}</script>',
        ]
    )
    return document(tree.problem_id, ["base.css", "tree.css"], body, ["tree.js"])


def _data(tree: Tree) -> dict[str, Any]:
    """The nodes as rows of FIELDS, parents before children; `parent` is a row's place, -1 the root's."""
    nodes = sorted(tree.nodes, key=lambda node: node.tag.count("."))
    places: dict[str, int] = {}
    priors = _priors(nodes)
    rows = []
    for place, node in enumerate(nodes):
        parent = -1 if place == 0 else places.get(node.parent, 0)  # a torn tree hangs on its root
        places[node.tag] = place
        rows.append(
            [
                node.tag,
                parent,
                node.kind,
                node.text,
                node.visit_count,
                node.q_value,
                priors.get(node.tag),
                node.score,
                node.log_prob,
                node.written,
                len(node.token_ids) - node.written,
                node.answer,
                node.verdict,
                node.status,
                node.output,
                node.error,
                node.errors,
            ]
        )
    return {"fields": FIELDS, "rows": rows, "chosen": tree.chosen}


def _priors(nodes: Sequence[Node]) -> dict[str, float]:
    """tag -> the policy's share among its siblings, as the search's bound uses it; the root has none."""
    siblings: dict[str, list[Node]] = {}
    for node in nodes[1:]:
        siblings.setdefault(node.parent, []).append(node)
    shares = (zip(group, policy_shares(group), strict=True) for group in siblings.values())
    return {node.tag: share for group in shares for node, share in group}


def _chosen(tree: Tree) -> Node | None:
    return next((node for node in tree.nodes if node.tag == tree.chosen), None)


def _depth(tree: Tree) -> int:
    return max(node.tag.count(".") for node in tree.nodes)


def _answers(tree: Tree) -> list[Node]:
    return [node for node in tree.nodes if node.kind == "answer"]


def _stats(tree: Tree, chosen: Node | None) -> str:
    answers = _answers(tree)
    right = sum(node.verdict == "correct" for node in answers)
    errors = sum(node.kind == "error" for node in tree.nodes)
    wasted = (
        f", {tree.wasted} wasted ({percent(tree.wasted / tree.rollouts)})" if tree.wasted else ""
    )
    facts = {
        "answer": chosen.answer if chosen and chosen.answer is not None else "none",
        "right answer": tree.gold or "not known",
        "rollouts": f"{tree.rollouts}{wasted}",
        "stopped": STOPPED.get(tree.stopped, tree.stopped or "not recorded"),
        "tokens": f"{tree.tokens:,}",
        "nodes": f"{len(tree.nodes):,}, {_depth(tree)} deep",
        "answers found": f"{len(answers)}" + (f", {right} right" if tree.gold else ""),
        "failed steps": str(errors),
    }
    return "".join(f"<div><dt>{n}</dt><dd>{escape(v)}</dd></div>" for n, v in facts.items())


def _about(tree: Tree) -> str:
    words = [
        f"level {tree.level}" if tree.level else "",
        tree.subject or "",
        tree.source,
        tree.template or "",
        f"round {tree.round}" if tree.round else "",
        f"seed {tree.seed}",
        *(f"{name} {tree.extra[field]}" for field, name in TOLD.items() if field in tree.extra),
    ]
    settings = tree.extra.get("settings", {})
    words += [f"{name} {settings[field]}" for field, name in SETTINGS.items() if field in settings]
    return " · ".join(word for word in words if word)


def _totals(tree: Tree) -> Counter:
    chosen = _chosen(tree)
    return Counter(
        trees=1,
        solved=any(node.verdict == "correct" for node in _answers(tree)),
        right=bool(chosen) and chosen.verdict == "correct",
        graded=bool(tree.gold) and not (chosen and chosen.verdict in UNGRADABLE),
        rollouts=tree.rollouts,
        wasted=tree.wasted,
        tokens=tree.tokens,
        nodes=len(tree.nodes),
    )


COLUMNS = ["", "problem", "verdict", "answer", "gold", "level", "subject", "nodes", "depth"]
COLUMNS += ["answers right", "rollouts", "wasted", "tokens", "stopped"]


def _index_row(tree: Tree, name: str) -> list[tuple[Any, str]]:
    """(what a cell is sorted by, its HTML) for each column after the shape's."""
    chosen, answers = _chosen(tree), _answers(tree)
    right = sum(node.verdict == "correct" for node in answers)
    problem = escape(" ".join(tree.problem.split())[:110] or tree.problem_id)
    verdict = chosen.verdict if chosen else "no_answer"
    link = f"<a href='{name}'>{problem}</a><br><small>{escape(tree.problem_id)}</small>"
    plain = [
        chosen.answer if chosen and chosen.answer is not None else "",
        tree.gold,
        tree.level or "",
        tree.subject or "",
        len(tree.nodes),
        _depth(tree),
    ]
    share = (right / len(answers) if answers else -1, f"{right} / {len(answers)}")
    rest = [tree.rollouts, tree.wasted, tree.tokens, tree.stopped]
    return [
        (tree.problem_id, link),
        (verdict, badge(verdict)),
        *((value, escape(str(value)[:40])) for value in plain),
        share,
        *((value, escape(value)) for value in rest),
    ]


def _shape(tree: Tree) -> str:
    """A tree's outline in a table cell: its first nodes breadth-first, coloured by Q-value, the chosen path strong."""
    kept = sorted(tree.nodes, key=lambda node: (node.tag.count("."), not node.visit_count))
    chain = {tree.chosen[:end] for end in _prefix_ends(tree.chosen)}
    kept = [n for n in kept if n.tag in chain] + [n for n in kept if n.tag not in chain]
    tags = {node.tag: node for node in kept[:SHAPE_NODES]}
    tags = {t: n for t, n in tags.items() if not n.parent or n.parent in tags}
    order = sorted(tags, key=lambda tag: [int(p) if p.isdigit() else 0 for p in tag.split(".")])
    inner = {node.parent for node in tags.values()}
    leaves = [tag for tag in order if tag not in inner]
    x = {tag: 4 + 112 * place / max(1, len(leaves) - 1) for place, tag in enumerate(leaves)}
    for tag in sorted(order, key=lambda tag: -tag.count(".")):
        if tag not in x:
            below = [x[child] for child in order if tags[child].parent == tag and child in x]
            x[tag] = sum(below) / len(below) if below else 60.0
    deepest = max(1, max(tag.count(".") for tag in order))
    y = {tag: 4 + 30 * tag.count(".") / deepest for tag in order}
    lines: dict[str, list[str]] = {"dim": [], "good": [], "bad": [], "path": []}
    for tag in order:
        parent = tags[tag].parent
        if parent in tags:
            lines[_stroke(tags[tag], tag in chain)].append(
                f"M{x[parent]:.0f} {y[parent]:.0f}L{x[tag]:.0f} {y[tag]:.0f}"
            )
    strokes = "".join(f"<path class={n} d='{''.join(d)}'/>" for n, d in lines.items() if d)
    return f"<svg viewBox='0 0 120 38' width=120 height=38 aria-hidden=true>{strokes}</svg>"


def _prefix_ends(tag: str) -> list[int]:
    return [place for place, character in enumerate(tag) if character == "."] + [len(tag)]


def _stroke(node: Node, chosen: bool) -> str:
    if chosen:
        return "path"
    if not node.visit_count:
        return "dim"
    return "bad" if node.q_value < 0 else "good"


def _index_page(
    title: str, rows: list[list[tuple[Any, str]]], shapes: list[str], totals: Counter
) -> str:
    count, graded = max(1, totals["trees"]), totals["graded"]
    share = percent(totals["right"] / graded) if graded else "–"
    beside = "" if graded == totals["trees"] else f" of {graded:,} that can be graded"
    facts = {
        "trees": f"{totals['trees']:,}",
        "answered right": f"{totals['right']:,} ({share}{beside})",
        "a right answer somewhere": f"{totals['solved']:,} ({percent(totals['solved'] / count)})",
        "rollouts": f"{totals['rollouts']:,}, {totals['wasted']:,} wasted",
        "tokens a tree": f"{totals['tokens'] / count:,.0f}",
        "nodes a tree": f"{totals['nodes'] / count:,.0f}",
    }
    stats = "".join(f"<div><dt>{n}</dt><dd>{escape(v)}</dd></div>" for n, v in facts.items())
    kept = COLUMNS if any(shapes) else COLUMNS[1:]
    head = "".join(
        f"<th scope=col><button type=button>{name}</button></th>" if name else "<th></th>"
        for name in kept
    )
    lines = []
    for row, shape in zip(rows, shapes, strict=True):
        cells = [f"<td>{shape}"] if any(shapes) else []
        cells += [f"<td data-by='{escape(by)}'>{cell}" for by, cell in row]
        lines.append(f"<tr>{''.join(cells)}")
    body = (
        f"<header><p class=eyebrow>smallmath_jax · search</p><h1>{escape(title)}</h1><dl class=stats>{stats}</dl>"
        "<p><input type=search id=filter placeholder='filter (all words)' aria-label='Filter the trees' "
        "autocomplete=off> <span id=left role=status class=note></span></p></header>"
        f"<main><table><thead><tr>{head}<tbody>{''.join(lines)}</table></main>"
    )
    return document(title, ["base.css", "index.css"], body, ["index.js"])
