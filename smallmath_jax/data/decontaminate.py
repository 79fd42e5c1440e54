"""Keeping benchmark problems out of training data: by runs of words, and by pictures. Host only."""

import hashlib
import re
from collections.abc import Iterable, Mapping

from smallmath_jax.data.images import load_image
from smallmath_jax.records import Problem

WORDS = 10  # a shared run of that many words is a shared problem


def decontaminate(
    problems: Iterable[Problem], benchmarks: Mapping[str, Iterable[Problem]], words: int = WORDS
) -> tuple[list[Problem], dict[str, int]]:
    """The problems that share nothing with a benchmark, and how many share something with each, by its name.

    Shared is a run of `words` words (lower-case runs of letters and digits), or a picture: the same pixels, however
    they are stored. A text shorter than `words` must be the same as a whole, and counts only between problems without
    pictures: "Find x." under two pictures is two problems. Competition sets hold benchmark problems: AIME 2024 is in
    NuminaMath. A problem of two benchmarks is counted with both.

    Raises ValueError for a picture that cannot be read.
    """
    marks = {name: _marks(held_out, words) for name, held_out in benchmarks.items()}
    pictures = any(isinstance(mark, str) for found in marks.values() for mark in found)
    counts = dict.fromkeys(marks, 0)
    kept = []
    for problem in problems:
        own = set(_runs(problem, words)) | (set(_pictures(problem)) if pictures else set())
        shared = [name for name, held_out in marks.items() if not own.isdisjoint(held_out)]
        for name in shared:
            counts[name] += 1
        if not shared:
            kept.append(problem)
    return kept, counts


def _marks(problems: Iterable[Problem], words: int) -> set[tuple[str, ...] | str]:
    """What gives a benchmark's problems away: runs of words as tuples, pictures as digests."""
    found: set[tuple[str, ...] | str] = set()
    for problem in problems:
        found |= _runs(problem, words) | _pictures(problem)
    return found


def _runs(problem: Problem, words: int) -> set[tuple[str, ...]]:
    text = problem.problem.replace("<image>", " ").lower()
    found = re.findall(r"[a-z0-9]+", text)
    if len(found) < words:
        return set() if problem.images or not found else {tuple(found)}
    return {tuple(found[start : start + words]) for start in range(len(found) - words + 1)}


def _pictures(problem: Problem) -> set[str]:
    """Digests of a problem's pictures as decoded: another encoding or other metadata change nothing."""
    found = set()
    for image in problem.images:
        pixels = load_image(image)
        found.add(hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest())
    return found
