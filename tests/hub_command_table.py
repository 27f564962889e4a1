"""The table of commands: how each is told, how a test types it, what is fetched, what is compared.

What differs from the command as it is told is what it stands for (`FILE.json`, `SHARDS`), and how
much is trained: encoders have two blocks, language models are narrow, stages are short, and as many
processes run as a test can have.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from hub.server import FakeHub
from hub.weight_comparison import (
    assert_language_model,
    assert_same_state,
    assert_vision_encoder,
    load_tensors,
)

import vlbench
from vlbench.__main__ import main
from vlbench.evaluate.tasks.benchmark_types import MMMU_SUBJECTS
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.weight_origin import read_origins

YI, YI_34B, YI_VL = "01-ai/Yi-6B-Chat", "01-ai/Yi-34B-Chat", "01-ai/Yi-VL-6B"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
ENCODER = {VIT_H: ("open_clip_model.safetensors",)}
ALL = ("*",)
"""Every file of a repository but what people alone read."""
CHAT, CHAT_34B = {YI: ALL}, {YI_34B: ALL}
SMALL = (
    *("config.json", "generation_config.json"),
    *("tokenizer.model", "tokenizer_config.json"),
)
STAGES = ("align_224", "align_448", "chat")
QUIET = "data.workers=0 log.questions=1 log.examples=0 log.tensorboard=false"
SHORT = " ".join([QUIET, *(f"stages.{name}.global_batch_size=2" for name in STAGES)])
LOW = " ".join(f"stages.{name}.image_size=224" for name in STAGES)
ONE_STEP = " ".join([SHORT, *(f"stages.{name}.steps=1" for name in STAGES)])
UNTRAINED = " ".join([SHORT, *(f"stages.{name}.steps=0" for name in STAGES)])
TINY = " ".join([QUIET, *(f"stages.{name}.steps=0" for name in STAGES)])
FIT = "python -m vlbench fit recipe=yivl_llava size=6b"
DATA = "data.train=FILE.json data.images=FOLDER"


@dataclass
class CommandFolder:
    """Where a command is typed: a folder with the data of a user, and the hub."""

    folder: Path
    hub: FakeHub
    output: str = ""
    """What the command has printed."""

    def check_parts(self, vlm: LoadedVLM, name: str = YI) -> None:
        """Assert that encoder and language model are those of the hub."""
        assert_vision_encoder(vlm.vision.visual, self.hub[VIT_H].files[ENCODER[VIT_H][0]].path)
        assert_language_model(vlm.language, self.hub[name].folder)

    def check_run(self, run: str, name: str = YI) -> None:
        """Assert that an untrained run holds the encoder and the language model of the hub."""
        self.check_parts(vlbench.load(self.folder / run), name)

    def check_origins(self, run: str) -> None:
        """Assert that a trained run says what it began with, and that this is what the hub has."""
        origins = read_origins(self.folder / run / "versions.json", "weights")
        told = [origins["vision"].source, origins["language"].source]
        assert told == ["laion2b_s32b_b79k", YI]
        for part in ("vision", "language"):
            assert f"{part} {origins[part]}" in self.output
        assert main([*f"{FIT} {DATA} {UNTRAINED} run=untrained".split()[3:]]) == 0
        assert read_origins(Path("untrained/versions.json"), "weights") == origins
        self.check_run("untrained")
        assert (self.folder / run / "results.json").is_file()


def compare_nothing(desk: CommandFolder) -> None:
    """Compare nothing: the command reads no weights."""


def check_trained(desk: CommandFolder) -> None:
    desk.check_origins("run")
    answered = vlbench.load("run").chat([{"role": "user", "content": "Hello"}], max_new_tokens=2)
    assert isinstance(answered, str)


def check_untrained(run: str, name: str = YI) -> Callable[[CommandFolder], None]:
    return lambda desk: desk.check_run(run, name)


def check_output(*words: str) -> Callable[[CommandFolder], None]:
    """Return what finds words in the output."""

    def find_words(desk: CommandFolder) -> None:
        for word in words:
            assert word in desk.output, desk.output[-2000:]

    return find_words


def compare_with_yi_vl(desk: CommandFolder) -> None:
    """Compare a run that began as Yi-VL, and was not trained, with Yi-VL."""
    ours, theirs = vlbench.load("mine"), vlbench.load(desk.hub[YI_VL].folder)
    ours.set_image_size(theirs.vision.image_size)
    for part in ("language", "connector"):
        same = dict(getattr(theirs, part).state_dict())
        assert_same_state(getattr(ours, part).state_dict(), same)


def compare_export(desk: CommandFolder) -> None:
    """Compare an export with the release that the run began with."""
    stored = load_tensors(sorted(Path("Yi-VL-mine").glob("model*.safetensors")))
    theirs = load_tensors(sorted(desk.hub[YI_VL].folder.glob("model*.safetensors")))
    assert_same_state(stored, {name: theirs[name] for name in stored})
    assert {"lm_head.weight", "model.mm_projector.4.bias"} <= stored.keys()


def compare_reference(
    run: str, file: str, ours: str, theirs: str
) -> Callable[[CommandFolder], None]:
    """Return what compares one tensor of a connector with that of a file."""

    def compare_tensor(desk: CommandFolder) -> None:
        stored = torch.load(file, weights_only=True)
        own = vlbench.load(run).connector.state_dict()
        assert torch.equal(own[ours], stored.get("model", stored)[theirs].float())

    return compare_tensor


def check_task_scores(*tasks: str) -> Callable[[CommandFolder], None]:
    """Return what looks for the scores of tasks, one question of each subject at least."""

    def find_scores(desk: CommandFolder) -> None:
        for task in tasks:
            (file,) = Path(desk.folder, "RUN").glob(f"eval/*/{task}-val-yi/scores.json")
            scores = json.loads(file.read_text())
            assert scores["n"] and scores["revision"].startswith(("hub ", "sha256 "))
            assert scores["n"] + scores["skipped"] == scores["questions"]

    return find_scores


@dataclass(frozen=True)
class HubCommand:
    """A command: as it is told, what is typed after it here, what is fetched and compared."""

    documented_command: str
    extra_words: str
    fetched_files: dict[str, tuple[str, ...]]
    compare: Callable[[CommandFolder], None]
    prerequisite: str = ""
    """What has to be made before."""
    slow: bool = False

    @property
    def typed_command(self) -> str:
        """The command as a test types it."""
        typed = self.documented_command
        if " plan " not in typed:
            for told, here in HERE.items():
                typed = typed.replace(told, here)
        return f"{typed} {self.extra_words}".strip()


HERE = {
    "/data/shards": "SHARDS",
    "--nodes=16 ": "",
    "--nnodes=16": "--nnodes=1",
    "--nproc-per-node=8": "--nproc-per-node=2",
    "HOST:29500": "127.0.0.1:0",
    "trainer.devices=8": "trainer.devices=2",
    "trainer.num_nodes=16": "trainer.num_nodes=1",
}
"""What stands for what in a command that is typed here."""
VIT = "python -m vlbench show recipe=yivl_llava size=6b vision.name=EVA02-L-14-336"
SLURM = "docs/slurm.sh recipe=yivl_llava"
RUN_34B = "run=runs/34b"
FSDP2 = "trainer.strategy=fsdp2"
TORCHRUN = (
    "torchrun --nnodes=16 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 "
    "-m vlbench fit recipe=yivl_llava"
)
ROWS_6B = (
    HubCommand(f"{FIT} {DATA}", f"run=run {ONE_STEP} {LOW}", ENCODER | CHAT, check_trained),
    HubCommand(
        f"{FIT} data.train=/data/shards run=runs/6b",
        UNTRAINED,
        ENCODER | CHAT,
        check_untrained("runs/6b"),
        "SHARDS",
    ),
    HubCommand(
        f"{FIT} data.train=SHARDS dry_run=true",
        SHORT,
        ENCODER | CHAT,
        check_output("align_224", "align_448", "chat"),
        "SHARDS",
        slow=True,
    ),
    HubCommand(
        f"{FIT} data.train=SHARDS trainer.devices=8 {FSDP2}",
        f"run=two {UNTRAINED}",
        ENCODER | CHAT,
        check_untrained("two"),
        "SHARDS",
        slow=True,
    ),
    HubCommand(
        f"{FIT} data.train=/data/shards trainer.devices=8 {FSDP2} run=runs/6b",
        ONE_STEP,
        ENCODER | CHAT,
        lambda desk: desk.check_origins("runs/6b"),
        "SHARDS",
        slow=True,
    ),
    HubCommand(
        f"sbatch {SLURM} size=6b data.train=/data/shards run=runs/llava-6b",
        UNTRAINED,
        ENCODER | CHAT,
        check_untrained("runs/llava-6b"),
        "SHARDS",
        slow=True,
    ),
    HubCommand(
        "python -m vlbench compare recipe=yivl_llava,yivl_qformer,yivl_flamingo,yivl_eva size=6b "
        "match=params match_limit=8 data.train=FILE.json",
        f"data.images=FOLDER jobs=1 dry_run=true {SHORT} {LOW}",
        ENCODER | CHAT,
        check_output("yivl_llava", "yivl_qformer", "yivl_flamingo", "yivl_eva"),
        slow=True,
    ),
    HubCommand(
        f"python -m vlbench check recipe=yivl_llava size=6b {DATA}",
        "",
        {YI: SMALL},
        check_output("FILE.json"),
    ),
    HubCommand(
        "python -m vlbench show recipe=yivl_llava size=6b",
        "",
        {},
        check_output("laion2b_s32b_b79k", YI),
    ),
    HubCommand(
        f"{VIT} vision.weights=merged2b_s6b_b61k",
        "",
        {},
        check_output("EVA02-L-14-336", "merged2b"),
    ),
    HubCommand(
        "python -m vlbench show recipe=yivl_blip2 size=6b connector.text=bert-base-uncased",
        "",
        {},
        check_output("bert-base-uncased"),
    ),
    HubCommand(
        "python -m vlbench list connectors size=6b",
        "",
        {},
        check_output("22,044,672", "107,134,976"),
    ),
)
ROWS_34B = (
    *(
        HubCommand(
            told, UNTRAINED, ENCODER | CHAT_34B, check_untrained(run, YI_34B), "SHARDS", slow=True
        )
        for told, run in (
            (f"sbatch --nodes=16 {SLURM} size=34b {FSDP2} data.train=/data/shards", "runs/job-7"),
            (
                f"sbatch --nodes=16 {SLURM} size=34b data.train=SHARDS {FSDP2} {RUN_34B}",
                "runs/34b",
            ),
            (
                f"sbatch --nodes=16 {SLURM} size=34b {FSDP2} {RUN_34B} data.train=/data/shards",
                "runs/34b",
            ),
            (
                f"{TORCHRUN} size=34b data.train=/data/shards {FSDP2} trainer.devices=8 "
                f"trainer.num_nodes=16 {RUN_34B}",
                "runs/34b",
            ),
        )
    ),
    HubCommand(
        "python -m vlbench plan recipe=yivl_llava size=34b trainer.devices=8 "
        "trainer.num_nodes=16 gpu=a800",
        "",
        {},
        check_output("fsdp2"),
        slow=True,
    ),
)
ROWS_YI_VL = (
    HubCommand(
        'vlbench.load("01-ai/Yi-VL-6B")',
        "",
        {YI_VL: ALL},
        lambda desk: assert_language_model(vlbench.load(YI_VL).language, desk.hub[YI_VL].folder),
    ),
    HubCommand(
        f"{FIT} init=01-ai/Yi-VL-6B only=chat {DATA} run=mine",
        UNTRAINED,
        {YI_VL: ALL},
        compare_with_yi_vl,
    ),
    HubCommand(
        "python -m vlbench export model=mine out=Yi-VL-mine format=yi_vl",
        "",
        {},
        compare_export,
        "mine",
    ),
)
VALIDATION = tuple(f"{name}/validation-00000-of-00001.parquet" for name in MMMU_SUBJECTS)
CATEGORIES = (
    *("art_and_design", "business", "health_and_medicine", "humanities_and_social_sciences"),
    *("science", "technology_and_engineering"),
)
EXAMS = {
    "MMMU/MMMU": VALIDATION,
    "m-a-p/CMMMU": tuple(f"{name}/val-00000-of-00001.parquet" for name in CATEGORIES),
}
ROWS_EXAMS = (
    HubCommand(
        "python -m vlbench eval model=RUN task=mmmu data=DIR split=val protocol=yi",
        "limit=3",
        {},
        check_task_scores("mmmu"),
        "RUN DIR",
    ),
    HubCommand(
        "python -m vlbench eval model=RUN task=mmmu,cmmmu limit=100 blank=true",
        "",
        EXAMS,
        check_task_scores("mmmu", "cmmmu"),
        "RUN",
    ),
)
ROWS_REFERENCES = (
    HubCommand(
        "python -m vlbench fit recipe=yivl_qformer init=blip2.pth",
        f"run=q {TINY}",
        {},
        compare_reference(
            *("q", "blip2.pth", "qformer.encoder.layer.0.attention.attention.query.weight"),
            "Qformer.bert.encoder.layer.0.attention.self.query.weight",
        ),
        "blip2.pth",
    ),
    HubCommand(
        "python -m vlbench fit recipe=yivl_flamingo init=openflamingo.pt vision.layer=-1",
        f"run=f {TINY}",
        {},
        compare_reference(
            *("f", "openflamingo.pt", "blocks.3.attn.to_kv.weight"),
            "lang_encoder.transformer.blocks.3.gated_cross_attn_layer.attn.to_kv.weight",
        ),
        "openflamingo.pt",
    ),
    HubCommand(
        "python -m vlbench fit recipe=yivl_llava connector.norm=false init=mm_projector.bin",
        f"run=l {TINY}",
        {},
        compare_reference(
            "l", "mm_projector.bin", "layers.2.weight", "model.mm_projector.2.weight"
        ),
        "mm_projector.bin",
    ),
)
ROWS = (*ROWS_6B, *ROWS_34B, *ROWS_YI_VL, *ROWS_EXAMS, *ROWS_REFERENCES)
ELSEWHERE = {
    "lmms-eval eval --model vlbench --model_args model=RUN --tasks mmmu_val --batch_size 16": (
        "tests/test_lmms.py runs it where lmms-eval is installed"
    ),
    f"{FIT} vision.aspect=native vision.name=timm/naflexvit_so400m_patch16_siglip.v2_webli": (
        "tests/test_encoder_families.py loads a NaFlexViT by its name on the hub, and "
        "tests/test_native_training.py trains one"
    ),
}
"""Commands that another test runs."""
