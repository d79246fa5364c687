"""Running a bundle sends nothing and leaves nothing in the home folder; a forked process ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mesart.runtime import present_backends

ENGINES = [name for name in present_backends() if name != "torch"]

CODE = """
import sys
asked = []
watched = ["socket." + name for name in ("connect", "getaddrinfo", "gethostbyname", "sendto", "sendmsg")]
sys.addaudithook(lambda event, arguments: asked.append((event, str(arguments))) if event in watched else None)
from mesart.runtime import MesaModel
with MesaModel.load(sys.argv[1], sys.argv[2], threads=1) as model:
    model.generate("The grass is green.", 3)
assert not asked, asked
"""


def environment(home: Path) -> dict[str, str]:
    """One whose home, caches and settings lie in an empty folder, and that is not taken for continuous integration."""
    kinds = ("CACHE", "CONFIG", "DATA", "STATE")
    folders = {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in kinds}
    others = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    return {**others, **folders, "HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("backend", ENGINES)
def test_nothing_is_sent_and_the_home_stays_empty(bundle, tmp_path, backend):
    home = tmp_path / "home"
    home.mkdir()
    trace = tmp_path / "trace"
    command = [sys.executable, "-c", CODE, os.fspath(bundle()), backend]
    if shutil.which("strace"):  # sees native code too
        command = ["strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(trace), *command]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment(home), timeout=120)
    assert done.returncode == 0, done.stderr
    assert list(home.rglob("*")) == []
    calls = trace.read_text().splitlines() if trace.exists() else []
    assert [line for line in calls if "(" in line and "AF_UNIX" not in line] == []


def test_the_package_that_reports_can_still_be_imported(bundle):
    """By others in the same process: it is kept from one import only."""
    pytest.importorskip("openvino_telemetry")
    code = "from mesart.runtime.engine_imports import import_openvino as f; f(); import openvino_telemetry"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("backend", ENGINES)
def test_a_forked_process_is_told_and_ends(bundle, backend):
    code = """
import os, sys
from mesart.runtime import MesaModel
from mesart.graphs import MesaError
with MesaModel.load(sys.argv[1], sys.argv[2], threads=2, verify=False) as model:
    want = model.prefill([3, 4, 5])
    child = os.fork()
    if child == 0:
        try:
            model.prefill([3, 4, 5])
        except MesaError as error:
            print(error, flush=True)
        sys.exit(7)  # and frees what it has
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert (model.prefill([3, 4, 5]) == want).all()
"""
    command = [sys.executable, "-c", code, os.fspath(bundle()), backend]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0
    assert output.startswith("the process was forked after the model was loaded")
