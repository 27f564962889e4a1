"""Features of a frozen encoder that are kept: the same run, bit for bit; trouble is survived."""

from __future__ import annotations

import errno
import json
import shutil
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from two_process_commands import QUIET, TWO, FitCommand, read_losses, run_in_two_processes

from vlbench.__main__ import main
from vlbench.config.schema import TrainerConfig
from vlbench.data import feature_store
from vlbench.data.feature_store import FeatureShards, FeatureStore, content_key, view_keys
from vlbench.data.image_tiling import ImageTiling, TiledImage
from vlbench.data.sample import LazyImage
from vlbench.data.scene_world import make_scene
from vlbench.distributed import collectives
from vlbench.model.vision_config import EMBEDDED_ENCODERS
from vlbench.train import checkpoint_files, feature_cache, feature_computation, stage_runner
from vlbench.train.callbacks import GracefulStop

MINIATURE = EMBEDDED_ENCODERS["tiny"]
FROZEN = [f"stages.{name}.train.vision=null" for name in ("align_224", "align_448", "chat")]
SHORT = [
    "fit",
    "recipe=yivl_llava",
    "stages.align_224.steps=0",
    "stages.align_448.steps=3",
    "stages.chat.steps=3",
    "stages.align_448.global_batch_size=4",
    "stages.chat.global_batch_size=4",
    "data.samples=6",  # so that images are met again
    "log.questions=4",
    "log.examples=0",
    "log.every_n_steps=1",
    "log.tensorboard=false",
]


def run(folder: Path, *words: str) -> dict[str, torch.Tensor]:
    """Fit, and return the weights at the end."""
    assert main([*SHORT, *FROZEN, f"run={folder}", *words]) == 0
    last = checkpoint_files.find_checkpoint(folder)
    return load_file(last / "model.safetensors")


def losses(folder: Path) -> list[list[str]]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    return [line.split(",")[:6] for line in lines]


def shards(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without kept features."""
    folder = tmp_path_factory.mktemp("features") / "plain"
    run(folder)
    return folder


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> tuple[Path, Path]:
    """The same with kept features, and their folder."""
    folder = tmp_path_factory.mktemp("features")
    run(folder / "run", f"trainer.feature_cache={folder / 'cache'}")
    return folder / "run", folder / "cache"


def assert_same(one: Path, other: Path) -> None:
    ours, theirs = (
        load_file(checkpoint_files.find_checkpoint(run) / "model.safetensors")
        for run in (one, other)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses(one) == losses(other)


def test_a_run_is_the_same_bit_for_bit(plain, cached):
    run, cache = cached
    assert_same(plain, run)
    counts = set()  # of captions and of conversations, some with several images, at one image size
    for one in shards(cache):
        count, *shape = load_file(one)["features"].shape
        assert shape == [64, 128]
        counts.add(count)
    assert counts == {6, 9}


def test_the_encoder_sees_every_image_once_whatever_the_connector(cached, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    shutil.copytree(cached[1], cache)
    computed = []
    monkeypatch.setattr(feature_computation, "encode_levels", lambda *_: computed.append(1))
    run(tmp_path / "linear", "connector.name=linear", f"trainer.feature_cache={cache}")
    assert not computed and len(shards(cache)) == 2


def test_a_connector_that_reads_the_class_token_has_features_of_its_own(cached, tmp_path):
    words = ["connector.name=qformer", "connector.text=embedded", "only=chat"]
    run(tmp_path / "run", *words, f"trainer.feature_cache={tmp_path / 'cache'}")
    found = load_file(shards(tmp_path / "cache")[0])["features"]
    assert found.shape == (9, 65, 128)


def test_a_damaged_shard_is_computed_again(plain, cached, tmp_path):
    cache = tmp_path / "cache"
    shutil.copytree(cached[1], cache)
    wrong, torn = shards(cache)
    tensors = load_file(wrong)
    tensors["features"][2, 3, 4] += 1
    save_file(tensors, wrong)
    torn.write_bytes(torn.read_bytes()[:1000])
    run(tmp_path / "run", f"trainer.feature_cache={cache}")
    assert_same(plain, tmp_path / "run")
    whole = [load_file(path) for path in shards(cache)]
    assert [t["sums"].tolist() for t in whole] == [
        [feature_store.feature_checksum(one) for one in t["features"]] for t in whole
    ]


def test_images_and_shards_are_read_without_the_lock(cached, tmp_path, monkeypatch):
    """Under it the processes of a run would read all of them one after the other."""
    cache, locks, read, checked = tmp_path / "cache", [], [], []

    class Lock(FileLock):
        def acquire(self, *given, **named):
            locks.append(self)
            return super().acquire(*given, **named)

    def recorded(real, held):
        def call(*given):
            held.append(any(lock.is_locked for lock in locks))
            return real(*given)

        return call

    shutil.copytree(cached[1], cache)
    monkeypatch.setattr(feature_cache, "FileLock", Lock)
    monkeypatch.setattr(feature_cache, "view_keys", recorded(view_keys, read))
    checksum = recorded(feature_store.feature_checksum, checked)
    monkeypatch.setattr(feature_store, "feature_checksum", checksum)
    words = (f"trainer.feature_cache={cache}", "only=chat", "connector.name=linear")
    run(tmp_path / "all", *words)
    assert not locks and not any(read + checked) and len(read) == 9 and len(checked) > 15
    by_size = {load_file(path)["features"].shape[0]: path for path in shards(cache)}
    by_size[9].unlink()
    read.clear(), checked.clear()
    run(tmp_path / "some", *words)
    assert len(locks) == 1 and not any(read) and checked.count(True) == 9  # of what is written


def test_a_shard_that_was_written_anew_is_not_deleted(tmp_path):
    feature_shards, images = FeatureShards(tmp_path), [b"1" * 16, b"2" * 16]
    feature_shards.write_shard(images, torch.ones(2, 3, 4))
    whole, (path,) = shards(tmp_path)[0].read_bytes(), shards(tmp_path)
    path.write_bytes(whole[:-9])
    damaged = feature_shards.find_damaged(lambda name: True)
    assert damaged == {path.name} and not feature_shards.find_damaged(lambda name: False)
    path.write_bytes(whole)  # by a process that had the lock
    feature_shards.delete_damaged(damaged)
    assert feature_shards.locate_features() == {key: (path.name, n) for n, key in enumerate(images)}
    path.write_bytes(whole[:-9])
    feature_shards.delete_damaged(damaged)
    assert not shards(tmp_path)


def test_a_run_that_is_asked_to_stop_does_not_compute_the_rest(plain, tmp_path, monkeypatch):
    real, cache = GracefulStop.is_stop_requested, tmp_path / "cache"
    monkeypatch.setattr(feature_computation, "VIEWS_PER_CHUNK", 4)
    monkeypatch.setattr(
        GracefulStop,
        "is_stop_requested",
        lambda self: setattr(self, "stop_reason", "a test") or True,
    )
    words = [*SHORT, *FROZEN, f"run={tmp_path / 'run'}", f"trainer.feature_cache={cache}"]
    assert main(words) == 130
    assert load_file(shards(cache)[0])["features"].shape == (4, 64, 128)
    monkeypatch.setattr(GracefulStop, "is_stop_requested", real)
    assert main(words) == 0
    assert_same(plain, tmp_path / "run")


def test_features_that_are_damaged_while_training_are_not_used(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store.FeatureShards, "read_features", lambda *_: None)
    run(tmp_path / "run", f"trainer.feature_cache={tmp_path / 'cache'}")
    assert_same(plain, tmp_path / "run")


def test_an_encoder_that_is_trained_keeps_nothing(tmp_path):
    words = [*SHORT, "only=align_448", f"run={tmp_path / 'run'}"]
    assert main([*words, f"trainer.feature_cache={tmp_path / 'cache'}"]) == 0
    assert not (tmp_path / "cache").exists()


def test_another_encoder_has_another_folder(cached):
    from vlbench.model.vision_encoder import build_vision_encoder

    class Model:
        vision = build_vision_encoder("tiny", "embedded")

        @property
        def processor(self):
            return SimpleNamespace(transform=self.vision.transform)

    model = Model()
    before = feature_cache.encoder_fingerprint(model, "cpu 32")
    assert (
        feature_cache.encoder_fingerprint(model, "cpu 32")
        == before
        != feature_cache.encoder_fingerprint(model, "cpu bf16")
    )
    model.vision.set_image_size(112)
    larger = feature_cache.encoder_fingerprint(model, "cpu 32")
    next(model.vision.parameters()).data.flatten()[0] += 1e-3
    assert len({before, larger, feature_cache.encoder_fingerprint(model, "cpu 32")}) == 3


def test_the_same_weights_with_another_activation_have_another_folder(tmp_path):
    """As a file of OpenAI's CLIP for ViT-B-32, and then for ViT-B-32-quickgelu."""
    from vlbench.model.vision_encoder import build_vision_encoder

    folder = Path(shutil.copytree(MINIATURE, tmp_path / "own"))
    file = folder / "open_clip_config.json"

    def fingerprint() -> str:
        vision = build_vision_encoder(str(folder), "embedded")
        processor = SimpleNamespace(transform=vision.transform)
        return feature_cache.encoder_fingerprint(
            SimpleNamespace(vision=vision, processor=processor), "cpu 32"
        )

    before = fingerprint()
    assert fingerprint() == before
    said = json.loads(file.read_text())
    said["model_cfg"]["quick_gelu"] = not said["model_cfg"].get("quick_gelu", False)
    file.write_text(json.dumps(said))
    assert fingerprint() != before


def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        feature_computation.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000),
    )
    words = [*SHORT, *FROZEN, f"run={tmp_path / 'run'}"]
    assert main([*words, f"trainer.feature_cache={tmp_path / 'cache'}"]) == 2
    said = capsys.readouterr().err
    assert "the features of 6 images take 196.6 kB" in said and "1.0 kB left" in said
    assert not shards(tmp_path / "cache")


def test_a_disk_that_fills_up_loses_nothing(plain, tmp_path, monkeypatch, capsys):
    words = [*SHORT, *FROZEN, f"run={tmp_path / 'run'}", f"trainer.feature_cache={tmp_path / 'c'}"]
    monkeypatch.setattr(feature_computation, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_computation, "VIEWS_PER_CHUNK", 2)
    written = []

    def fills_up(tensors, path):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        save_file(tensors, path)

    monkeypatch.setattr(feature_store, "save_file", fills_up)
    assert main(words) == 1
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("vlbench: the disk is full: features cannot be kept")
    assert [load_file(path)["keys"].shape[0] for path in shards(tmp_path / "c")] == [2, 2]
    assert not list((tmp_path / "c").rglob(".*.safetensors*"))
    monkeypatch.setattr(feature_store, "save_file", save_file)
    assert main(words) == 0
    assert_same(plain, tmp_path / "run")


def test_a_broken_image_is_named_as_without_features(tmp_path, capsys):
    from PIL import Image

    records = []
    for number in range(4):
        name = f"{number}.png"
        Image.new("RGB", (40, 30), (60 * number, 0, 0)).save(tmp_path / name)
        turns = [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "red"},
        ]
        records.append({"id": f"r{number}", "image": name, "conversations": turns})
    (tmp_path / "2.png").write_bytes((tmp_path / "2.png").read_bytes()[:60])
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = [f"data.train={tmp_path / 'data.json'}", "data.on_bad_sample=quarantine", "only=chat"]
    run(tmp_path / "run", *words, f"trainer.feature_cache={tmp_path / 'cache'}")
    assert "r2" in (tmp_path / "run" / "quarantine.jsonl").read_text()


def test_features_of_several_blocks_are_kept_and_a_run_with_them_is_resumed(tmp_path, monkeypatch):
    """DeepStack reads four blocks: kept features give the same weights, also across a stop."""
    words = ["connector.name=deepstack", "only=chat"]
    straight = run(tmp_path / "straight", *words)
    real, cache = GracefulStop.is_stop_requested, tmp_path / "cache"
    monkeypatch.setattr(
        GracefulStop,
        "is_stop_requested",
        lambda self: bool(shards(cache)) and (setattr(self, "stop_reason", "a test") or True),
    )
    again = [*SHORT, *FROZEN, *words, f"run={tmp_path / 'run'}", f"trainer.feature_cache={cache}"]
    assert main(again) == 130
    assert load_file(shards(cache)[0])["features"].shape[1:] == (4, 64, 128)
    monkeypatch.setattr(GracefulStop, "is_stop_requested", real)
    resumed = run(tmp_path / "run", *words, f"trainer.feature_cache={cache}")
    assert all(tensor.equal(resumed[name]) for name, tensor in straight.items())


def test_each_view_of_a_grid_has_a_key_and_features_of_its_own(tmp_path):
    image, tiling = make_scene("views", 0, 0), ImageTiling(4)
    keys = {grid: view_keys(tiled(image, tiling, grid)) for grid in ((2, 2), (1, 2), (2, 1))}
    assert [*map(len, keys.values())] == [5, 3, 3] and len(set(chain(*keys.values()))) == 11
    assert view_keys(image) == [content_key(image)] and content_key(image) not in keys[2, 2]
    feature_shards = FeatureShards(tmp_path)
    features = torch.arange(24.0).view(6, 2, 2)
    locations = feature_shards.write_shard([*keys[2, 2], content_key(image)], features)
    images = {tiled(image, tiling, (2, 2)): keys[2, 2], image: view_keys(image)}
    known = {one: [locations[key] for key in of_image] for one, of_image in images.items()}
    store = FeatureStore(feature_shards, known)
    found = store.load_features([image, *images])
    assert found.equal(torch.cat([features[5:], features]))
    assert store.load_features([image, tiled(image, tiling, (1, 2))]) is None


def tiled(image: LazyImage, tiling: ImageTiling, grid: tuple[int, int]) -> TiledImage:
    return TiledImage(image, image.open().size, grid, tiling.list_views(grid))


@pytest.mark.slow
@pytest.mark.parametrize("connector", ["llava_mlp", "flamingo", "deepstack"])
@pytest.mark.parametrize("rule", ["llava_next", "internvl"])
def test_a_run_of_tiled_images_is_the_same_bit_for_bit(connector, rule, tmp_path, capsys):
    words = ["only=chat", f"connector.name={connector}", "stages.chat.image_size=56"]
    words += ["vision.tiling.tiles=4", f"vision.tiling.grid={rule}", "vision.max_visual_tokens=90"]
    plain = run(tmp_path / "plain", *words)
    capsys.readouterr()
    cached = run(tmp_path / "run", *words, f"trainer.feature_cache={tmp_path / 'cache'}")
    assert plain.keys() == cached.keys() and losses(tmp_path / "plain") == losses(tmp_path / "run")
    assert all(plain[name].equal(cached[name]) for name in plain)
    kept = load_file(shards(tmp_path / "cache")[0])["features"]
    assert len(kept) > 9 and f"features of {len(kept)} views of images" in capsys.readouterr().err


def test_sharded_stages_do_without_and_say_so(tmp_path, monkeypatch, capsys):
    """A process with features would not gather the encoder's blocks that another one runs."""
    trainer = TrainerConfig(strategy="fsdp2", devices=2, feature_cache=str(tmp_path / "cache"))
    runner = stage_runner.StageRunner(
        trainer_config=trainer, precision="32", activation_checkpointing="none", seed=0
    )
    monkeypatch.setattr(stage_runner, "is_fsdp_sharded", lambda _: True)
    steps = SimpleNamespace(feature_store=None)
    runner.cache_features(SimpleNamespace(), steps, 0, lambda: False)
    assert steps.feature_store is None and not (tmp_path / "cache").exists()
    assert "trainer.feature_cache is not used: with fsdp2" in capsys.readouterr().err


def test_processes_divide_what_is_missing(monkeypatch):
    """Three have shares of about the same size, which are all of it together."""
    shares = []
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(collectives, "rank", lambda rank=rank: rank)
        shares.append({n for n in range(3000) if feature_cache._is_own_text(f"({n}, 0)")})
    assert set.union(*shares) == set(range(3000)) and sum(map(len, shares)) == 3000
    assert min(map(len, shares)) > 800


def test_features_on_the_disk_of_another_machine_are_computed_here_too(tmp_path, monkeypatch):
    """Two processes that share no disk: the other one's share is missing in this one's folder."""
    images = {make_scene("disks", 0, number): [bytes([number]) * 16] for number in range(6)}
    shards, computed = FeatureShards(tmp_path), []

    def compute(_vlm, missing, *_):
        computed.append(len(missing))
        keys = [key for of_image in missing for key in of_image]
        return shards.write_shard(keys, torch.ones(len(keys), 2, 2)) if keys else {}

    def gather(value):
        if isinstance(value, dict):  # what the other one has computed, in a shard that is not here
            rest = (key for [key] in images.values() if key not in value)
            return [value, {key: ("0.safetensors", row) for row, key in enumerate(rest)}]
        return [value, value]

    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "all_gather_objects", gather)
    monkeypatch.setattr(feature_cache, "compute_features", compute)
    monkeypatch.setattr(feature_cache, "check_disk_space", lambda *_: None)
    cache = feature_cache._SharedCache(None, tmp_path, shards, None, 0, lambda: False)
    assert cache.locate_or_compute(images) == shards.locate_features()
    assert sorted(shards.locate_features()) == sorted(key for [key] in images.values())
    assert computed == [3, 3]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_with_a_cache_have_the_losses_of_those_without(strategy, tmp_path):
    """One of the two has text alone in every step, the other one an image."""
    turns = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is red."}]
    records = [{"id": str(number), "conversations": turns} for number in range(12)]
    for record in records[::2]:
        make_scene("processes", 0, int(record["id"])).open().save(tmp_path / f"{record['id']}.png")
        record["image"] = f"{record['id']}.png"
        record["conversations"] = [{"from": "human", "value": "<image>\nWhat is it?"}, turns[1]]
    (tmp_path / "data.json").write_text(json.dumps(records))
    words = ["recipe=yivl_llava", "only=chat", *FROZEN, *QUIET, TWO, f"trainer.strategy={strategy}"]
    words += [f"data.train={tmp_path / 'data.json'}", f"data.images={tmp_path}", "data.workers=0"]
    words += ["stages.chat.global_batch_size=2", "stages.chat.image_size=56", "stages.chat.steps=6"]
    runs = {"plain": (), "cached": (f"trainer.feature_cache={tmp_path / 'cache'}",)}
    commands = [
        FitCommand((*words, f"run={tmp_path / name}", *more)) for name, more in runs.items()
    ]
    assert run_in_two_processes(commands, seconds=120) == [(0, 0)] * 2
    plain, cached = (read_losses(tmp_path / name) for name in runs)
    assert len(plain) == 6 and cached == pytest.approx(plain, rel=1e-5)
    written = [load_file(path)["keys"].tolist() for path in shards(tmp_path / "cache")]
    keys = [tuple(key) for of_shard in written for key in of_shard]
    # each process has computed its share, and nothing twice
    counts = (2, 6, 6) if strategy == "ddp" else (0, 0, 0)
    assert (len(written), len(keys), len(set(keys))) == counts
