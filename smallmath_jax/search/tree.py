"""The search tree: nodes, the upper confidence bound, backing values up, and the tree as a record.

While a search runs its nodes are mutable (visit counts and sums change all the time); everything that leaves the search
is a frozen `records.Tree`. rStar-Math, section 3.2.2 and 3.2.3.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from smallmath_jax.records import Node, Problem, Tree
from smallmath_jax.search.settings import SearchSettings

TERMINAL = ("answer", "error", "too_deep", "invalid")
_STORED = tuple(field.name for field in dataclasses.fields(Node))


@dataclasses.dataclass(eq=False, slots=True)
class LiveNode:
    """A node of a running search. Fields named as in `records.Node` mean the same."""

    tag: str = "0"
    parent: "LiveNode | None" = None
    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    written: int = 0
    log_prob: float = 0.0
    kind: str = "root"
    visit_count: int = 0
    value_sum: float = 0.0
    score: float | None = None
    answer: str | None = None
    verdict: str = ""
    status: str = ""
    output: str = ""
    error: str = ""
    errors: int = 0
    rollout: int = 0
    exhausted: bool = False  # every child is terminal or exhausted: nothing is left to find below
    handle: Any = None  # where generation continues; made again from token_ids when missing
    children: list["LiveNode"] = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> int:
        return self.tag.count(".")


@dataclasses.dataclass(eq=False, slots=True)
class LiveTree:
    """A running search: nodes in the order of their creation, and what it has cost."""

    nodes: list[LiveNode] = dataclasses.field(default_factory=lambda: [LiveNode()])
    rollouts: int = 0
    wasted: int = 0
    tokens: int = 0
    duplicates: int = 0  # candidates dropped as repetitions
    dropped: int = 0  # candidates dropped beside an answer
    discarded: int = 0  # candidates dropped because their code failed
    walks: list[list[str | None]] = dataclasses.field(default_factory=list)
    latest: list[LiveNode] = dataclasses.field(default_factory=list)  # scored last; read by compat

    @property
    def root(self) -> LiveNode:
        return self.nodes[0]


def is_terminal(node: LiveNode) -> bool:
    """Never selected again: an answer, a failure, or nothing left below."""
    return node.exhausted or node.kind in TERMINAL


def q_value(node: LiveNode | Node) -> float:
    """W / N; a score that counted no visit stands alone until the first one; 0 when there is neither."""
    return node.value_sum / max(node.visit_count, 1)


def uct(node: LiveNode, exploration: float, unvisited: str = "zero", prior: float = 0.0) -> float:
    """Q(s) + c sqrt(ln N(parent) / N(s)) (rStar-Math, section 3.2.2), plus the policy's prior where asked for.

    The second term is 0 while the parent has no visit; a child without visits follows `unvisited`
    (SearchSettings). The root has no bound: 0.
    """
    if node.parent is None:
        return 0.0
    if node.visit_count == 0 and unvisited == "first":
        return math.inf
    bound = q_value(node)
    above = node.parent.visit_count
    if node.visit_count and above:
        bound += exploration * math.sqrt(math.log(above) / node.visit_count)
    if prior:
        bound += prior * policy_share(node) * math.sqrt(above) / (1 + node.visit_count)
    return bound


def policy_share(node: LiveNode) -> float:
    """The node's prior: its part of its siblings' probability (`policy_shares`)."""
    siblings = node.parent.children
    return policy_shares(siblings)[siblings.index(node)]


def policy_shares(siblings: Sequence[LiveNode | Node]) -> list[float]:
    """Each one's part of their probability, by mean log-prob a token so that long steps are not put last."""
    means = [one.log_prob / max(one.written, 1) for one in siblings]
    highest = max(means)
    weights = [math.exp(mean - highest) for mean in means]
    return [weight / sum(weights) for weight in weights]


def best_child(node: LiveNode, settings: SearchSettings) -> LiveNode | None:
    """The non-terminal child of highest bound, then Q, then the first; None when there is none.

    A node found without one is marked exhausted here; by default `mark_exhausted` has done so before, while the public
    code spends a rollout on finding it out, once an ancestor.
    """
    children = [child for child in node.children if not is_terminal(child)]
    if not children:
        node.exhausted = True
        return None
    bound = lambda child: uct(child, settings.exploration, settings.unvisited, settings.prior)
    if settings.compat:
        return max(children, key=bound)
    return max(
        children, key=lambda child: (bound(child), q_value(child))
    )  # unvisited ones by score


def mark_exhausted(node: LiveNode | None) -> None:
    """Marks `node` and every ancestor with nothing left to find below."""
    while node is not None and all(map(is_terminal, node.children)):
        node.exhausted = True
        node = node.parent


def revive(node: LiveNode | None) -> None:
    """Takes back `mark_exhausted`: below `node` there is something to find again."""
    while node is not None:
        node.exhausted = False
        node = node.parent


def update(node: LiveNode, value: float) -> None:
    """One visit of this node alone."""
    node.visit_count += 1
    node.value_sum += value


def backup(node: LiveNode | None, value: float) -> None:
    """One visit of the node and of every ancestor, the root included (section 3.2.3)."""
    while node is not None:
        update(node, value)
        node = node.parent


def path(node: LiveNode) -> list[LiveNode]:
    """From the root to the node, both included."""
    nodes = [node]
    while nodes[-1].parent is not None:
        nodes.append(nodes[-1].parent)
    return nodes[::-1]


def new_tree(handle: Any = None) -> LiveTree:
    """A tree of its root alone; `handle` is the prompt (images and all) that generation starts from."""
    root = LiveNode(handle=handle)
    return LiveTree([root], latest=[root])


# ---- the tree as a record


def to_record(
    live: LiveTree,
    problem: Problem,
    settings: SearchSettings,
    *,
    stopped: str,
    chosen: str = "",
    extra: dict[str, Any] | None = None,
) -> Tree:
    """The finished search as a line of trees/*.jsonl. With `from_record` it loses nothing but the handles."""
    nodes = [Node(**{name: getattr(node, name) for name in _STORED}) for node in live.nodes]
    counts = {name: getattr(live, name) for name in ("duplicates", "dropped", "discarded")}
    exhausted = [node.tag for node in live.nodes if node.exhausted]
    return Tree(
        problem_id=problem.id,
        problem=problem.problem,
        gold=problem.answer,
        nodes=[dataclasses.replace(node, token_ids=list(node.token_ids)) for node in nodes],
        chosen=chosen,
        rollouts=live.rollouts,
        wasted=live.wasted,
        tokens=live.tokens,
        stopped=stopped,
        seed=settings.seed,
        round=settings.round,
        level=problem.level,
        subject=problem.subject,
        source=problem.source,
        template=problem.template,
        images=tuple(image for image in problem.images if isinstance(image, str)),
        extra={
            "settings": dataclasses.asdict(settings),
            "walks": [list(walk) for walk in live.walks],
            "exhausted": exhausted,
            **counts,
            **(extra or {}),
        },
    )


def from_record(tree: Tree, handle: Any = None) -> LiveTree:
    """A tree that can go on; `handle` is its prompt. Raises ValueError for a tree whose nodes do not hang together."""
    by_tag: dict[str, LiveNode] = {}
    for node in tree.nodes:
        parent = by_tag.get(node.parent)
        if (parent is None) != (not by_tag) or node.tag in by_tag:
            raise ValueError(
                f"tree of problem {tree.problem_id!r}: node {node.tag!r} comes before its parent, or twice; "
                "the record is damaged, search the problem again"
            )
        values = {name: getattr(node, name) for name in _STORED}
        live = LiveNode(**(values | {"parent": parent, "token_ids": list(node.token_ids)}))
        by_tag[node.tag] = live
        if parent is not None:
            parent.children.append(live)
    if not by_tag:
        raise ValueError(f"tree of problem {tree.problem_id!r} has no nodes, not even a root")
    nodes = list(by_tag.values())
    nodes[0].handle = handle
    for tag in tree.extra.get("exhausted", ()):
        by_tag[tag].exhausted = True
    counts = {name: tree.extra.get(name, 0) for name in ("duplicates", "dropped", "discarded")}
    walks = [list(walk) for walk in tree.extra.get("walks", ())]
    return LiveTree(nodes, tree.rollouts, tree.wasted, tree.tokens, walks=walks, **counts)


def tree_from_json(row: dict[str, Any]) -> Tree:
    """A Tree of a line of trees/*.jsonl (see records.read_parts)."""
    nodes = [Node(**node) for node in row["nodes"]]
    return Tree(**(row | {"nodes": nodes, "images": tuple(row.get("images", ()))}))


def children_of(tree: Tree) -> dict[str, list[Node]]:
    """tag -> children, in the order of their creation; every node has an entry."""
    found: dict[str, list[Node]] = {node.tag: [] for node in tree.nodes}
    for node in tree.nodes:
        if node.parent:
            found[node.parent].append(node)
    return found


def path_to(tree: Tree, tag: str) -> list[Node]:
    """The steps from the root's child to `tag` (the root itself is no step)."""
    by_tag = {node.tag: node for node in tree.nodes}
    return [by_tag[prefix] for prefix in _prefixes(tag)]


def _prefixes(tag: str) -> Iterator[str]:
    parts = tag.split(".")
    for length in range(2, len(parts) + 1):
        yield ".".join(parts[:length])
