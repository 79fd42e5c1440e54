"""Where programs live: namespaces with an empty root, Landlock, no privileges. Entered once by each worker."""

import contextlib
import ctypes
import os
import stat
import struct
import sys
import sysconfig
from collections.abc import Mapping, Sequence

from smallmath_jax.verify.sandbox import linux

NOBODY = 65534
SCRATCH_MB = 16
_NAMESPACES = {
    "mount": linux.CLONE_NEWNS,
    "net": linux.CLONE_NEWNET,
    "ipc": linux.CLONE_NEWIPC,
    "uts": linux.CLONE_NEWUTS,
    "pid": linux.CLONE_NEWPID,
}
_SYSTEM = ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64")

# Landlock rights: files are read, folders listed; the scratch folder is written too. No devices, pipes, sockets, links.
_READ = 1 << 2 | 1 << 3
_WRITE = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 13 | 1 << 14


def library_folders(packages: Sequence[str]) -> list[str]:
    """Folders Python code is read from: the standard library's, and those the packages lie in."""
    stdlib = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    dynamic = [os.path.join(folder, "lib-dynload") for folder in stdlib]
    kept = []
    for folder in (*stdlib, *dynamic, *packages):
        real = os.path.realpath(folder)
        if os.path.isdir(real) and real not in kept:
            kept.append(real)
    return kept


def enter_namespaces() -> list[str]:
    """Leaves the host's users, network, IPC, names and (for children) process ids. Returns what was left.

    As root with the right to mount, everything but the user namespace is left first and the user id changed for
    good afterwards (`become_nobody`); as an ordinary user the user namespace gives the right to leave the others.
    Raises OSError where the machine forbids it.
    """
    flags = sum(_NAMESPACES.values())
    if os.geteuid() == 0:
        with contextlib.suppress(OSError):
            linux.call("unshare", flags)
            return list(_NAMESPACES)
    user, group = os.geteuid(), os.getegid()
    linux.call("unshare", linux.CLONE_NEWUSER | flags)
    for name, line in (
        ("setgroups", "deny"),
        ("uid_map", f"{NOBODY} {user} 1"),
        ("gid_map", f"{NOBODY} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    return ["user", *_NAMESPACES]


def enter_user_namespace() -> bool:
    """A user namespace in which nobody is anybody; False where there is none to be had."""
    try:
        linux.call("unshare", linux.CLONE_NEWUSER)
        linux.drop_capabilities()
    except OSError:
        return False
    return True


def build_root(folders: Sequence[str]) -> list[str]:
    """Replaces the root by an empty one: `folders` read-only under /python, system libraries, a fake passwd,
    /dev/null, and a scratch folder /tmp. No /proc, no /etc. Returns where each folder is now."""
    linux.mount("", "/", "", linux.MS_REC | linux.MS_PRIVATE)
    quiet = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("tmpfs", "/tmp", "tmpfs", quiet, "mode=755,size=1m")
    os.mkdir("/tmp/new")
    os.mkdir("/tmp/old")
    linux.mount("tmpfs", "/tmp/new", "tmpfs", quiet, "mode=755,size=1m")
    os.chdir("/tmp")
    linux.call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    places = []
    for index, folder in enumerate(folders):
        places.append(f"/python/{index}")
        _bind(f"/old{folder}", f"/new{places[-1]}")
    for folder in _SYSTEM:
        if os.path.islink(f"/old{folder}"):
            os.symlink(os.readlink(f"/old{folder}"), f"/new{folder}")
        elif os.path.isdir(f"/old{folder}"):
            _bind(f"/old{folder}", f"/new{folder}")
    _small_files()
    os.mkdir("/new/tmp")
    scratch = f"size={SCRATCH_MB}m,nr_inodes=1024,mode=700,uid={NOBODY},gid={NOBODY}"
    linux.mount("tmpfs", "/new/tmp", "tmpfs", quiet | linux.MS_NOEXEC, scratch)
    remount = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY
    linux.mount("", "/new", "", remount | quiet)
    os.chdir("/new")
    linux.call("pivot_root", b".", b".")
    linux.unmount(".", linux.MNT_DETACH)
    os.chdir("/tmp")
    linux.set_hostname("sandbox")
    return places


def _small_files() -> None:
    os.mkdir("/new/etc")
    with open("/new/etc/passwd", "w") as file:
        file.write(f"nobody:x:{NOBODY}:{NOBODY}:nobody:/tmp:/bin/false\n")
    os.mkdir("/new/dev")
    os.close(os.open("/new/dev/null", os.O_CREAT | os.O_WRONLY, 0o644))
    linux.mount("/old/dev/null", "/new/dev/null", "", linux.MS_BIND)
    # A device is written to all the same; its permissions and times are the host's.
    _make_read_only("/new/dev/null")


def _bind(source: str, target: str) -> None:
    """A read-only window on a folder, and on what is mounted below it."""
    os.makedirs(target, exist_ok=True)
    linux.mount(source, target, "", linux.MS_BIND | linux.MS_REC)
    attributes = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # read-only, no set-user-id, no devices
    at_recursive = 0x8000
    try:
        linux.call("mount_setattr", -100, target.encode() + b"\0", at_recursive, attributes, 32)
    except OSError:  # before Linux 5.12: the top of it only
        _make_read_only(target)


def _make_read_only(target: str) -> None:
    """Changes one mount, keeping the flags that are locked."""
    flags = os.statvfs(target).f_flag & (linux.MS_NOEXEC | linux.MS_NODEV | linux.MS_NOSUID)
    remount = linux.MS_REMOUNT | linux.MS_BIND | linux.MS_RDONLY
    linux.mount("", target, "", remount | flags)


def move_imports(folders: Sequence[str], places: Sequence[str]) -> None:
    """Points Python at the folders' new places: what is imported later, submodules of loaded packages included."""
    moved = dict(zip(folders, places, strict=True))

    def place(path: str) -> str:
        for old in sorted(moved, key=len, reverse=True):
            if path == old or path.startswith(old + "/"):
                return moved[old] + path[len(old) :]
        return path

    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [place(os.path.realpath(path)) for path in module.__path__]
    sys.path_importer_cache.clear()


def become_nobody(readable: Mapping[str, str], modules: Sequence[str], must: bool) -> str:
    """Gives up user id, groups and capabilities. Says what was done.

    `readable`: folders that must stay readable, and what they are called outside. Raises OSError where root `must`
    become another user and cannot.
    """
    done = "no capabilities"
    if os.geteuid() == 0:
        shut = [name for place, name in readable.items() if not _open_to_all(place, modules)]
        if must and shut:
            raise OSError(
                f"programs run as user {NOBODY}, who may not read all of {shut[0]}: chmod -R go+rX {shut[0]}"
            )
        try:
            if not shut:
                os.setgroups([])
                os.setresgid(NOBODY, NOBODY, NOBODY)
                os.setresuid(NOBODY, NOBODY, NOBODY)
                done = f"uid {NOBODY}, no capabilities"
        except OSError:
            if must:
                raise
    linux.drop_capabilities()
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    return done


def _open_to_all(folder: str, modules: Sequence[str]) -> bool:
    """Whether anybody may read a folder and the modules in it: umask 077 at their installation forbids it."""
    parts = folder.split("/")
    above = ["/".join(parts[:end]) for end in range(2, len(parts))]
    inside = [os.path.join(folder, name.partition(".")[0]) for name in modules]
    inside += [os.path.join(place, "__init__.py") for place in inside]
    readable = [folder, *filter(os.path.exists, inside)]
    modes = [os.stat(place).st_mode for place in readable]
    return all(os.stat(place).st_mode & 0o001 for place in above) and all(
        mode & 0o004 and (mode & 0o001 or not stat.S_ISDIR(mode)) for mode in modes
    )


def landlock_version() -> int:
    """The kernel's Landlock ABI, 0 for none."""
    try:
        return linux.call("landlock_create_ruleset", 0, 0, 1)
    except OSError:
        return 0


def restrict_files(readable: Sequence[str], scratch: str) -> int:
    """Landlock for good: reads below `readable`, writes below `scratch`, no TCP. Returns the ABI; 0: not there."""
    version = landlock_version()
    if version == 0:
        return 0
    known = (1 << (13 + (version >= 2) + (version >= 3))) - 1 | (1 << 15) * (version >= 5)
    rules = _ruleset(known, 3 if version >= 4 else 0, 0, version)
    for path in (
        *readable,
        *_SYSTEM,
        scratch,
        "/dev/null",
        "/etc/passwd" if scratch == "/tmp" else "",
    ):
        if path and os.path.exists(path):
            rights = _READ | (_WRITE if path in (scratch, "/dev/null") else 0)
            if not os.path.isdir(path):
                rights &= 1 << 1 | 1 << 2 | 1 << 14
            _add_rule(rules, path, rights & known)
    linux.call("landlock_restrict_self", rules, 0)
    os.close(rules)
    return version


def restrict_signals() -> bool:
    """Landlock, once more: no signals and no abstract sockets to anyone who did not call this. False: not there."""
    version = landlock_version()
    if version < 6:
        return False
    rules = _ruleset(0, 0, 3, version)
    linux.call("landlock_restrict_self", rules, 0)
    os.close(rules)
    return True


def _ruleset(files: int, net: int, scoped: int, version: int) -> int:
    attributes = struct.pack("QQQ", files, net, scoped)
    size = 8 if version < 4 else 16 if version < 6 else 24
    return linux.call("landlock_create_ruleset", attributes, size, 0)


def _add_rule(rules: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, folder))
    linux.call("landlock_add_rule", rules, 1, rule, 0)
    os.close(folder)
