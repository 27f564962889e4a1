"""A lock file: one process at a time writes into a folder, on network file systems too.

The file says who holds it. Its time is set anew every `HEARTBEAT_SECONDS`, so that another machine
can tell a holder that has died; on the same machine its process id tells that at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from vlbench.errors import CONTROL_CHARACTERS, EnvironmentFailure, UserError, escape_to_one_line
from vlbench.regular_files import read_regular_text

LOCK_FILE = ".lock"
HEARTBEAT_SECONDS = 30.0
MAX_LOCK_BYTES, MAX_PID = 1 << 16, 1 << 31
STALE_MINUTES = 5  # without a heartbeat; NFS shows a new time after a minute at the latest
PROCESS_FOLDER = Path("/proc")


@dataclass(frozen=True)
class LockHolder:
    """A process that holds a lock, as far as its machine tells."""

    host: str
    boot: str
    """Of the start of the machine, and of the container; "" where that is unknown."""
    pid: int
    started: str
    """When the process began, in ticks since the machine's start: a recycled pid has another."""
    job: str = ""
    """Slurm's job id, which a job that is queued again keeps."""
    restarts: int = 0
    """How often Slurm has started the job again."""

    @property
    def is_running_here(self) -> bool:
        """True if the process runs on this machine and in this container."""
        here = current_holder()
        return (self.host, self.boot) == (here.host, here.boot) and (
            _process_start(self.pid) in (self.started, "unknown")
        )

    def has_ended(self, silent_seconds: float) -> bool:
        """Tell whether the process has ended, if it gave no heartbeat for `silent_seconds`."""
        here = current_holder()
        if (self.host, self.boot) == (here.host, here.boot):
            return not self.is_running_here
        if self.job and self.job == here.job and self.restarts < here.restarts:
            return True  # Slurm starts a job again when all of its processes have ended
        return silent_seconds > STALE_MINUTES * 60

    def __str__(self) -> str:
        """Return the words of a message."""
        return f"process {self.pid} on {self.host}"


def current_holder() -> LockHolder:
    """Return what this process writes into a lock file."""
    return LockHolder(
        host=socket.gethostname(),
        boot=_machine_start(),
        pid=os.getpid(),
        started=_process_start(os.getpid()),
        job=os.environ.get("SLURM_JOB_ID", ""),
        restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    )


def _machine_start() -> str:
    """Return what tells starts of this machine, and containers on it, from each other."""
    try:
        boot = (PROCESS_FOLDER / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink(PROCESS_FOLDER / 'self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _process_start(pid: int) -> str:
    """Return when a process began, "" when there is none, "unknown" if the system does not tell."""
    try:
        # behind the name in brackets, which may hold anything: state, ..., start (proc(5))
        text = (PROCESS_FOLDER / f"{pid}/stat").read_text(encoding="utf-8", errors="replace")
        fields = text.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            return "unknown"
    return "unknown"


@contextlib.contextmanager
def hold_folder(folder: Path, subject: str) -> Iterator[None]:
    """Make a folder if it is not there, and hold its lock file until the end of `with`.

    `subject` names the folder in messages.

    Raises:
        UserError: The name has a line end or another control character, which no script survives.
        EnvironmentFailure, OSError: as `hold_lock`.
    """
    if CONTROL_CHARACTERS.search(str(folder)):
        raise UserError(f"{escape_to_one_line(subject)}: no name may have control characters")
    folder.mkdir(parents=True, exist_ok=True)
    with hold_lock(folder / LOCK_FILE, subject):
        yield


@contextlib.contextmanager
def hold_lock(lock_file: Path, subject: str) -> Iterator[None]:
    """Hold a lock file until the end of `with`; take it over from a process that has ended.

    Raises:
        EnvironmentFailure: Another process holds it. Nothing was changed.
        OSError: The file cannot be written.
    """
    text = json.dumps(asdict(current_holder()))
    while (silent_seconds := _try_to_create(lock_file, text)) is not None:
        _remove_if_stale(lock_file, silent_seconds, subject)
    has_ended = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(lock_file, has_ended), daemon=True)
    owner = os.getpid()
    try:
        heartbeat.start()
        yield
    finally:
        if os.getpid() == owner:  # no process that was forked meanwhile
            has_ended.set()
            if heartbeat.ident is not None:
                heartbeat.join()
            if _read_text(lock_file) == text:
                lock_file.unlink(missing_ok=True)


def is_held_here(lock_file: Path) -> bool:
    """Tell whether a process of this machine holds a lock file."""
    holder = _parse_holder(_read_text(lock_file))
    return holder is not None and holder.is_running_here


def _try_to_create(lock_file: Path, text: str) -> float | None:
    """Create a lock file with its text at once; return None, or its age in seconds if it is there.

    The age is told by the clock that gives files their times, which may be a server's.
    """
    temporary = lock_file.with_name(f"{lock_file.name}.{uuid.uuid4().hex}")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, lock_file)
            return None
        except FileExistsError:
            if temporary.stat().st_nlink == 2:  # an answer of NFS was lost, and it asked again
                return None
        except OSError:  # a file system without links
            with contextlib.suppress(FileExistsError):
                with lock_file.open("x", encoding="utf-8") as file:
                    file.write(text)
                return None
        try:
            return temporary.stat().st_mtime - lock_file.stat().st_mtime
        except FileNotFoundError:  # released just now
            return 0.0
    finally:
        temporary.unlink(missing_ok=True)


def _remove_if_stale(lock_file: Path, silent_seconds: float, subject: str) -> None:
    """Remove the lock file of a process that has ended, and say so; raise if it may still run."""
    text = _read_text(lock_file)
    if text is None:
        return
    holder = _parse_holder(text)
    who = str(holder) if holder else "a process that did not write its name"
    is_stale = holder.has_ended(silent_seconds) if holder else silent_seconds > STALE_MINUTES * 60
    if not is_stale:
        raise EnvironmentFailure(f"{subject} is in use by {who}: {_advise(holder, lock_file)}")
    # renamed first: of several processes that see it, one gets it, and none removes a newer one
    claimed = lock_file.with_name(f"{lock_file.name}.{uuid.uuid4().hex}")
    try:
        lock_file.rename(claimed)
    except FileNotFoundError:
        return
    if _read_text(claimed) != text:
        with contextlib.suppress(FileExistsError):
            os.link(claimed, lock_file)
        claimed.unlink()
        return
    claimed.unlink()
    print(f"vlbench: {subject} was left locked by {who}, which has ended: goes on", file=sys.stderr)


def _advise(holder: LockHolder | None, lock_file: Path) -> str:
    if holder == current_holder():
        return "that is this process itself"
    if holder and holder.is_running_here:
        return "wait until it ends, or name another folder"
    return (
        f"wait until it ends; if it no longer runs, remove {lock_file}, or wait for "
        f"{STALE_MINUTES} minutes after its end"
    )


def _read_text(file: Path) -> str | None:
    """Return the text of a lock file, None if there is none.

    Raises a UserError where something else has its name, which no process of vlbench has made.
    """
    try:
        return read_regular_text(file, MAX_LOCK_BYTES, errors="replace")
    except FileNotFoundError:
        if file.is_symlink():
            raise UserError(f"{file}: is a link to nothing; remove it") from None
        return None
    except UserError as error:
        raise UserError(f"{file}: {error}; remove it") from error


def _parse_holder(text: str | None) -> LockHolder | None:
    try:
        holder = LockHolder(**json.loads(text or ""))
    except (ValueError, TypeError, RecursionError):  # cut short by a full disk, another version's
        return None
    kinds = {"pid": int, "restarts": int}
    is_typed = all(type(said) is kinds.get(key, str) for key, said in vars(holder).items())
    return holder if is_typed and 0 < holder.pid < MAX_PID else None


def _beat(lock_file: Path, has_ended: threading.Event) -> None:
    """Set the time of a lock file again and again, until `has_ended`."""
    while not has_ended.wait(HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):  # one that is missed matters after STALE_MINUTES only
            os.utime(lock_file)
