"""Checkpoints are written by all processes at once, beside training, in little memory."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_processes import run_in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from vlbench.__main__ import main
from vlbench.distributed import machine_limits
from vlbench.errors import UserError
from vlbench.model.fsdp_wrapping import build_shard_mesh
from vlbench.model.weights import background_writer, own_rows, tensor_layout
from vlbench.model.weights.background_writer import BackgroundWriter, FolderWrite
from vlbench.model.weights.own_rows import find_own_rows
from vlbench.model.weights.tensor_layout import TensorSpec, create_files, plan_files
from vlbench.train import callbacks, progress_logging

WAIT = 60  # seconds after which a test gives up
QUICK = [
    *("fit", "recipe=yivl_llava", "only=align_224", "stages.align_224.steps=4"),
    *("stages.align_224.global_batch_size=2", "log.questions=1", "log.examples=0"),
    *("log.tensorboard=false", "log.every_n_steps=1", "trainer.keep_last_checkpoints=9"),
]


def some_tensors() -> dict[str, Tensor]:
    """Return tensors of several types and shapes, the same in every process."""
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(7, 3),
        "a.weight": torch.randn(5, 2, 2).to(torch.bfloat16),
        "scale": torch.tensor(0.5),
        "count": torch.tensor([3], dtype=torch.int64),
        "flags": torch.tensor([True, False, True]),
        "\u00e9.weight": torch.randn(2, 2, dtype=torch.float64),
        "small": torch.randn(1, 4),
        "empty": torch.empty(0, 4),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }


def write_all(tensors: dict[str, Tensor], folder: Path, **options: Any) -> BackgroundWriter:
    """Write the rows of this process; the files have to be there unless there is one process."""
    specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    files = plan_files(specs, options.pop("max_shard_bytes", 10**9))
    if not distributed.is_initialized() or distributed.get_rank() == 0:
        create_files(files, folder)
    if distributed.is_initialized():
        distributed.barrier()
    dtypes = {name: spec.dtype for name, spec in specs.items()}
    write = FolderWrite(folder, files, dtypes, find_own_rows(tensors))
    return BackgroundWriter([write], options.pop("memory_limit", 10**9), torch.device("cpu"))


def test_a_file_is_the_one_that_safetensors_writes(tmp_path: Path) -> None:
    write_all(some_tensors(), tmp_path).finish()
    save_file(some_tensors(), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_large_states_are_several_files_with_an_index(tmp_path: Path) -> None:
    write_all(some_tensors(), tmp_path, max_shard_bytes=100).finish()
    names = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    found = {name: t for file in names for name, t in load_file(tmp_path / file).items()}
    assert all(torch.equal(found[name], t) for name, t in some_tensors().items())
    assert (tmp_path / "model.safetensors.index.json").is_file()


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_write_one_file_without_gathering(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards, replicas of shards and whole tensors; each process writes its share of the bytes."""
    monkeypatch.setattr(own_rows, "MIN_DIVIDED_BYTES", 16)

    def write_rank(rank: int) -> int:
        tensors = some_tensors()
        for name in ("b.weight", "small", "a.weight"):
            mesh = build_shard_mesh("cpu", 2)
            replicas = [Replicate()] * (mesh.ndim - 1)
            tensors[name] = distribute_tensor(tensors[name], mesh, [*replicas, Shard(0)])
        DTensor.full_tensor = None  # type: ignore[assignment, method-assign]
        writer = write_all(tensors, tmp_path)
        writer.finish()
        distributed.barrier()
        return sum(rows.values.nbytes for rows in find_own_rows(tensors).values())

    written = run_in_processes(write_rank, world_size)
    whole = sum(tensor.nbytes for tensor in some_tensors().values())
    assert sum(written) == whole and max(written) < 1.5 * whole / world_size
    save_file(some_tensors(), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_columns_are_gathered(tmp_path: Path) -> None:
    def write_rank(rank: int) -> None:
        mesh = build_shard_mesh("cpu", 2)
        tensors = {"w": distribute_tensor(torch.arange(12.0).view(3, 4), mesh, [Shard(1)])}
        write_all(tensors, tmp_path).finish()
        distributed.barrier()

    run_in_processes(write_rank)
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["w"], torch.arange(12.0).view(3, 4))


def test_the_thread_that_copies_has_the_gpu_of_its_process(monkeypatch):
    """Otherwise it is the first one of the machine, and gets a CUDA context for each process."""
    made_current: list[tuple[torch.device, bool]] = []
    main_thread = threading.get_ident()
    monkeypatch.setattr(background_writer, "_HostCopier", lambda device: None)
    monkeypatch.setattr(
        torch.cuda,
        "set_device",
        lambda device: made_current.append((device, threading.get_ident() == main_thread)),
    )
    for device in (torch.device("cuda", 3), torch.device("cpu")):
        BackgroundWriter([], 1 << 20, device).finish()
    assert made_current == [(torch.device("cuda", 3), False)]


def test_a_slow_disk_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 MB are copied in pieces of 0.1 MB, of which at most 0.5 MB wait for the disk."""
    monkeypatch.setattr(background_writer, "PIECE_BYTES", 100_000)
    may_write, real = threading.Event(), background_writer.write_piece

    def write_late(*given: Any) -> None:
        may_write.wait(WAIT)
        real(*given)

    monkeypatch.setattr(background_writer, "write_piece", write_late)
    weight = torch.randn(2_500_000)
    writer = write_all({"w": weight}, tmp_path, memory_limit=500_000)
    assert not writer.is_written
    may_write.set()
    writer.finish()
    assert 400_000 <= writer.budget.peak <= 500_000 and writer.budget.used == 0
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], weight)


def files_of(run: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(run)): file.read_bytes()
        for file in sorted((run / "checkpoints").rglob("*.safetensors"))
    }


def test_steps_go_on_beside_a_slow_disk_and_weights_are_those_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of step 2 nothing is written before step 3 is done, nor copied before weights may change."""
    monkeypatch.setattr(callbacks, "MAX_REPEATED_SHARE", 0.5)
    assert main([*QUICK, f"run={tmp_path / 'usual'}"]) == 0
    may_copy, may_write, finished = threading.Event(), threading.Event(), []
    real_write, real_copy = background_writer.write_piece, background_writer._HostCopier.copy
    real_wait = BackgroundWriter.wait_until_copied
    real_step = progress_logging.ProgressCallback.on_step_end

    def write_late(*given: Any) -> None:
        assert may_write.wait(WAIT)
        real_write(*given)

    def copy_late(self: Any, *given: Any) -> Tensor:
        assert may_copy.wait(WAIT)
        return real_copy(self, *given)

    def wait_until_copied(self: BackgroundWriter) -> None:
        may_copy.set()
        real_wait(self)

    def on_step_end(self: Any, training: Any, step: Any) -> None:
        if training.steps_done == 3:
            checkpoints = tmp_path / "late" / "checkpoints"
            finished.extend(path.name for path in checkpoints.iterdir())
            may_write.set()
        real_step(self, training, step)

    monkeypatch.setattr(background_writer, "write_piece", write_late)
    monkeypatch.setattr(background_writer._HostCopier, "copy", copy_late)
    monkeypatch.setattr(BackgroundWriter, "wait_until_copied", wait_until_copied)
    monkeypatch.setattr(progress_logging.ProgressCallback, "on_step_end", on_step_end)
    assert main([*QUICK, f"run={tmp_path / 'late'}"]) == 0
    assert finished == [".writing-0-align_224-000002"]
    usual = files_of(tmp_path / "usual")
    assert len({name.split("/")[1] for name in usual}) == 2 and files_of(tmp_path / "late") == usual


def test_an_error_in_a_later_step_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "MAX_REPEATED_SHARE", 0.5)
    failed, real = threading.Event(), background_writer.write_piece

    def write_late(*given: Any) -> None:
        assert failed.wait(WAIT)
        real(*given)

    def on_step_end(self: Any, training: Any, step: Any) -> None:
        if training.steps_done == 3:
            failed.set()
            raise UserError("a later step fails")

    monkeypatch.setattr(background_writer, "write_piece", write_late)
    monkeypatch.setattr(progress_logging.ProgressCallback, "on_step_end", on_step_end)
    assert main([*QUICK, f"run={tmp_path / 'run'}"]) == 2
    left = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["0-align_224-000002"]


def test_a_disk_that_fills_up_behind_the_training_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(callbacks, "MAX_REPEATED_SHARE", 0.5)
    real = background_writer.write_piece

    def write(path: Path, *given: Any) -> None:
        if "000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *given)

    monkeypatch.setattr(background_writer, "write_piece", write)
    assert main([*QUICK, f"run={tmp_path / 'run'}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "the disk is full" in line and "earlier checkpoints are whole" in line
    left = list((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in left] == ["0-align_224-000002"]
    monkeypatch.setattr(background_writer, "write_piece", real)
    assert main([*QUICK, f"run={tmp_path / 'run'}"]) == 0


def test_a_container_may_have_less_memory_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
    monkeypatch.setattr(machine_limits, "MEMORY_FILE", tmp_path / "meminfo")
    monkeypatch.setattr(machine_limits, "CGROUP_FOLDER", tmp_path)
    assert machine_limits.free_host_memory() == 5_120_000
    (tmp_path / "memory.current").write_text("1000000\n")
    for most, free in (("max", 5_120_000), ("3000000", 2_000_000), ("500000", 0)):
        (tmp_path / "memory.max").write_text(f"{most}\n")
        assert machine_limits.free_host_memory() == free


def test_a_part_of_a_file_is_locked_where_others_write_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(12))
    background_writer.write_piece(tmp_path / "f", 4, torch.ones(4, dtype=torch.uint8), True)
    assert (tmp_path / "f").read_bytes() == bytes(4) + b"\1" * 4 + bytes(4)
    assert tensor_layout.HEADER_ALIGNMENT == 8


@pytest.mark.gpu
def test_a_gpu_is_copied_beside_what_it_computes(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(background_writer, "PIECE_BYTES", 1 << 20)
    weight = torch.randn(3_000_001, device="cuda")
    weight.mul_(2)  # queued before the copy
    rows = find_own_rows({"w": weight.to(torch.bfloat16)})
    files = plan_files({"w": TensorSpec((3_000_001,), torch.float32)})
    create_files(files, tmp_path)
    write = FolderWrite(tmp_path, files, {"w": torch.float32}, rows)
    writer = BackgroundWriter([write], 10**9, weight.device)
    writer.wait_until_copied()
    expected = weight.to(torch.bfloat16).float().cpu()
    weight.zero_()
    writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], expected)


def test_copying_on_a_cpu_begins_no_team_of_threads(tmp_path: Path) -> None:
    """With more OpenMP threads than cores, libgomp lets none of a process spin."""
    before = torch.get_num_threads()
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        pytest.skip("threads are counted in /proc")
    tensors = {"a": torch.rand(1 << 20), "b": torch.rand(1 << 20).to(torch.bfloat16)}
    torch.set_num_threads(4)
    try:
        specs = {name: TensorSpec(tuple(t.shape), torch.float32) for name, t in tensors.items()}
        files = plan_files(specs)
        create_files(files, tmp_path)
        known = {task.name for task in tasks.iterdir()}
        writes = [
            FolderWrite(
                tmp_path, files, dict.fromkeys(tensors, torch.float32), find_own_rows(tensors)
            )
        ]
        writer = BackgroundWriter(writes, 1 << 30, torch.device("cpu"))
        writer.wait_until_copied()
        assert len({task.name for task in tasks.iterdir()} - known) <= 2  # copies, writes
        writer.finish()
    finally:
        torch.set_num_threads(before)
    read = load_file(tmp_path / files[0].name)
    assert all(read[name].equal(tensor.float()) for name, tensor in tensors.items())
