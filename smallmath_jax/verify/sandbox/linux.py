"""The few Linux calls Python has no words for, by number. Numbers are (x86_64, aarch64); -1 where an ABI lacks one."""

import ctypes
import os
import platform
import struct

_COLUMN = {"x86_64": 0, "aarch64": 1}.get(platform.machine(), -1)
AUDIT_ARCH = (0xC000003E, 0xC00000B7)[_COLUMN] if _COLUMN >= 0 else 0

NUMBERS = {
    "clone": (56, 220),
    "clone3": (435, 435),
    "close_range": (436, 436),
    "unshare": (272, 97),
    "pivot_root": (155, 41),
    "mount_setattr": (442, 442),
    "seccomp": (317, 277),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
    "pidfd_getfd": (438, 438),
    "capset": (126, 91),
}

CLONE_PARENT = 0x00008000
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000
FORK = CLONE_PARENT | 17  # SIGCHLD: a fork whose child belongs to the caller's own parent

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT = 38, 47

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
# PyDLL keeps the interpreter lock across the call: a forked child must come back holding it.
_held = ctypes.PyDLL(None)
_held.syscall.restype = ctypes.c_long


def number(name: str) -> int:
    """A call's number on this machine. Raises OSError where the architecture is unknown."""
    if _COLUMN < 0:
        raise OSError(f"{platform.machine()} is not an architecture the sandbox knows")
    return NUMBERS[name][_COLUMN]


def column(pair: tuple[int, int]) -> int:
    """This machine's entry of a (x86_64, aarch64) pair; -1 for an unknown architecture."""
    return pair[_COLUMN] if _COLUMN >= 0 else -1


def _checked(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def call(name: str, *arguments: int | bytes | ctypes.Array) -> int:
    """A system call by name. Raises OSError naming it."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number(name)), *wide), name)


def prctl(option: int, *arguments: int) -> int:
    wide = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return _checked(_libc.prctl(ctypes.c_int(option), *wide), f"prctl {option}")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _checked(
        _libc.mount(
            source.encode(),
            target.encode(),
            kind.encode() or None,
            ctypes.c_ulong(flags),
            data.encode() or None,
        ),
        f"mount {source or kind} on {target}",
    )


def unmount(target: str, flags: int) -> None:
    _checked(_libc.umount2(target.encode(), flags), f"umount {target}")


def set_hostname(name: str) -> None:
    _checked(_libc.sethostname(name.encode(), ctypes.c_size_t(len(name))), "sethostname")


def fork_aside() -> int:
    """Forks a child of the caller's parent: that one may wait for it, and none of Python's or libc's fork hooks run.

    Returns 0 in the child, its process id in the caller, and a negative number when refused. Only for
    single-threaded processes. (Without the hooks `random` is not reseeded: every fork is alike.)
    """
    return _held.syscall(ctypes.c_long(_CLONE), ctypes.c_long(FORK), *_ZEROS)


_CLONE = NUMBERS["clone"][max(_COLUMN, 0)]
_ZEROS = tuple(ctypes.c_long(0) for _ in range(4))
_CLOSE_RANGE = NUMBERS["close_range"][max(_COLUMN, 0)]


def close_from(first: int, last: int = 0xFFFFFFFF) -> None:
    """Closes every descriptor in [first, last]."""
    if _libc.syscall(ctypes.c_long(_CLOSE_RANGE), ctypes.c_uint(first), ctypes.c_uint(last), 0) < 0:
        os.closerange(first, min(last + 1, 65536))  # before Linux 5.9


def drop_capabilities() -> None:
    """No capability in any set, none to be had again by exec. Raises OSError when refused."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break  # past the last one, or not ours to drop: no_new_privs covers that
    _libc.prctl(PR_CAP_AMBIENT, ctypes.c_ulong(4), 0, 0, 0)  # clear all
    header = struct.pack("<Ii", 0x20080522, 0)
    call("capset", header, bytes(24))
