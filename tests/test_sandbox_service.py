"""The sandbox's processes: tiers, users, what ends with what, what is started again."""

import asyncio
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from sandbox_case import run, run_all, small

from smallmath_jax.verify.sandbox import SandboxError, client, jail, start_sandbox

ROOT = pathlib.Path(__file__).resolve().parents[1]
QUICK = small(modules=())


def processes(parent: int) -> list[int]:
    """A process's descendants, breadth first."""
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = pathlib.Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(entry)] = int(fields[1])
    found = [parent]
    for process in found:
        found += [child for child, above in parents.items() if above == process]
    return found[1:]


def gone(numbers: list[int], seconds: float = 30.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(os.path.exists(f"/proc/{number}") for number in numbers):
            return True
        time.sleep(0.05)
    return False


def test_the_strongest_tier_is_taken_and_told():
    with start_sandbox(small()) as sandbox:
        assert sandbox.tier == "T3" or sandbox.weaker
        assert "seccomp" in sandbox.isolation and "limits" in sandbox.isolation
        assert {"sympy", "numpy"} <= set(sandbox.modules)
        if sandbox.tier == "T3":
            assert all(
                name in sandbox.isolation for name in ("mount", "net", "ipc", "uts", "pid", "user")
            )


def test_programs_never_run_as_root_with_its_rights():
    code = "import os\nprint(os.getuid(), os.geteuid(), os.getgroups() in ([], [65534]))"
    with start_sandbox(QUICK) as sandbox:
        result = run(sandbox, code)
        if sandbox.tier == "T3":
            assert result.stdout == "65534 65534 True\n"


@pytest.mark.parametrize("shut", ["", "shut_package", "shut_package/__init__.py"])
def test_libraries_only_root_may_read_are_named(shut, tmp_path, monkeypatch):
    """As after an installation with umask 077: programs do not run as root in T3 for that. Who is not root stays
    themselves, and may read it."""
    package = tmp_path / "inside/shut_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(package.parent)
    settings = small(modules=("shut_package",))
    with start_sandbox(settings) as sandbox:
        assert sandbox.modules == ("shut_package",)
        before = sandbox.tier
    place = package.parent / shut
    os.chmod(place, 0o700 if place.is_dir() else 0o600)
    with start_sandbox(settings) as sandbox:
        if os.geteuid() == 0 and before == "T3":
            assert sandbox.tier == "T2"
            assert f"chmod -R go+rX {package.parent}" in sandbox.weaker[0]
        else:
            assert sandbox.tier == before
        assert run(sandbox, "import shut_package; print(2)").stdout == "2\n"


def test_without_isolation_nothing_runs_unless_that_is_asked_for():
    with pytest.raises(SandboxError, match="allow_unsafe"), start_sandbox(small(tier="T1")):
        pass
    with pytest.raises(SandboxError, match="no tier 'T9'"), start_sandbox(small(tier="T9")):
        pass
    with start_sandbox(small(tier="T1", allow_unsafe=True, modules=())) as sandbox:
        assert (sandbox.tier, sandbox.isolation) == ("T1", "limits")
        assert run(sandbox, "while True: pass").status == "timeout_cpu"
        results = run_all(sandbox, "x += 1; print(x)", "x += 2; print(x)", prefix="x = 1")
        assert [result.stdout for result in results] == ["2\n", "3\n"]


def test_a_machine_without_namespaces_falls_to_the_next_tier(monkeypatch):
    """A wrapper above the sandbox forbids `unshare`, as containers do."""
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        from smallmath_jax.verify.sandbox import filters, linux, start_sandbox
        from sandbox_case import run, small
        linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
        number = linux.number("unshare")
        filters.install(
            filters._step(0x20, 0) + filters._when(number, filters._finish(0x50001)) + filters._finish(0x7FFF0000)
        )
        with start_sandbox(small(modules=())) as sandbox:
            assert "unshare" in sandbox.weaker[0], sandbox.weaker
            print(sandbox.tier, run(sandbox, "print(1)").stdout, end="")
    """
    assert (
        subprocess.check_output([sys.executable, "-c", textwrap.dedent(code)], text=True)
        == "T2 1\n"
    )


def test_it_works_as_an_ordinary_user():
    """When the suite runs as root, all of it is started by user 65534."""
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import os
        from smallmath_jax.verify.sandbox import start_sandbox
        from sandbox_case import become_nobody, run, run_all, small
        if os.getuid() == 0:
            become_nobody()
        with start_sandbox(small()) as sandbox:
            print(sandbox.tier, os.getuid(), file=sys.stderr)
            results = run_all(sandbox, "print(x + 1)", "print(x + 2)", "import os; os.fork()", prefix="x = 1")
            print([r.stdout for r in results[:2]], results[2].status, run(sandbox, "while 1: pass").status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], text=True, capture_output=True
    )
    assert done.stdout == "['2\\n', '3\\n'] error timeout_cpu\n", done.stderr
    if os.getuid() == 0:
        assert " 65534" in done.stderr


def test_nothing_of_the_client_reaches_it():
    """Not its memory, not its environment, not its descriptors; and no JAX."""
    os.environ["GOLD_ANSWER"] = "gold-42"
    read, write = os.pipe()
    os.set_inheritable(write, True)
    with start_sandbox(small(modules=())) as sandbox:
        for process in processes(sandbox._process.pid) + [sandbox._process.pid]:
            environment = pathlib.Path(f"/proc/{process}/environ").read_bytes()
            assert b"gold" not in environment
            links = [os.readlink(entry) for entry in pathlib.Path(f"/proc/{process}/fd").iterdir()]
            assert os.readlink(f"/proc/self/fd/{write}") not in links
            assert "jax" not in pathlib.Path(f"/proc/{process}/maps").read_text().replace(
                "smallmath_jax", ""
            )
    os.close(read)
    os.close(write)
    del os.environ["GOLD_ANSWER"]


@pytest.mark.parametrize("tier", ["", "T2"])
def test_all_processes_end_with_the_client(tier):
    code = f"""
        import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
        import os, time
        from smallmath_jax.verify.sandbox import start_sandbox
        from sandbox_case import small
        with start_sandbox(small(tier={tier!r}, modules=(), workers=2)) as sandbox:
            for n in range(4):
                sandbox.submit("x = 1", f"import time; time.sleep(1000)  # {{n}}")
            sandbox.poll(0.5)
            print("ready", flush=True)
            time.sleep(1000)
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    family = processes(child.pid)
    assert len(family) >= 7
    child.kill()
    child.wait()
    child.stdout.close()
    assert gone(family)


def test_a_dead_supervisor_is_replaced_and_its_programs_run_again():
    with start_sandbox(QUICK) as sandbox:
        family = processes(sandbox._process.pid)
        tickets = [
            sandbox.submit("x = 1", f"import time; time.sleep(0.2); print(x + {n})")
            for n in range(4)
        ]
        sandbox.poll(0.1)
        sandbox._process.kill()
        found = {}
        while len(found) < 4:
            found.update(sandbox.poll(60))
        assert sorted(result.stdout for result in found.values()) == ["1\n", "2\n", "3\n", "4\n"]
        assert set(found) == set(tickets) and sandbox.counters()["restarts"] == 1
        assert gone(family)


def test_a_supervisor_that_keeps_dying_is_given_up(monkeypatch):
    monkeypatch.setattr(client, "RESTARTS", 0)
    with start_sandbox(QUICK) as sandbox:
        sandbox.submit("", "import time; time.sleep(30)")
        sandbox._process.kill()
        with pytest.raises(SandboxError, match="died"):
            sandbox.poll(60)
        with pytest.raises(SandboxError, match="closed"):
            run(sandbox, "print(1)")


@pytest.mark.parametrize("error", [OSError("no more processes"), SandboxError("no tier")])
def test_a_supervisor_that_cannot_be_replaced_is_told_to_all_who_wait(error, monkeypatch):
    def fail(self):
        raise error

    async def wait(sandbox):
        waiting = [asyncio.create_task(sandbox.run("", f"input({n})")) for n in range(2)]
        nap = asyncio.create_task(sandbox.run("", "import time; time.sleep(60)"))
        await asyncio.sleep(0.5)
        monkeypatch.setattr(client.Sandbox, "_start", fail)
        sandbox._process.kill()
        return await asyncio.wait_for(asyncio.gather(*waiting, nap, return_exceptions=True), 20)

    with start_sandbox(QUICK) as sandbox:
        results = asyncio.run(wait(sandbox))
        assert isinstance(results[-1], SandboxError) and str(error) in str(results[-1])
        with pytest.raises(SandboxError, match="closed"):
            run(sandbox, "print(1)")


def test_a_dead_worker_is_replaced_and_loses_nothing():
    with start_sandbox(QUICK) as sandbox:
        tickets = [
            sandbox.submit("", f"import time; time.sleep(0.3); print({n})") for n in range(3)
        ]
        sandbox.poll(0.1)
        worker = processes(sandbox._process.pid)[0]
        os.kill(worker, signal.SIGKILL)
        found = {}
        while len(found) < 3:
            found.update(sandbox.poll(60))
        assert [found[ticket].stdout for ticket in tickets] == ["0\n", "1\n", "2\n"]
        assert worker not in processes(sandbox._process.pid)


def test_long_programs_wait_while_long_results_are_on_their_way():
    """Nobody waits for a worker to read that itself waits to be read."""
    slow = "import time; time.sleep(0.5); print('x' * 1_000_000)"
    long = "print(2)\n#" + "y" * 900_000
    with start_sandbox(small(modules=(), output_bytes=2 << 20)) as sandbox:
        tickets = [sandbox.submit("", code) for code in (slow, long)]
        found, until = {}, time.monotonic() + 30
        while len(found) < 2 and time.monotonic() < until:
            found.update(sandbox.poll(1.0))
        assert set(found) == set(tickets), "programs never ran"
        printed = [found[ticket].stdout for ticket in tickets]
    assert printed == ["x" * 1_000_000 + "\n", "2\n"]


def test_workers_are_replaced_after_so_many_programs():
    with start_sandbox(small(modules=(), recycle_runs=3)) as sandbox:
        before = processes(sandbox._process.pid)
        results = run_all(sandbox, *(f"print({n})" for n in range(8)))
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(8)]
        assert gone(before)


def test_closing_ends_every_process():
    with start_sandbox(QUICK) as sandbox:
        family = [sandbox._process.pid, *processes(sandbox._process.pid)]
        sandbox.submit("", "import time; time.sleep(1000)")
        sandbox.poll(0.2)
    assert gone(family)


def test_a_folder_is_emptied_whatever_lies_in_it(tmp_path):
    from smallmath_jax.verify.sandbox import watch

    here = os.getcwd()
    os.chdir(tmp_path)
    for _ in range(300):
        os.mkdir("deep")
        pathlib.Path("file").write_text("x")
        os.chdir("deep")
    os.chdir(here)
    (tmp_path / "shut").mkdir(mode=0)
    (tmp_path / "moved-3").mkdir()
    assert watch.empty_folder(str(tmp_path)) and not os.listdir(tmp_path)


def test_folders_named_as_if_moved_are_emptied(tmp_path):
    """And without a rename: the first Landlock refuses to move anything from one folder to another."""
    from smallmath_jax.verify.sandbox import watch

    for n in range(30):
        (tmp_path / f"moved-{n}" / "y").mkdir(parents=True)
        (tmp_path / f"moved-{n}" / "y" / "z").write_text("z")
    (tmp_path / "a" / "x").mkdir(parents=True)
    here = os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(os, "rename")
        assert watch.empty_folder(str(tmp_path))
    assert not os.listdir(tmp_path) and os.getcwd() == here


def test_no_program_runs_in_a_folder_that_was_not_emptied(monkeypatch):
    """Those already handed to the worker run in its successor."""
    from smallmath_jax.verify.sandbox import protocol, watch, worker

    mine, its = socket.socketpair()
    forker = watch.Forker(0, its, 0, 0, 0, 0, 0)
    stub = worker.Worker(protocol.SandboxSettings(), forker, None, None, {}, {}, "/tmp")
    ran = []
    outcome = worker.Outcome("ok", b"", b"", 0.0, 0.0, 0.0)
    monkeypatch.setattr(worker, "run_job", lambda *job: ran.append(job) or outcome)
    monkeypatch.setattr(worker.watch, "empty_folder", lambda folder: False)
    monkeypatch.setattr(os, "_exit", lambda status: (_ for _ in ()).throw(SystemExit(status)))
    for number in range(3):
        mine.sendall(protocol.pack_job(number, 0, b"", b"pass"))
    with mine, its, pytest.raises(SystemExit):
        worker._serve(stub, its)
    assert len(ran) == 1


def test_packages_are_found_without_importing_them():
    assert "mpmath" in os.listdir(client._package_folders(("mpmath", "no_such_module"))[0])
    assert jail.landlock_version() >= 0
