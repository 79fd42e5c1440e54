"""The KV cache as a tree of token sequences: which node owns which page, which page may go.

A page holds the keys and values of one chunk: tokens at places [i * chunk, (i + 1) * chunk) of a path from the root.
A node owns the pages of the chunks that its own tokens reach into; where it starts inside a chunk, that chunk is
computed again for it, its parent's tokens included (the shape is fixed, so this costs nothing). A page is therefore a
pure function of the tokens before its end: sharing, eviction, recomputation and a restart give the same bits (law 5).
Host only: numpy and dictionaries. The arrays that pages index live in `programs`.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Collection, Iterator

import numpy as np

from smallmath_jax.records import Prompt

Page = tuple[int, int]  # (the node that owns it, the chunk's number)


@dataclasses.dataclass
class Node:
    """Tokens that follow those of `parent`. Only `children` and `value` change."""

    id: int
    parent: int | None
    start: int  # tokens before its own
    token_ids: np.ndarray  # int32 [T], its own
    positions: np.ndarray  # int32 [3, T]
    next_position: int
    prompt: Prompt | None = None  # of a root with images
    children: set[int] = dataclasses.field(default_factory=set)
    value: float | None = None  # of the value head at its last token, under the current weights

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


class Tree:
    """Nodes by id, and the pages they own. `chunk` tokens a page, `capacity` pages."""

    def __init__(self, chunk: int, capacity: int):
        self.chunk = chunk
        self.capacity = capacity
        self.nodes: dict[int, Node] = {}
        self._next_id = 0
        self._pages: OrderedDict[Page, int] = OrderedDict()  # least recently used first
        self._free = list(range(capacity))[::-1]
        self._prefilled: set[Page] = set()  # under the current weights, now or before

    def __getitem__(self, node: int) -> Node:
        if node not in self.nodes:
            raise ValueError(
                f"node {node} is not in the tree: never made, or pruned with an ancestor"
            )
        return self.nodes[node]

    @property
    def pages_in_use(self) -> int:
        return len(self._pages)

    def add(
        self,
        parent: int | None,
        token_ids: np.ndarray,
        positions: np.ndarray,
        next_position: int,
        prompt: Prompt | None = None,
    ) -> int:
        """A new node; its pages are made when something asks for them."""
        start = 0 if parent is None else self[parent].end
        node = Node(self._next_id, parent, start, token_ids, positions, next_position, prompt)
        self.nodes[node.id] = node
        if parent is not None:
            self.nodes[parent].children.add(node.id)
        self._next_id += 1
        return node.id

    def path(self, node: int) -> list[Node]:
        """The nodes from the root down to `node`."""
        found = [self[node]]
        while found[-1].parent is not None:
            found.append(self.nodes[found[-1].parent])
        return found[::-1]

    def subtree(self, node: int) -> list[int]:
        """`node` and all below it."""
        found = [self[node].id]
        for one in found:
            found.extend(self.nodes[one].children)
        return found

    def remove(self, node: int) -> list[int]:
        """Forgets `node` and all below it, frees their pages, and gives back their ids."""
        gone = self.subtree(node)
        parent = self.nodes[node].parent
        if parent is not None:
            self.nodes[parent].children.discard(node)
        for one in gone:
            for chunk in self._own_chunks(self.nodes.pop(one)):
                self._prefilled.discard((one, chunk))
                if (one, chunk) in self._pages:
                    self._free.append(self._pages.pop((one, chunk)))
        return gone

    def forget_pages(self) -> None:
        """Drops every page and value: the weights changed."""
        self._pages.clear()
        self._prefilled.clear()
        self._free = list(range(self.capacity))[::-1]
        for node in self.nodes.values():
            node.value = None

    def _own_chunks(self, node: Node) -> range:
        return range(node.start // self.chunk, -(-node.end // self.chunk))

    def path_pages(self, node: int) -> list[Page]:
        """The pages of the path to `node`, in order; each chunk belongs to the node nearest the root that fills it."""
        found: list[Page] = []
        for one in self.path(node):
            chunks = self._own_chunks(one)
            found = found[: chunks.start] + [(one.id, chunk) for chunk in chunks]
        return found

    def missing(self, pages: Collection[Page]) -> list[Page]:
        return [page for page in pages if page not in self._pages]

    def claim(self, page: Page, pinned: Collection[Page]) -> int:
        """A place for a page that is missing; the least recently used page outside `pinned` makes room."""
        if not self._free:
            victim = next(held for held in self._pages if held not in pinned)
            self._free.append(self._pages.pop(victim))
        self._pages[page] = self._free.pop()
        return self._pages[page]

    def places(self, pages: Collection[Page]) -> list[int]:
        """Where pages lie; marks them as used."""
        for page in pages:
            self._pages.move_to_end(page)
        return [self._pages[page] for page in pages]

    def count_prefill(self, page: Page) -> tuple[int, int]:
        """(tokens computed for a page, those of them never computed before). Call once for each computation."""
        node, first = self.nodes[page[0]], page[1] * self.chunk
        last = min(first + self.chunk, node.end)
        fresh = 0 if page in self._prefilled else last - max(first, node.start)
        self._prefilled.add(page)
        return last - first, fresh

    def chunk_tokens(self, page: Page) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int32 [T] and positions int32 [3, T] of a page, T <= chunk."""
        node, first = self.nodes[page[0]], page[1] * self.chunk
        last = min(first + self.chunk, node.end)
        ids, positions = [], []
        for one in self.path(node.id):
            own = slice(max(first - one.start, 0), max(last - one.start, 0))
            ids.append(one.token_ids[own])
            positions.append(one.positions[:, own])
        return np.concatenate(ids), np.concatenate(positions, axis=1)


def waves(pages: list[Page], before: dict[Page, Page | None], rows: int) -> Iterator[list[Page]]:
    """Cuts pages to compute into lists of at most `rows`, each page after all those before it on its path.

    `before` leads from each page of a path to the one in front of it. All of them count: a page that is there may
    follow one that was evicted.
    """
    left = dict.fromkeys(sorted(pages, key=lambda page: page[1]))

    def waits(page: Page) -> bool:
        while (page := before[page]) is not None:
            if page in left:
                return True
        return False

    while left:
        ready = [page for page in left if not waits(page)][:rows]
        for page in ready:
            del left[page]
        yield ready
