"""Tensors copied to the host and written by threads, while training goes on.

Two threads: one copies what this process writes, in pieces and through pinned memory from a GPU;
the other writes the pieces. At most `memory_limit` bytes are copied and not yet written, so a slow
disk makes the copying wait, and never fills the memory of the machine.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlbench.model.weights.own_rows import OwnRows
from vlbench.model.weights.tensor_layout import FileLayout

PIECE_BYTES = 1 << 26  # copied and written at a time; PCIe and disks are at their speed by then
SERIAL_ELEMENTS = 1 << 14  # copied by torch on one thread: half of at::internal::GRAIN_SIZE

UNSUPPORTED_LOCK_ERRNOS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class FolderWrite:
    """Tensors to write into the files of one folder, which exist and have their sizes."""

    folder: Path
    files: Sequence[FileLayout]
    dtypes: Mapping[str, torch.dtype]
    """The types in the files; tensors are cast to them."""
    own_rows: Mapping[str, OwnRows]


class MemoryBudget:
    """Bytes that may be in use at once, shared by threads."""

    def __init__(self, limit: int) -> None:
        """Allow `limit` bytes, or a single piece that is larger."""
        self.limit, self.used, self.peak = limit, 0, 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit, and count them."""
        with self._changed:
            self._changed.wait_for(lambda: not self.used or self.used + size <= self.limit)
            self.used += size
            self.peak = max(self.peak, self.used)

    def give_back(self, size: int) -> None:
        """Count `size` bytes no longer."""
        with self._changed:
            self.used -= size
            self._changed.notify_all()


class BackgroundWriter:
    """Writes of this process, which began when it was made."""

    def __init__(
        self,
        folder_writes: Sequence[FolderWrite],
        memory_limit: int,
        device: torch.device,
        lock_ranges: bool = False,
    ) -> None:
        """Begin to copy and write.

        Args:
            folder_writes: What to write where.
            memory_limit: Most bytes that are copied and not yet written.
            device: Where the tensors are; those on a CPU may be among them.
            lock_ranges: Whether other machines write other parts of the same files: each part is
                then locked, since some network file systems would write whole pages otherwise.
        """
        self.budget = MemoryBudget(memory_limit)
        self._lock_ranges = lock_ranges
        self._copier = _HostCopier(device)
        self._copy_thread = ThreadPoolExecutor(1, initializer=_make_current, initargs=(device,))
        self._write_thread = ThreadPoolExecutor(1)
        self._writes: list[Future[None]] = []
        self._copies = self._copy_thread.submit(self._copy_all, folder_writes)

    @property
    def is_written(self) -> bool:
        """True when everything is on the disk, or has failed."""
        return self._copies.done() and all(write.done() for write in self._writes)

    def wait_until_copied(self) -> None:
        """Wait until the tensors may change; an error is raised by `finish`."""
        concurrent.futures.wait([self._copies])

    def finish(self) -> None:
        """Wait until everything is on the disk; raise the first error."""
        try:
            self._copies.result()
            for write in self._writes:
                write.result()
        finally:
            self.close()

    def close(self) -> None:
        """Wait until the threads have ended."""
        self._copy_thread.shutdown()
        self._write_thread.shutdown()

    def _copy_all(self, folder_writes: Sequence[FolderWrite]) -> None:
        """Copy all rows piece by piece, and hand them to the other thread."""
        for target in folder_writes:
            for file in target.files:
                for name, offset in file.offsets.items():
                    if name in target.own_rows:
                        self._copy_rows(
                            target.own_rows[name],
                            target.dtypes[name],
                            target.folder / file.name,
                            offset,
                        )
                path = target.folder / file.name
                self._writes.append(self._write_thread.submit(fsync_path, path))

    def _copy_rows(self, rows: OwnRows, dtype: torch.dtype, path: Path, offset: int) -> None:
        position = offset + rows.first_element * dtype.itemsize
        for values in rows.values.split(PIECE_BYTES // dtype.itemsize):
            size = values.numel() * dtype.itemsize
            self.budget.take(size)
            try:
                piece = self._copier.copy(values, dtype)
                write = self._write_thread.submit(self._write, path, position, piece)
            except BaseException:
                self.budget.give_back(size)
                raise
            self._writes.append(write)
            position += size

    def _write(self, path: Path, position: int, piece: Tensor) -> None:
        try:
            write_piece(path, position, piece, self._lock_ranges)
        finally:
            self.budget.give_back(piece.nbytes)


class _HostCopier:
    """Copies tensors to pageable memory, from a GPU beside what it computes."""

    def __init__(self, device: torch.device) -> None:
        """Let copies begin when what was queued on the device is done."""
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            self._staging = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)

    def copy(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a copy as `dtype` on the host."""
        if values.device.type != "cuda" or self._stream is None:
            return _copy_on_one_thread(values, dtype)
        staged = self._staging[: values.numel() * dtype.itemsize].view(dtype)
        with torch.cuda.stream(self._stream):
            staged.copy_(values, non_blocking=True)
            self._stream.synchronize()
        return staged.clone()


def _make_current(device: torch.device) -> None:
    """Make a GPU the current one of a new thread, whose current GPU is the first of the machine.

    Entering and leaving a stream of another GPU would begin a CUDA context on the first one, half a
    gigabyte of its memory for every process of the machine.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _copy_on_one_thread(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a flat tensor on the CPU as `dtype`.

    A copy of more elements would begin a team of OpenMP threads that belongs to the copying thread.
    With more of them than cores, libgomp lets no thread of the process spin, those of training
    neither.
    """
    copied = torch.empty(values.shape, dtype=dtype)
    for target, source in zip(
        copied.split(SERIAL_ELEMENTS), values.split(SERIAL_ELEMENTS), strict=True
    ):
        target.copy_(source)
    return copied


def write_piece(path: Path, position: int, piece: Tensor, lock_range: bool = False) -> None:
    """Write the bytes of a tensor into a file at `position`."""
    view = piece.view(torch.uint8).numpy().data
    handle = os.open(path, os.O_WRONLY)
    try:
        if lock_range:
            _lock_where_possible(handle, position, len(view))
        while view:
            written = os.pwrite(handle, view, position)
            view, position = view[written:], position + written
        if lock_range:
            os.fsync(handle)  # before the lock goes with the handle
    finally:
        os.close(handle)


def fsync_path(path: Path) -> None:
    """Wait until what was written into a file or folder is on the disk: it survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _lock_where_possible(handle: int, position: int, size: int) -> None:
    """Lock a part of a file: NFS then sends these bytes alone, not the pages around them.

    File systems that know no locks between machines (Lustre without flock) keep pages coherent.
    """
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX, size, position)
    except OSError as error:
        if error.errno not in UNSUPPORTED_LOCK_ERRNOS:
            raise
