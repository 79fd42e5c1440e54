"""Trees on disk: written in parts as they finish, found by an index, read one by one.

    FOLDER/NUMBER-hostH.jsonl          a part: one row a line
    FOLDER/index/NUMBER-hostH.jsonl    of trees: which line is whose, so that nobody reads a round to ask what is in it

A part is published behind its index, so a part that is there always has the index that describes it; a part without
one is read once to make it. Of a (problem, seed, round) the later tree counts, but never a failed one before one
that did not fail.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from smallmath_jax.parallel import hosts
from smallmath_jax.records import Tree, to_json, write_part, write_text
from smallmath_jax.search.tree import tree_from_json
from smallmath_jax.tasks.sources import name_of

PART_TREES = 64  # rows a published part holds at most
SORTED_ROWS = 1024  # rows a part of sorted rows holds
PART_SECONDS = 30.0  # rows wait at most so long: what a kill can cost
AHEAD = 16  # trees that are fetched while one is worked on: folders may be far away
FAILED = "failed"


# ---- writing


class Parts:
    """Writes rows as parts: PART_TREES a part, what has waited PART_SECONDS, the rest when it is left, by an error too.

    Call `tick` now and then; a row that nothing follows is otherwise published at the end.
    """

    def __init__(self, folder: epath.Path):
        self._folder, self._rows = epath.Path(folder), []
        mine = f"-host{hosts.host_index()}.jsonl"
        found = self._folder.glob(f"*{mine}") if self._folder.exists() else ()
        self._next = max((int(part.name.removesuffix(mine)) + 1 for part in found), default=0)
        self._since = 0.0

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._publish()

    def add(self, *rows: Any) -> None:
        """Rows that stand in one part, for example those of one problem."""
        if not self._rows:
            self._since = time.monotonic()
        self._rows += rows
        if len(self._rows) >= PART_TREES:
            self._publish()
        self.tick()

    def tick(self) -> None:
        """Publishes what has waited long enough."""
        if self._rows and time.monotonic() - self._since >= PART_SECONDS:
            self._publish()

    def _publish(self) -> None:
        if not self._rows:
            return
        name = f"{self._next:05d}-host{hosts.host_index()}.jsonl"
        lines = [to_json(row) for row in self._rows]
        if isinstance(self._rows[0], Tree):
            rows = (json.loads(line) for line in lines)
            sizes = [len(line.encode()) for line in lines]
            found = map(to_json, _index_rows(rows, sizes))
            write_text(self._folder / "index" / name, "".join(f"{line}\n" for line in found))
        write_text(self._folder / name, "".join(f"{line}\n" for line in lines))
        self._next, self._rows = self._next + 1, []


class Rows:
    """Writes rows that are sorted over all hosts as parts HOST-NUMBER.jsonl, whose name order is theirs."""

    def __init__(self, folder: epath.Path):
        self._folder, self._rows, self._next = folder, [], 0

    def __enter__(self) -> "Rows":
        return self

    def __exit__(self, *_: Any) -> None:
        self._publish()

    def add(self, rows: Iterable[Any]) -> None:
        self._rows += rows
        if len(self._rows) >= SORTED_ROWS:
            self._publish()

    def _publish(self) -> None:
        if self._rows:
            name = f"{hosts.host_index():05d}-{self._next:07d}.jsonl"
            write_part(self._folder, name, self._rows)
            self._next, self._rows = self._next + 1, []


# ---- the index


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A tree of a part: where it lies, and what is asked of it most."""

    problem_id: str
    seed: int
    offset: int  # bytes of the part before its line
    length: int  # bytes of the line
    stopped: str
    right: int  # answers graded right
    group: str  # its problem's level; where it has none, the set it comes from
    round: int = 0
    part: epath.Path | None = None

    @property
    def key(self) -> tuple[str, int]:
        return self.problem_id, self.seed


def _index_rows(rows: Iterable[Mapping[str, Any]], sizes: Iterable[int]) -> Iterator[Entry]:
    offset = 0
    for row, size in zip(rows, sizes, strict=True):
        right = sum(node["verdict"] == "correct" for node in row["nodes"])
        own = (row["problem_id"], row["seed"], offset, size, row["stopped"], right, group_of(row))
        yield Entry(*own, row["round"])
        offset += size + 1


def group_of(row: Mapping[str, Any]) -> str:
    """What coverage is told by: the level, else where the set took the problem from, else the set, else "unknown"."""
    if row["level"] is not None:
        return str(row["level"])
    return row["extra"].get("origin") or name_of(row["source"] or "") or "unknown"


def _part_index(part: epath.Path, indexed: bool) -> list[Entry]:
    if indexed:
        path = part.parent / "index" / part.name
        try:
            rows = [json.loads(line) for line in path.read_bytes().splitlines()]
            return [Entry(**(row | {"part": part})) for row in rows]
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
            raise ValueError(f"{path}: damaged ({error}); delete it, it is made again") from error
    lines = part.read_bytes().split(b"\n")
    lines = lines if lines[-1] else lines[:-1]
    rows = (_parsed(line, part, f"line {number}") for number, line in enumerate(lines, 1))
    found = _index_rows(rows, map(len, lines))
    return [dataclasses.replace(one, part=part) for one in found]


def _parsed(line: bytes, part: epath.Path, where: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{part}, {where}: not a JSON object ({error}); the part is damaged: restore it, or delete it and the "
            "done.json of its stage where there is one, then the same command searches again what is missing"
        ) from error


def find_trees(folders: Iterable[Any]) -> list[Entry]:
    """The trees of some folders of parts, one a (problem, seed, round), in their order, whatever order they came in.

    Of several the last one counts, in the order of folders and parts: a tree of further rollouts stands in for the one
    it went on from; a failed one stands in for another failed one only. Raises ValueError naming a torn line.
    """
    found: dict[tuple[str, int, int], Entry] = {}
    for folder in map(epath.Path, folders):
        parts = folder.glob("*.jsonl") if folder.exists() else ()
        below = folder / "index"
        indexed = {path.name for path in below.glob("*.jsonl")} if below.exists() else set()
        for part in sorted(parts, key=lambda path: path.name):
            for one in _part_index(part, part.name in indexed):
                name = (*one.key, one.round)
                before = found.get(name)
                if before is None or one.stopped != FAILED or before.stopped == FAILED:
                    found[name] = one
    return [found[key] for key in sorted(found)]


# ---- reading


def read_tree(entry: Entry) -> Tree:
    """The tree of an entry. Raises ValueError where its part is not the one that was indexed."""
    return _tree(entry, _fetch(entry))


def _fetch(entry: Entry) -> bytes:
    with entry.part.open("rb") as file:
        file.seek(entry.offset)
        return file.read(entry.length)


def _tree(entry: Entry, line: bytes) -> Tree:
    tree = tree_from_json(_parsed(line, entry.part, f"at byte {entry.offset}"))
    if (tree.problem_id, tree.seed) != entry.key:
        raise ValueError(
            f"{entry.part}: not the part that its index describes; delete index/{entry.part.name}"
        )
    return tree


def iter_trees(entries: Iterable[Entry]) -> Iterator[Tree]:
    """The trees of entries, in their order; a few of them are in memory at a time."""
    waiting: collections.deque = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(AHEAD, "trees") as pool:
        for entry in entries:
            waiting.append((entry, pool.submit(_fetch, entry)))
            if len(waiting) >= AHEAD:
                first, line = waiting.popleft()
                yield _tree(first, line.result())
        for first, line in waiting:
            yield _tree(first, line.result())


def by_problem(trees: Iterable[Tree]) -> Iterator[list[Tree]]:
    """The trees of each problem, of trees in the order of `find_trees`."""
    for _, group in itertools.groupby(trees, lambda tree: tree.problem_id):
        yield list(group)


def read_trees(folders: Iterable[Any]) -> list[Tree]:
    """All trees of some folders of parts (`find_trees`), at once: for sets that fit in memory."""
    return list(iter_trees(find_trees(folders)))


def my_block(entries: Sequence[Entry]) -> list[Entry]:
    """This host's share of sorted entries: whole problems, and those of host 0 first, so that shares can be joined."""
    names = sorted({one.problem_id for one in entries})
    count, host = hosts.host_count(), hosts.host_index()
    mine = set(names[len(names) * host // count : len(names) * (host + 1) // count])
    return [one for one in entries if one.problem_id in mine]


def agreed(entries: Sequence[Entry], name: str) -> Sequence[Entry]:
    """The entries; raises ValueError on every host when one sees other trees than host 0 (a folder that lags)."""
    hosts.same_everywhere({f"trees of {name}": len(entries)})
    return entries
