"""What each verb takes: a dataclass a verb, with type, default and meaning of every key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlbench.command_line.parser import argument

BenchmarkName = Literal["mmmu", "cmmmu"]
ProtocolName = Literal["yi", "official", "lmms", "strict", "raw"]
TemplateName = Literal["auto", "yi_vl", "chatml", "llava_v1"]
DtypeName = Literal["float32", "bf16", "bfloat16", "fp16", "float16"]
ExportFormat = Literal["yi_vl", "hf_llava", "hf_llava_next", "yi_vl_hf", "vlbench"]
BudgetName = Literal["params", "visual_tokens", "flops"]
ListedKind = Literal["recipes", "sizes", "connectors", "encoders", "data"]
MAX_SEED = 2**32 - 1
BENCHMARK_SEED = 42  # of the benchmarks' own code
MODEL_HELP = "a run, a checkpoint, or a released model (a folder or a hub id)"
TEMPLATE_HELP = "chat template; by default the one that the model was trained with"
DTYPE_HELP = "type of the weights; by default as stored, on a CPU float32 where that is small"
DEVICE_HELP = "cpu, cuda, cuda:1, ...; by default the GPU if there is one"
TRUST_HELP = "run the code of a connector that came with somebody else's folder"
COMPILED_HELP = "compile the decoding step: for many or long answers on a GPU"


def model_argument() -> str:
    """Declare `model=`, the model that a verb reads."""
    name: str = argument(
        MODEL_HELP,
        metavar="PATH",
        is_path=True,
        other_names=("run", "path", "checkpoint", "pretrained"),
    )
    return name


def out_argument(help: str, default: Any = None, metavar: str = "DIR") -> Any:
    """Declare `out=`, where a verb writes; it may be left out."""
    return argument(help, default, metavar=metavar, is_path=True, other_names=("to", "output"))


def new_folder_argument() -> str:
    """Declare `out=`, the folder that a verb makes; it must be given."""
    name: str = argument(
        "a new folder", metavar="DIR", is_path=True, other_names=("to", "output", "folder")
    )
    return name


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """`eval`: a model answers its own questions, those of a file, or a benchmark."""

    verb: ClassVar[str] = "eval"

    model: str = model_argument()
    task: str | None = argument(
        "one or several of mmmu, cmmmu, own (the run's questions), llava_json (those of data=), "
        "FILE.json; by default llava_json with data=, else own; task.NAME.KEY=VALUE is for one of "
        "several",
        None,
        metavar="TASK[,TASK ...]",
        other_names=("tasks", "benchmark"),
    )
    data: str | None = argument(
        "the file of llava_json, or a benchmark's folder, file or hub id", None, is_path=True
    )
    images: str | None = argument(
        "folder of the images of llava_json; by default beside the file",
        None,
        metavar="FOLDER",
        is_path=True,
    )
    allow_outside: bool = argument(
        "read images that lie outside of the folder images=", False, metavar="true"
    )
    split: str | None = argument("split of a benchmark; by default val", None)
    subjects: str | None = argument(
        "subjects of a benchmark, A,B,...; by default all", None, metavar="A,B"
    )
    protocol: ProtocolName | None = argument(
        "prompts and scorer of a benchmark; by default yi", None
    )
    seed: int | None = argument(
        "of a benchmark's random choices for unreadable answers; by default 42",
        None,
        metavar="N",
        low=0,
        high=MAX_SEED,
    )
    limit: int | None = argument(
        "number of questions, taken evenly from all of them; by default all",
        None,
        metavar="N",
        low=1,
        high=10**9,
    )
    blank: bool = argument("ask again with blank images", False, metavar="true")
    batch: int = argument("questions answered at once", 16, metavar="N", low=1, high=4096)
    template: TemplateName | None = argument(TEMPLATE_HELP, None, metavar="NAME")
    trust_connector: bool = argument(TRUST_HELP, False, metavar="true")
    dtype: DtypeName | None = argument(DTYPE_HELP, None, metavar="NAME")
    device: str | None = argument(DEVICE_HELP, None, metavar="NAME")
    compiled: bool = argument(COMPILED_HELP, False, metavar="true")
    out: str | None = out_argument(
        "folder of answers and scores; by default RUN/eval/CHECKPOINT/TASK, or evals/MODEL/TASK"
    )


@dataclass(frozen=True, kw_only=True)
class ScoreArguments:
    """`score`: what a file of answers to a benchmark is worth."""

    verb: ClassVar[str] = "score"

    task: BenchmarkName = argument("the benchmark", metavar="mmmu|cmmmu")
    answers: str = argument("JSON or JSON lines of answers", metavar="FILE", is_path=True)
    protocol: ProtocolName = argument("whose scorer", metavar="NAME")
    data: str | None = argument(
        "the questions of a file that holds ids alone: a folder, file or hub id",
        None,
        metavar="DIR|FILE.json",
        is_path=True,
    )
    split: str | None = argument("split of data=; by default val", None)
    seed: int = argument(
        "of the random choices for unreadable answers",
        BENCHMARK_SEED,
        metavar="N",
        low=0,
        high=MAX_SEED,
    )
    out: str | None = out_argument("folder of the scores; by default FILE.scores beside the file")


@dataclass(frozen=True, kw_only=True)
class ChatArguments:
    """`chat`: ask a model one question, or talk to it."""

    verb: ClassVar[str] = "chat"

    model: str = model_argument()
    image: tuple[str, ...] = argument(
        "file or URL of an image for the first question",
        (),
        metavar="FILE",
        other_names=("images", "picture"),
    )
    question: str | None = argument(
        "one question; by default questions are read from standard input", None, metavar="TEXT"
    )
    max_new_tokens: int = argument(
        "the most tokens of an answer", 512, metavar="N", low=1, high=100_000
    )
    temperature: float = argument(
        "0: the likeliest token (greedy); above: sampling", 0.0, metavar="T", low=0, high=10
    )
    top_p: float = argument(
        "sample from the likeliest tokens that together have this probability",
        1.0,
        metavar="P",
        low=0,
        high=1,
    )
    seed: int = argument("of the sampling", 0, metavar="N", low=0, high=MAX_SEED)
    template: TemplateName | None = argument(TEMPLATE_HELP, None, metavar="NAME")
    trust_connector: bool = argument(TRUST_HELP, False, metavar="true")
    dtype: DtypeName | None = argument(DTYPE_HELP, None, metavar="NAME")
    device: str | None = argument(DEVICE_HELP, None, metavar="NAME")
    compiled: bool = argument(
        f"{COMPILED_HELP}; the conversation is then read anew for each answer",
        False,
        metavar="true",
    )


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """`serve`: models answer over HTTP, as OpenAI's API does."""

    verb: ClassVar[str] = "serve"

    model: str = argument(
        f"{MODEL_HELP}; or several",
        metavar="PATH[,PATH]",
        is_path=True,
        other_names=("run", "path", "checkpoint", "models"),
    )
    host: str = argument(
        "address to listen on; any but loopback's needs a key", "127.0.0.1", metavar="ADDRESS"
    )
    port: int = argument("0: any that is free", 8000, metavar="N", low=0, high=65535)
    api_key: str | None = argument(
        "what clients must send; better in the environment variable VLBENCH_API_KEY, as others see "
        "command lines",
        None,
        metavar="KEY",
    )
    max_rows: int = argument(
        "requests of a model that are answered at once", 32, metavar="N", low=1, high=4096
    )
    max_waiting: int = argument(
        "requests of a model that wait; further ones are told to come back (429)",
        64,
        metavar="N",
        low=1,
        high=100_000,
    )
    votes: str | None = argument(
        "file to which votes on answers side by side are added, for `report`; by default there are "
        "none",
        None,
        metavar="FILE.jsonl",
        is_path=True,
    )
    max_images: int = argument("images of a request", 8, metavar="N", low=0, high=1000)
    allow_urls: str | None = argument(
        "hosts whose image URLs are downloaded; by default none, and images come as data: URLs",
        None,
        metavar="HOST[,HOST]",
        other_names=("urls",),
    )
    allow_hosts: str | None = argument(
        "names of this server beside localhost, as of a proxy before it",
        None,
        metavar="HOST[,HOST]",
    )
    template: TemplateName | None = argument(TEMPLATE_HELP, None, metavar="NAME")
    trust_connector: bool = argument(TRUST_HELP, False, metavar="true")
    dtype: DtypeName | None = argument(DTYPE_HELP, None, metavar="NAME")
    device: str | None = argument(DEVICE_HELP, None, metavar="NAME")
    compiled: bool = argument(
        f"{COMPILED_HELP}; the server starts when it is compiled", False, metavar="true"
    )


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """`export`: write a model in a layout that others load."""

    verb: ClassVar[str] = "export"

    model: str = model_argument()
    out: str = new_folder_argument()
    format: ExportFormat = argument(
        "the released layout of Yi-VL, that of transformers' LLaVA or LLaVA-NeXT, or a checkpoint",
        metavar="NAME",
        other_names=("layout",),
    )
    dtype: DtypeName | None = argument("type of the weights; by default as stored", None)
    merge_lora: bool = argument("merge LoRA adapters into the weights", False, metavar="true")
    template: TemplateName | None = argument(TEMPLATE_HELP, None, metavar="NAME")
    trust_connector: bool = argument(TRUST_HELP, False, metavar="true")


@dataclass(frozen=True, kw_only=True)
class CheckArguments:
    """`check`: faults and lengths of all data of a recipe."""

    verb: ClassVar[str] = "check"

    out: str | None = out_argument("folder of the report; by default checks/RECIPE-SIZE")


DEFAULT_GPU = "A800"  # Yi-VL was trained on it
DEFAULT_MFU = 0.4
"""Model FLOPs utilisation, without recomputed FLOPs: Llama 3 reached 0.38 to 0.43 on 8,192 to
16,384 H100 (arXiv:2407.21783, table 4)."""


@dataclass(frozen=True, kw_only=True)
class PlanArguments:
    """`plan`: memory, time and money that a training takes."""

    verb: ClassVar[str] = "plan"

    gpu: str = argument("the GPU: a known name, or one of gpus=", DEFAULT_GPU, metavar="NAME")
    gpus: str | None = argument(
        "YAML file of further GPUs", None, metavar="FILE.yaml", is_path=True
    )
    mfu: float = argument(
        "share of the GPU's peak FLOPs that training reaches", DEFAULT_MFU, low=0.001, high=1
    )
    price: float | None = argument(
        "of a GPU hour in US dollars; by default that of the GPU's entry",
        None,
        metavar="DOLLARS",
        low=0,
        high=1e6,
    )
    samples: str | None = argument(
        "number of samples of the data, or one for each stage; by default counted, or Yi-VL's",
        None,
        metavar="N[,N ...]",
    )
    text_tokens: str | None = argument(
        "text tokens of a sample, or one for each stage; by default measured, or assumed",
        None,
        metavar="N[,N ...]",
    )
    probe: bool = argument("also run one step of every stage here", False, metavar="true")


@dataclass(frozen=True, kw_only=True)
class GraftArguments:
    """`graft`: whether three parts fit, and the recipe that trains them."""

    verb: ClassVar[str] = "graft"

    vision: str = argument(
        "the vision encoder: a name that `list encoders` shows, or a folder",
        metavar="NAME",
        is_path=True,
    )
    language: str = argument(
        "the language model: tiny, yi-6b, yi-34b, a folder or a hub id",
        metavar="NAME",
        is_path=True,
    )
    connector: str = argument(
        "the connector: a name that `list connectors` shows; its options are typed "
        "connector.OPTION=VALUE",
        metavar="NAME",
    )
    gpu: str | None = argument(
        "the GPU whose memory is told; by default the one of this machine, or A800",
        None,
        metavar="NAME",
    )
    out: str | None = out_argument(
        "the recipe to be written, a new file; by default recipes/graft-N.yaml", metavar="FILE.yaml"
    )
    try_: bool = argument(
        "train it for some minutes on rendered scenes, and say whether it sees",
        False,
        metavar="true",
    )


@dataclass(frozen=True, kw_only=True)
class PackArguments:
    """`pack`: write a data set as shards."""

    verb: ClassVar[str] = "pack"

    data: str = argument(
        "JSON, JSONL, CSV, TSV or Parquet; a folder or data set of the hub with Parquet files; "
        "NAME:FOLDER (`list data`)",
        metavar="DATA",
        is_path=True,
    )
    images: str | None = argument(
        "folder of the images; by default beside the file", None, metavar="FOLDER", is_path=True
    )
    out: str = new_folder_argument()
    samples: int = argument(
        "samples of a shard; 10,000 take about a gigabyte at 448 pixels",
        10_000,
        metavar="N",
        low=1,
        high=10**7,
    )
    allow_outside: bool = argument(
        "read images that lie outside of the folder images=", False, metavar="true"
    )


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """`list`: what recipes can name."""

    verb: ClassVar[str] = "list"

    kinds: tuple[ListedKind, ...] = argument(
        "what to list; by default all, with few of the vision encoders",
        (),
        metavar="KIND",
        is_positional=True,
    )
    size: str | None = argument(
        "with `list connectors`: what each costs at this size", None, metavar="NAME"
    )


@dataclass(frozen=True, kw_only=True)
class ConnectorTestArguments:
    """`test-connector`: the contract, checked on one connector."""

    verb: ClassVar[str] = "test-connector"

    words: tuple[str, ...] = argument(
        "a name that `list connectors` shows or a file that ends in .py; its options, where the "
        "defaults are too large for a small model, are typed connector.OPTION=VALUE",
        metavar="NAME|FILE",
        is_path=True,
        is_positional=True,
    )
