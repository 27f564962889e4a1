"""What the operating system refuses, as a line for people: a full disk, no memory, no permission.

Libraries raise it as errors of many types. What remains is a fault of the program.
"""

from __future__ import annotations

import errno
import os
import re

from vlbench.errors import EnvironmentFailure, UserError, escape_to_one_line, one_line

FULL_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "no file may become so large here (ulimit -f)",
}
EXHAUSTED_REASONS = {
    errno.ENOMEM: "out of memory: end other programs, or raise the limit (ulimit -v)",
    # a thread without memory for its stack is refused by the same number
    errno.EAGAIN: "no more processes or threads may be started (ulimit -u), or memory has no room "
    "for one (ulimit -v)",
    errno.EMFILE: "too many files are open (ulimit -n)",
    errno.ENFILE: "too many files are open on this machine",
}
REFUSED_ERRNOS = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ELOOP,
    errno.EINVAL,
    errno.EIO,
    errno.ESTALE,
    errno.ENXIO,
}
OS_ERROR_PATTERN = re.compile(r"\(os error (\d+)\)")
MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "failed to map segment",
    "unable to mmap",
    "could not create a primitive",  # oneDNN's, as the next one: it does not say why
    "could not create a memory",
)
GPU_MEMORY_PATTERN = re.compile(
    r"\b(cuda|hip|xpu|mps)\b.{0,40}\bout of memory"  # the allocators, the runtimes, NCCL
    r"|(cublas|cudnn)_status\w*_?alloc(ation)?_failed",
    re.IGNORECASE,
)
GPU_ERROR_NAME = "OutOfMemoryError"  # torch's type, known by name: this file imports no torch


def error_number(error: BaseException) -> int | None:
    """Return the system's number of an error; safetensors gives it in the text alone."""
    if isinstance(error, OSError):
        return error.errno
    match = OS_ERROR_PATTERN.search(str(error))
    return int(match[1]) if match else None


def is_memory_error(error: BaseException) -> bool:
    """Tell whether an error of Python, torch or a library of theirs means that memory ran out."""
    text = str(error).lower()
    is_of_host = isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS)
    return is_of_host or _is_gpu_memory_error(error)


def _is_gpu_memory_error(error: BaseException) -> bool:
    """Tell whether the memory of a GPU ran out: by torch's type, or the text of a library."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return GPU_ERROR_NAME in names or bool(GPU_MEMORY_PATTERN.search(str(error)))


def explain_system_error(error: BaseException) -> UserError | EnvironmentFailure | None:
    """Return the error for people for one of the system's; None for any other.

    It is a UserError where another command would do, and an EnvironmentFailure where the machine
    has too little of something.
    """
    text = one_line(error)
    number = error_number(error)
    known = None if number is None else _explain_errno(error, number)
    if known:
        return known
    if "home directory" in text:  # pathlib's, of a path that begins with ~NAME
        return UserError(
            "a path begins with ~NAME, and there is no user NAME here; write the whole path of a "
            "file or folder that is called so"
        )
    if "can't start new thread" in text:
        return EnvironmentFailure(f"{EXHAUSTED_REASONS[errno.EAGAIN]}: {text}")
    if _is_gpu_memory_error(error):
        told = text.partition(" Of the allocated memory")[0]  # what is left is for programmers
        return EnvironmentFailure(
            "out of memory on the GPU: end other programs there, or ask for less at once: a "
            "smaller batch= (at the end of fit a smaller log.questions=), dtype=bfloat16, fewer or "
            f"smaller images, shorter answers ({told.rstrip('.')})"
        )
    if is_memory_error(error):
        return EnvironmentFailure(
            "out of memory: end other programs, raise the limit (ulimit -v, or the job's memory), "
            f"or ask for less ({text.rstrip('.')})"
        )
    return None


def explain_unwritable(error: BaseException, what: str) -> UserError | EnvironmentFailure:
    """Return the error for people where a result cannot be written; `what` names it, as `out=x`.

    A full disk is an EnvironmentFailure; anything else another place of writing would mend.
    """
    number = error_number(error)
    if number in FULL_DISK_REASONS:
        return _disk_failure(number, what)
    reason = getattr(error, "strerror", None) or one_line(error)
    return UserError(f"{what} cannot be written ({reason})")


def _explain_errno(error: BaseException, number: int) -> UserError | EnvironmentFailure | None:
    file_name = getattr(error, "filename", None)
    name = None if file_name is None else escape_to_one_line(f"{file_name!s:.300}")
    if number in FULL_DISK_REASONS:
        return _disk_failure(number, name)
    if number in EXHAUSTED_REASONS:
        return EnvironmentFailure(f"{EXHAUSTED_REASONS[number]}{f': {name}' if name else ''}")
    if isinstance(error, FileNotFoundError) and name is None:  # os.getcwd's
        return UserError("the current folder is gone: go to one that is there (cd)")
    if number in REFUSED_ERRNOS and name is not None:
        return UserError(f"{name}: {getattr(error, 'strerror', None) or os.strerror(number)}")
    return None


def _disk_failure(number: int, file_name: str | None) -> EnvironmentFailure:
    what = f"{file_name} cannot be written" if file_name else "a file cannot be written"
    return EnvironmentFailure(
        f"{FULL_DISK_REASONS[number]}: {what}. What was written before is whole; make room, and "
        "repeat the command (of a run: with its run=)"
    )
