"""Pages on the device: makes the ones a path lacks, many paths in one call, and copies them into slots."""

import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax import monitoring
from jax.sharding import PartitionSpec

from smallmath_jax.data.images import ImageSettings, token_index, vision_row
from smallmath_jax.models.qwen_vl import QwenVL
from smallmath_jax.models.text import Cache
from smallmath_jax.rollout import programs
from smallmath_jax.rollout.cache import Node, Page, Tree, waves

_FILL = 32  # pages copied to slots in one call
COMPILED = "/jax/core/compile/backend_compile_duration"  # jax's event, once a program it compiles
_compilations = [0]


def _count_compilation(event: str, _seconds: float, **_: Any) -> None:
    if event == COMPILED:
        _compilations[0] += 1


monitoring.register_event_duration_secs_listener(_count_compilation)


class Programs:
    """Calls compiled programs of one shape, and counts what jax compiles for them."""

    def __init__(self) -> None:
        self.compilations = 0
        self.recompilations = 0  # of a program that had run before
        self._warm: set[str] = set()

    def run(self, program: Callable, *arguments: Any) -> Any:
        before = _compilations[0]
        result = program(*arguments)
        compiled = _compilations[0] - before
        self.compilations += compiled
        self.recompilations += compiled if program.__name__ in self._warm else 0
        self._warm.add(program.__name__)
        return result


class Pool:
    """The tree's pages as arrays. `images` and `max_patches` cut a root's images as `data.images.vision_row` does."""

    def __init__(
        self,
        shape: programs.Shape,
        run: Callable,
        pad_id: int,
        images: ImageSettings | None,
        max_patches: int,
    ):
        self.tree = Tree(shape.chunk, shape.pages)
        self.prefilled_tokens = 0  # computed, padding left out
        self.unique_tokens = 0  # of them, tokens no page held before under these weights
        self.prefill_calls = 0
        self.seconds = 0.0
        self._shape, self._run, self._pad_id = shape, run, pad_id
        self._images, self._max_patches = images, max_patches
        self._seen: dict[int, np.ndarray] = {}  # root -> vision tokens [P / 4, D] of its images
        self._weights: programs.Packed | None = None
        self._arrays: Cache | None = None
        self.has_values = False  # the model has a value head
        width = shape.config.text.hidden_size
        everywhere = shape.mesh and jax.sharding.NamedSharding(shape.mesh, PartitionSpec())
        self._nothing_seen = jax.device_put(  # stays on the device: most calls have no image
            np.zeros((shape.prefill_rows, shape.chunk, width), shape.dtype), everywhere
        )

    def reset(self, weights: programs.Packed | None, arrays: Cache | None) -> None:
        """Starts anew with these weights and empty pages (None: gives the old ones back first)."""
        self._weights, self._arrays = weights, arrays
        self.has_values = weights is not None and weights.unpack().model.value_head is not None
        self._seen.clear()
        self.tree.forget_pages()

    def remove(self, node: int) -> set[int]:
        """Forgets a node and all below it; the ids that went."""
        gone = set(self.tree.remove(node))
        for one in gone:
            self._seen.pop(one, None)
        return gone

    def ensure(self, wanted: Iterable[int], spare: Iterable[int] = ()) -> list[int]:
        """Makes the pages of the paths to `wanted` nodes and returns those of them that are there, the first at least.

        The pool may be too small for all at once; then the rest must wait. Rows of a call that `wanted` leaves empty
        compute `spare` nodes.
        """
        pinned: dict[Page, None] = {}
        before: dict[Page, Page | None] = {}
        ready = []

        def add(node: int) -> bool:
            path = self.tree.path_pages(node)
            fresh = [page for page in path if page not in pinned]
            if len(pinned) + len(fresh) > self._shape.pages:
                return False
            pinned.update(dict.fromkeys(path))
            before.update(zip(path, [None, *path[:-1]], strict=True))
            return True

        for node in dict.fromkeys(wanted):
            if not add(node):
                break
            ready.append(node)
        rows, missing = self._shape.prefill_rows, len(self.tree.missing(pinned))
        for node, _ in itertools.groupby(spare):  # thousands may wait: no more of them than needed
            if missing % rows == 0:
                break
            if self.tree.missing(self.tree.path_pages(node)):
                if not add(node):
                    break
                missing = len(self.tree.missing(pinned))
        started = time.perf_counter()
        for pages in waves(self.tree.missing(pinned), before, rows):
            self._prefill(pages, pinned)
        self.seconds += time.perf_counter() - started
        return ready

    def fill(self, slots: Cache, taken: Sequence[tuple[int, int]]) -> Cache:
        """The slot cache with the pages of each (slot, node)'s path copied in; they must be there."""
        triples = [
            (slot, chunk, page)
            for slot, node in taken
            for chunk, page in enumerate(self.tree.places(self.tree.path_pages(node)))
        ]
        for first in range(0, len(triples), _FILL):
            part = np.full((_FILL, 3), (self._shape.slots, 0, 0), np.int32)
            some = triples[first : first + _FILL]
            part[: len(some)] = some
            slots = self._run(programs.fill_slots, self._shape, slots, self._arrays, *part.T)
        return slots

    def _prefill(self, pages: list[Page], pinned: Iterable[Page]) -> None:
        """Computes up to prefill_rows pages whose predecessors are there."""
        shape = self._shape
        rows, chunk = shape.prefill_rows, shape.chunk
        chunks = programs.Chunks(
            tokens=np.full((rows, chunk), self._pad_id, np.int32),
            positions=np.zeros((rows, 3, chunk), np.int32),
            start=np.zeros(rows, np.int32),
            before=np.zeros((rows, shape.row_pages), np.int32),
            target=np.full(rows, shape.pages, np.int32),
            last=np.zeros(rows, np.int32),
            seen=self._nothing_seen,
            is_seen=np.zeros((rows, chunk), bool),
        )
        places = [self.tree.claim(page, pinned) for page in pages]
        for row, (page, place) in enumerate(zip(pages, places, strict=True)):
            owner, number = page
            ids, positions = self.tree.chunk_tokens(page)
            chunks.tokens[row, : len(ids)] = ids
            chunks.positions[row, :, : len(ids)] = positions
            chunks.start[row] = number * chunk
            earlier = self.tree.places(self.tree.path_pages(owner)[:number])
            chunks.before[row, :number] = earlier
            chunks.target[row] = place
            chunks.last[row] = min(self.tree[owner].end - number * chunk, chunk) - 1
            chunks = self._with_images(chunks, row, page)
            computed, fresh = self.tree.count_prefill(page)
            self.prefilled_tokens += computed
            self.unique_tokens += fresh
        self.prefill_calls += 1
        self._arrays, values = self._run(
            programs.prefill, shape, self._weights, self._arrays, chunks
        )
        if self.has_values:
            self._keep_values(pages, np.asarray(values))

    def _keep_values(self, pages: list[Page], values: np.ndarray) -> None:
        for (owner, number), value in zip(pages, values[: len(pages)], strict=True):
            node = self.tree[owner]
            if (node.end - 1) // self._shape.chunk == number:
                node.value = float(value)

    def _with_images(self, chunks: programs.Chunks, row: int, page: Page) -> programs.Chunks:
        """`chunks` with the vision tokens of a page's columns in `row`."""
        root = self.tree.path(page[0])[0]
        if root.prompt is None:
            return chunks
        first = page[1] * self._shape.chunk
        index = self._token_index(root)[first : first + self._shape.chunk]
        columns = np.flatnonzero(index >= 0)
        if not len(columns):
            return chunks
        if chunks.seen is self._nothing_seen:
            chunks = chunks._replace(seen=np.zeros(self._nothing_seen.shape, self._shape.dtype))
        chunks.seen[row, columns] = self._look(root)[index[columns]]
        chunks.is_seen[row, columns] = True
        return chunks

    def _token_index(self, root: Node) -> np.ndarray:
        config = self._shape.config
        return token_index(root.token_ids, config.image_token_id, config.video_token_id)

    def _look(self, root: Node) -> np.ndarray:
        """Vision tokens of a root's images, computed once under the current weights."""
        if root.id not in self._seen:
            prompt = root.prompt
            row = vision_row(prompt.pixels, prompt.grids, self._max_patches, self._images)
            tokens = self._run(programs.see, self._shape, self._weights, row)
            count = int((self._token_index(root) >= 0).sum())
            self._seen[root.id] = np.asarray(tokens)[:count]
        return self._seen[root.id]


def mesh_of(params: QwenVL) -> jax.sharding.Mesh | None:
    """The mesh these weights lie on; None: a single device."""
    sharding = jax.tree.leaves(params)[0].sharding
    return sharding.mesh if isinstance(sharding, jax.sharding.NamedSharding) else None
