"""A command of vlbench in a forked child: its exit code, words, time and peak memory.

A new Python process pays 4 s for importing torch; a fork of this one pays milliseconds, and can be
killed when it hangs or takes the machine's memory, which a call of `main` in the test cannot.

What makes a fork after `import torch` safe here:

- OpenMP's pool of threads does not survive a fork, and a child that opens a parallel region waits
  for it forever. The child sets torch to one thread before anything else, so no region is opened;
  tokenizers' pool is switched off by its environment variable. OpenBLAS and pyarrow renew theirs.
- Autograd has threads of its own for accelerators only, and torch refuses `backward` in a fork
  after they began. On a machine without one there are none; with one, a test process that has
  trained before must not train in a fork. The child sees no GPU.
- pytest's capture of streams, logs and warnings, which the child inherits, is undone in it.
- The child leaves through `os._exit`: nothing that this process would do at its exit is done twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TypedDict, Unpack

HEAVY_MODULES = (
    "torch",
    "lightning",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.models.bert.modeling_bert",
    "open_clip",
    "peft",
    "scipy.stats",
    "pyarrow.parquet",
    "matplotlib.pyplot",
    "torch.utils.tensorboard",
    "vlbench.train.fit",
    "vlbench.evaluate.run_results",
    "vlbench.compare.report.html_report",
    "vlbench.serve.chat_command",
)
"""What a verb imports when it runs; imported here once, a child inherits it."""

TIME_LIMIT = 20.0  # seconds in which a hostile input is answered
MEMORY_LIMIT = 1_500_000_000  # bytes of a whole process that answers one
IMPORTED_BYTES = 600_000_000  # of them, resident once everything is imported
KILL_BYTES = 4_000_000_000  # of growth: the child is killed before the machine suffers


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    """Exit code; minus the number of the signal that ended it."""
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int
    """Peak of the resident memory beyond what the child began with."""
    stdin_bytes: int
    """How many bytes of standard input were read."""
    killed: str
    """Why the child was killed: "time", "memory", or "" where it ended by itself."""

    @property
    def words(self) -> str:
        """Everything it said."""
        return self.stdout + self.stderr

    def assert_modest(self) -> None:
        """Assert that it ended by itself, in the time and memory that any input may take."""
        assert not self.killed, f"killed for {self.killed}: {self.words[-2000:]}"
        assert self.seconds < TIME_LIMIT, self.seconds
        assert self.peak_bytes + IMPORTED_BYTES < MEMORY_LIMIT, f"{self.peak_bytes:,} bytes"

    def assert_one_line(self, code: int = 2) -> str:
        """Assert that it was modest and refused with one line; return that line."""
        self.assert_modest()
        assert self.code == code, f"exit code {self.code}: {self.words[-2000:]}"
        lines = self.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("vlbench: "), self.words[-2000:]
        return lines[0]


@cache
def import_heavy_modules() -> None:
    """Import what the verbs import, once in this process."""
    for name in HEAVY_MODULES:
        import_module(name)
    gc.collect()
    gc.freeze()  # what is imported stays, and each later collection would look through all of it


class ForkOptions(TypedDict, total=False):
    """How `run_command` and `run_forked` start the child; each may be left out."""

    stdin: str | bytes
    """What can be read from its standard input; nothing by default."""
    timeout: float
    """Seconds after which it is killed; `TIME_LIMIT` by default."""
    environment: Mapping[str, str]
    """Variables that are set in the child."""
    prepare: Callable[[], object]
    """Called in the child before the command, e.g. to set a limit or to patch a function."""


def run_command(argv: Sequence[object], cwd: Path, **options: Unpack[ForkOptions]) -> Outcome:
    """Run `python -m vlbench ARGV...` in a fork in the folder `cwd`; words are made by `str`."""
    words = [str(word) for word in argv]

    def command() -> int:
        from vlbench.__main__ import main

        return main(words)

    return run_forked(command, cwd, **options)


def run_forked(
    function: Callable[[], int | None], cwd: Path, **options: Unpack[ForkOptions]
) -> Outcome:
    """Call a function in a fork in the folder `cwd`; its result is the exit code."""
    stdin, timeout = options.get("stdin", b""), options.get("timeout", TIME_LIMIT)
    environment, prepare = options.get("environment", {}), options.get("prepare")
    import_heavy_modules()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # so that memory freed here is not reused there uncounted
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        given.write(stdin.encode() if isinstance(stdin, str) else stdin)
        given.flush()
        given.seek(0)
        sys.stdout.flush()
        sys.stderr.flush()
        start = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside other threads
            child = os.fork()
        if not child:
            streams = (given.fileno(), out.fileno(), err.fileno())
            _be_the_command(function, cwd, streams, environment, prepare)
        began = _resident_bytes(child)
        killed = _watch(child, start + timeout, began + KILL_BYTES)
        _, status, usage = os.wait4(child, 0)
        seconds = time.monotonic() - start
        with contextlib.suppress(ProcessLookupError):  # workers that it has left behind
            os.killpg(child, signal.SIGKILL)
        position = os.lseek(given.fileno(), 0, os.SEEK_CUR)
        out.seek(0)
        err.seek(0)
        return Outcome(
            code=os.waitstatus_to_exitcode(status),
            stdout=out.read().decode("utf-8", "backslashreplace"),
            stderr=err.read().decode("utf-8", "backslashreplace"),
            seconds=seconds,
            peak_bytes=max(0, usage.ru_maxrss * 1024 - began),
            stdin_bytes=position,
            killed=killed,
        )


def _watch(child: int, deadline: float, most_bytes: int) -> str:
    """Wait until the child ends, or kill it and return why; it stays to be waited for."""
    pause = 0.005
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        too_late, too_large = time.monotonic() > deadline, _resident_bytes(child) > most_bytes
        if too_late or too_large:
            os.kill(child, signal.SIGKILL)
            return "memory" if too_large else "time"
        time.sleep(pause)
        pause = min(0.05, pause * 1.5)
    return ""


def _resident_bytes(process: int) -> int:
    try:
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _be_the_command(
    function: Callable[[], int | None],
    cwd: Path,
    streams: tuple[int, int, int],
    environment: Mapping[str, str],
    prepare: Callable[[], object] | None,
) -> None:
    """Run the function in the child, and never return."""
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        os.chdir(cwd)
        os.environ |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **environment}
        _undo_capture()
        import torch

        torch.set_num_threads(1)
        if prepare:
            prepare()
        code = function() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
        os._exit(code)


def _undo_capture() -> None:
    """Give the child the streams, log handlers, warnings and signals of a new Python process."""
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(
        2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    logging.getLogger().handlers.clear()
    for reference in list(logging._handlerList):  # type: ignore[attr-defined]
        handler = reference()
        if type(handler) is logging.StreamHandler:
            handler.stream = sys.stderr  # made at import, it writes to what stderr was then
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
