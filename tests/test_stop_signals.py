"""Ctrl-C and SIGTERM while modules are imported: one line or none, and never a trace."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SIGNALLED = "import os, signal, time\nos.kill(os.getpid(), signal.{})\n"
LIBRARIES = {
    "goes_on": "try:\n    time.sleep(30)\nexcept BaseException:\n    pass\ntime.sleep(30)\n",
    "is_half": "try:\n    time.sleep(30)\nexcept BaseException:\n    raise ImportError\n",
    "is_slow": "time.sleep(30)\n",
}
"""What comes behind the signal in a library: extensions swallow it, or leave half a module."""
COMMAND = """
from vlbench import command_dispatch
from vlbench.verbs import VERBS

def run_verb(words):
    import library
    print("went on")
    return 0

VERBS["list"] = VERBS["list"]._replace(run_verb=run_verb)
raise SystemExit(command_dispatch.run_command(["list"]))
"""


def run_program(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a Python program with the modules of `folder`, and Ctrl-C as at a terminal."""
    program = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{program}"
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {[str(folder), str(ROOT)]}\n{program}"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_in_an_import_stops_the_command(name: str, library: str, tmp_path: Path) -> None:
    signalled = SIGNALLED.format(name)
    (tmp_path / "library.py").write_text(signalled + LIBRARIES[library], encoding="utf-8")
    done = run_program(COMMAND, tmp_path)
    is_interrupt = name == "SIGINT"
    assert done.stderr == ("vlbench: interrupted\n" if is_interrupt else "")
    assert done.returncode == (130 if is_interrupt else -signal.SIGTERM) and not done.stdout


def test_an_error_of_an_import_is_itself_where_no_signal_came(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("raise RuntimeError('itself')\n", encoding="utf-8")
    done = run_program(COMMAND, tmp_path)
    assert done.returncode == 1 and "RuntimeError: itself" in done.stderr


def test_a_signal_in_an_import_of_the_host_program_is_not_repeated(tmp_path: Path) -> None:
    """A module that runs a command as it is imported: what the command does is no import."""
    handled = """
from vlbench.stop_signals import unwind_on_stop_signals
import os, signal, time
with unwind_on_stop_signals():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("handled")
"""
    (tmp_path / "host.py").write_text(handled, encoding="utf-8")
    done = run_program("import host", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


def test_an_interrupt_before_the_command_has_no_trace(tmp_path: Path) -> None:
    signalled = SIGNALLED.format("SIGINT")
    program = """
from vlbench import __main__, stop_signals
sys.modules.pop("vlbench.command_dispatch", None)
sys.meta_path.insert(0, type("Finder", (), {"find_spec": staticmethod(find_spec)}))
"""
    find_spec = f"""
def find_spec(name, path, target=None):
    if name == "vlbench.command_dispatch":
        {"; ".join(signalled.splitlines())}; time.sleep(30)
"""
    program = find_spec + program + "raise SystemExit(__main__.run_program())"
    done = run_program(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
