"""The bookkeeping of the KV tree, without a model: which pages a path has, and which leave when room is short."""

import numpy as np
import pytest

from smallmath_jax.rollout.cache import Tree, waves


def _grow(tree, parent, length, first=0):
    ids = np.arange(first, first + length, dtype=np.int32)
    return tree.add(parent, ids, np.tile(ids, (3, 1)), first + length)


@pytest.fixture
def family():
    """A root of 10 tokens in pages of 4, a child of 3 more, its child of 5, and a sibling of 2."""
    tree = Tree(4, 6)
    root = _grow(tree, None, 10)
    child = _grow(tree, root, 3, 10)
    grandchild = _grow(tree, child, 5, 13)
    sibling = _grow(tree, root, 2, 10)
    return tree, root, child, grandchild, sibling


def test_a_page_belongs_to_the_first_node_that_fills_it(family):
    tree, root, child, grandchild, sibling = family
    assert tree.path_pages(root) == [(root, 0), (root, 1), (root, 2)]
    assert tree.path_pages(child) == [(root, 0), (root, 1), (child, 2), (child, 3)]
    assert tree.path_pages(sibling) == [(root, 0), (root, 1), (sibling, 2)]
    expected = [(root, 0), (root, 1), (child, 2), (grandchild, 3), (grandchild, 4)]
    assert tree.path_pages(grandchild) == expected
    for page in expected:
        ids, positions = tree.chunk_tokens(page)
        first = 4 * page[1]
        np.testing.assert_array_equal(ids, np.arange(first, first + len(ids)))
        np.testing.assert_array_equal(positions, np.tile(ids, (3, 1)))
    assert len(tree.chunk_tokens((grandchild, 4))[0]) == 2


def test_the_least_recently_used_page_makes_room_and_pinned_ones_stay(family):
    tree, root, _, grandchild, sibling = family
    first, second = tree.path_pages(root), tree.path_pages(grandchild)
    for page in [*first, *second[2:]]:
        tree.claim(page, ())
    assert tree.missing(second) == [] and tree.pages_in_use == 6
    tree.places(first)  # used again: the grandchild's own are older now
    place = tree.claim((sibling, 2), first)
    assert tree.missing([*first, *second]) == [second[2]]
    assert place not in tree.places([page for page in [*first, *second[3:]]])


def test_counted_once_as_fresh(family):
    tree, root, child, *_ = family
    assert tree.count_prefill((root, 2)) == (2, 2)
    assert tree.count_prefill((child, 2)) == (
        4,
        2,
    )  # the root's 8 and 9 again, 10 and 11 for the first time
    assert tree.count_prefill((child, 2)) == (4, 0)
    tree.forget_pages()
    assert tree.count_prefill((child, 2)) == (4, 2)


def test_removing_a_node_takes_all_below_it_and_its_pages(family):
    tree, root, child, grandchild, sibling = family
    for page in [*tree.path_pages(root), *tree.path_pages(child)[2:]]:
        tree.claim(page, ())
    assert sorted(tree.remove(child)) == [child, grandchild]
    assert tree.pages_in_use == 3 and sorted(tree.nodes) == [root, sibling]
    with pytest.raises(ValueError, match="pruned"):
        tree[grandchild]
    tree.remove(root)
    assert tree.pages_in_use == 0 and not tree.nodes


def test_waves_keep_the_order_of_a_path_and_the_size_of_a_call():
    paths = [[(node, chunk) for chunk in range(length)] for node, length in enumerate((3, 1, 2))]
    paths.append([(0, 0), (3, 1), (3, 2)])
    before = {}
    for path in paths:
        before.update(zip(path, [None, *path[:-1]], strict=True))
    found = list(waves(list(before), before, 3))
    assert [len(wave) for wave in found] == [3, 3, 2]
    done = set()
    for wave in found:
        assert all(before[page] is None or before[page] in done for page in wave)
        done |= set(wave)
    assert done == set(before)


def test_a_page_waits_for_one_that_was_evicted_further_up():
    path = [(0, 0), (1, 1), (2, 2), (3, 3)]
    before = dict(zip(path, [None, *path[:-1]], strict=True))
    missing = [(0, 0), (1, 1), (3, 3)]  # the one in front of the last is there
    assert list(waves(missing, before, 8)) == [[(0, 0)], [(1, 1)], [(3, 3)]]
