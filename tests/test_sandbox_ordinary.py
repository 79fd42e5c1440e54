"""The attacks once more as an ordinary user, where the suite runs as root: privileges are given up, not never had.

Where the suite is an ordinary user's, the attacks themselves have run as one.
"""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ATTACKS = ("test_sandbox_attacks.py", "test_sandbox_attacks_more.py")

AS_NOBODY = f"""
    import os, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
    import pytest, sandbox_case
    sandbox_case.become_nobody()
    os.umask(0o022)
    print("as user", os.getuid(), os.geteuid(), flush=True)
    sys.exit(pytest.main(sys.argv[1:]))
"""

if os.geteuid() == 0:

    @pytest.mark.full
    @pytest.mark.parametrize("attacks", ATTACKS)
    def test_every_attack_fails_for_an_ordinary_user_too(attacks, tmp_path):
        os.chmod(tmp_path, 0o777)
        for place in tmp_path.parents:  # pytest's own folders are root's
            if place.stat().st_uid == os.getuid() and place.name.startswith("pytest-"):
                os.chmod(place, 0o711)
        words = [f"tests/{attacks}", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/t"]
        done = subprocess.run(
            [sys.executable, "-B", "-c", textwrap.dedent(AS_NOBODY), *words],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env={**os.environ, "HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
        )
        assert "as user 65534 65534" in done.stdout, done.stderr
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        passed = int(re.search(r"(\d+) passed", done.stdout)[1])
        assert passed >= (7 if "more" in attacks else 60)
