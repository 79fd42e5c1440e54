"""The seccomp filter: the calls a mathematical program needs, and no others.

Everything not named here fails with EPERM: sockets, processes, threads, exec, signals to anyone, mounts, namespaces,
tracing, keys, other processes' memory, shared memory, io_uring, bpf, userfaultfd. A call of another ABI (32-bit, x32)
ends the process.
"""

import ctypes
import struct

from smallmath_jax.verify.sandbox import linux

# (x86_64, aarch64); -1: not there. Files need no argument checks: mounts and Landlock say which are to be seen.
_ALLOWED = {
    "read": (0, 63), "write": (1, 64), "open": (2, -1), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "poll": (7, -1), "lseek": (8, 62), "mprotect": (10, 226), "munmap": (11, 215),
    "brk": (12, 214), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, -1),
    "select": (23, -1), "sched_yield": (24, 124), "mremap": (25, 216), "dup": (32, 23),
    "dup2": (33, -1), "pause": (34, -1), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1),
    "setitimer": (38, 103), "getpid": (39, 172), "sendmsg": (46, 211), "recvmsg": (47, 212),
    "exit": (60, 93), "wait4": (61, 260),
    "uname": (63, 160), "flock": (73, 32), "fsync": (74, 82), "fdatasync": (75, 83),
    "ftruncate": (77, 46), "getdents": (78, -1), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "readlink": (89, -1), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173),
    "getpgrp": (111, -1), "getgroups": (115, 158), "getresuid": (118, 148), "getresgid": (120, 150),
    "getpgid": (121, 155), "getsid": (124, 156), "sigaltstack": (131, 132), "gettid": (186, 178),
    "time": (201, -1), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "restart_syscall": (219, 128), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "waitid": (247, 95), "openat": (257, 56),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "set_robust_list": (273, 99), "dup3": (292, 24),
    "preadv": (295, 69), "pwritev": (296, 70), "getcpu": (309, 168),
    "getrandom": (318, 278), "statx": (332, 291), "rseq": (334, 293), "close_range": (436, 436),
    "faccessat2": (439, 439),
}  # fmt: skip
# Only where there is a scratch folder: Landlock leaves permissions and times of the user's own files open to anyone.
_WRITING = {
    "truncate": (76, 45), "rename": (82, -1), "mkdir": (83, -1), "rmdir": (84, -1), "unlink": (87, -1),
    "chmod": (90, -1), "fchmod": (91, 52), "mkdirat": (258, 34), "unlinkat": (263, 35), "renameat": (264, 38),
    "fchmodat": (268, 53), "utimensat": (280, 88), "renameat2": (316, 276),
}  # fmt: skip
_MMAP, _IOCTL, _FCNTL, _FUTEX, _PRLIMIT = (9, 222), (16, 29), (72, 25), (202, 98), (302, 261)
_PRCTL = (157, 167)  # only to ask to be killed when the parent dies
_MADVISE = (28, 233)
# Reading ahead, giving back, huge pages; no merging with pages of others.
_ADVICE = (0, 1, 2, 3, 4, 8, 14, 15)

# Terminals: only asking whether this is one; descriptors: only duplicates and close-on-exec. (F_SETOWN and
# F_SETSIG would send signals to other processes, F_ADD_SEALS would spoil a file for those who use it next.)
_IOCTLS = (0x5401, 0x5450, 0x5451)
_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
_FUTEXES = (0, 1, 9, 10)  # wait, wake, and both with a bit set: no priority inheritance, no requeue

_KILL, _ERRNO, _NOTIFY, _ALLOW = 0x80000000, 0x00050000, 0x7FC00000, 0x7FFF0000
_EPERM, _ENOSYS = 1, 38
_LOAD, _AND, _EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
NEW_LISTENER = 8


def _argument(index: int, high: bool = False) -> bytes:
    return struct.pack("<HBBI", _LOAD, 0, 0, 16 + 8 * index + 4 * high)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, value)


def _finish(action: int) -> bytes:
    return _step(_RETURN, action)


def _only_values(index: int, values: tuple[int, ...], mask: int = 0xFFFFFFFF) -> bytes:
    """Allow when the argument, masked, is one of `values`; EPERM otherwise."""
    steps = [_argument(index), _step(_AND, mask)]
    for place, value in enumerate(values):
        steps.append(_step(_EQUAL, value, len(values) - place, 0))
    return b"".join((*steps, _finish(_ERRNO | _EPERM), _finish(_ALLOW)))


def _only_null(indices: tuple[int, ...]) -> bytes:
    """Allow when all these arguments are 0, in both halves."""
    halves = [(index, high) for index in indices for high in (False, True)]
    steps = []
    for place, (index, high) in enumerate(halves):
        steps += [_argument(index, high), _step(_EQUAL, 0, 0, 2 * (len(halves) - place - 1) + 1)]
    return b"".join((*steps, _finish(_ALLOW), _finish(_ERRNO | _EPERM)))


def _when(number: int, steps: bytes) -> bytes:
    return _step(_EQUAL, number, 0, len(steps) // 8) + steps


def program(notify: bool, writing: bool) -> bytes:
    """The filter's instructions (8 bytes each).

    `notify`: a plain fork asks the listener instead of failing. `writing`: files may be made, changed and deleted,
    where mounts and Landlock allow it.
    """
    parts = [
        _step(_LOAD, 4),
        _step(_EQUAL, linux.AUDIT_ARCH, 1, 0),
        _finish(_KILL),
        _step(_LOAD, 0),
    ]
    for pair in (*_ALLOWED.values(), *(_WRITING.values() if writing else ())):
        if linux.column(pair) >= 0:
            parts.append(_when(linux.column(pair), _finish(_ALLOW)))
    # A private mapping only: a shared one would tie a prefix's siblings together.
    parts.append(_when(linux.column(_MMAP), _only_values(3, (2,), 3)))
    parts.append(_when(linux.column(_IOCTL), _only_values(1, _IOCTLS)))
    parts.append(_when(linux.column(_FCNTL), _only_values(1, _FCNTLS)))
    parts.append(_when(linux.column(_FUTEX), _only_values(1, _FUTEXES, 127)))
    parts.append(_when(linux.column(_PRLIMIT), _only_null((0, 2))))
    parts.append(_when(linux.column(_MADVISE), _only_values(2, _ADVICE)))
    kill_asked = (
        _argument(0),
        _step(_EQUAL, linux.PR_SET_PDEATHSIG, 0, 3),
        _argument(1),
        _step(_EQUAL, 9, 0, 1),
    )
    parts.append(
        _when(
            linux.column(_PRCTL),
            b"".join((*kill_asked, _finish(_ALLOW), _finish(_ERRNO | _EPERM))),
        )
    )
    parts.append(_when(linux.number("clone3"), _finish(_ERRNO | _ENOSYS)))
    if notify:
        parts.append(_when(linux.number("clone"), _finish(_NOTIFY)))
    parts.append(_finish(_ERRNO | _EPERM))
    return b"".join(parts)


def install(instructions: bytes, listener: bool = False) -> int:
    """Puts the filter on this process for good; needs no_new_privs. Returns the listener's descriptor, or 0."""
    held = ctypes.create_string_buffer(instructions, len(instructions))
    header = struct.pack("HxxxxxxQ", len(instructions) // 8, ctypes.addressof(held))
    return linux.call("seccomp", 1, NEW_LISTENER if listener else 0, header)
