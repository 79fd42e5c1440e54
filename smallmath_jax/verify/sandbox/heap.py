"""Lays out the memory of a warm interpreter so that a fork of it copies few pages. Nothing here changes a result.

A fork writes a reference count to nearly every object it looks at, and each page written to is copied. So what
programs use is brought together, and what they allocate goes to pages of its own.
"""

import ctypes
import gc
import sys
import types
from collections.abc import Callable

_HUGE = 1 << 21
_COLLAPSE = 25  # madvise
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # mallopt
_LARGEST = 1 << 25  # the highest threshold every glibc takes
_MOST = 1 << 24  # bytes of holes to be filled; some hundred thousand is usual
_ENOUGH = 20  # blocks one behind the other: from here on memory is new


def calls_of(action: Callable[[], None]) -> set[types.CodeType]:
    """The Python code that runs in `action`."""
    seen: set[types.CodeType] = set()
    own = sys.getprofile()
    sys.setprofile(lambda frame, event, _: seen.add(frame.f_code) if event == "call" else None)
    try:
        action()
    finally:
        sys.setprofile(own)
    return seen


def pack_code(hot: set[types.CodeType]) -> int:
    """Gives the functions that run `hot` code equal copies of it, made one after the other. Returns how many.

    A call writes to its code's reference count and inline caches: 1,900 hot pieces of code among 20,000 are scattered
    over some 300 pages.
    """
    wanted = {id(code) for code in hot}
    copies: dict[int, types.CodeType] = {}

    def copy(code: types.CodeType) -> types.CodeType:
        if id(code) not in copies:
            inner = tuple(
                copy(constant)
                if isinstance(constant, types.CodeType) and id(constant) in wanted
                else constant
                for constant in code.co_consts
            )
            copies[id(code)] = code.replace(co_consts=inner)
        return copies[id(code)]

    functions = [thing for thing in gc.get_objects() if type(thing) is types.FunctionType]
    for function in functions:
        if id(function.__code__) in wanted:
            function.__code__ = copy(function.__code__)
    return len(copies)


def fill_holes() -> list[object]:
    """Objects that fill what is free in pages already in use: what a fork allocates starts on pages of its own, in
    order. They are to be kept alive."""
    kept: list[object] = []
    most = _MOST
    for size in range(16, 513, 16):
        make, before, together = _maker(size), 0, 0
        while most > 0:
            most -= size
            kept.append(make())
            together = together + 1 if id(kept[-1]) == before + size else 0
            before = id(kept[-1])
            if together == _ENOUGH:
                break
    libc = ctypes.CDLL(None)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    edge = id(bytes(1 << 20))  # past this, memory is new: larger blocks come from malloc
    if edge > (libc.sbrk(0) or 0):
        return kept  # malloc has mapped it far from all others, in spite of `gather`
    for size in (1 << 15, 1 << 14, 1 << 13, 1 << 12, 2048, 1536, 1024, 768, *range(736, 512, -32)):
        while most > 0:
            most -= size
            kept.append(bytes(size))
            if id(kept[-1]) > edge:
                break
    return kept


def _maker(size: int) -> Callable[[], object]:
    """Makes new objects that take a block of `size` bytes."""
    if size == 16:
        return object
    if size == 32:
        return lambda: float("0.5")
    return lambda: bytes(bytearray(size - 33))


def immortalise() -> int:
    """From Python 3.12 on: nothing that is there now is counted any more, so looking at it writes nothing. Returns how
    many objects. (`None` shows how this version writes "immortal"; before 3.12 there is no such thing.)"""
    if sys.version_info < (3, 12) or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return 0
    mark = ctypes.c_uint32.from_address(id(None)).value
    things = gc.get_objects()
    seen = {id(thing) for thing in things}
    while things:
        for other in gc.get_referents(things.pop()):
            if id(other) not in seen:
                seen.add(id(other))
                things.append(other)
    for address in seen:
        ctypes.c_uint32.from_address(address).value = mark
    return len(seen)


class _Arenas(ctypes.Structure):
    _fields_ = [("first", ctypes.c_void_p), ("take", ctypes.c_void_p), ("give", ctypes.c_void_p)]


_usual = _Arenas()


def gather() -> None:
    """Until `scatter`, all memory comes from one growing piece, and not from pieces between the mapped libraries, which
    huge pages could not cover. (Python asks `aligned_alloc(16, size)` for arenas, and gives none back: `labs`.)"""
    libc, python = ctypes.CDLL(None), ctypes.pythonapi
    libc.mallopt(_MMAP_THRESHOLD, _LARGEST)
    python.PyObject_GetArenaAllocator(ctypes.byref(_usual))
    address = lambda function: ctypes.cast(function, ctypes.c_void_p)
    arenas = _Arenas(16, address(libc.aligned_alloc), address(libc.labs))
    python.PyObject_SetArenaAllocator(ctypes.byref(arenas))


def scatter() -> None:
    """Large blocks are mapped by themselves again, as is usual: what a program frees is free. (Should an arena of the
    one piece ever be given back, `munmap` refuses it: it starts amid a page.)"""
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, 1 << 20)
    libc.mallopt(_TRIM_THRESHOLD, 1 << 21)
    ctypes.pythonapi.PyObject_SetArenaAllocator(ctypes.byref(_usual))


def collapse() -> int:
    """Puts the heap on huge pages where the kernel can (6.1 on): a fork then copies a few hundred page table entries
    instead of fifteen thousand. Returns how many. Blocks are found by where objects lie: there is no /proc."""
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    blocks = {id(thing) // _HUGE for thing in gc.get_objects()}
    return sum(libc.madvise(block * _HUGE, _HUGE, _COLLAPSE) == 0 for block in blocks)
