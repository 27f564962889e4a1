"""No code from a checkpoint, a recipe or a data set is executed: a scan of the sources, and traps.

The scan names every call that could execute what a file holds; what is allowed stands in a list
with its reason. The traps are folders whose code leaves a marker where it runs.
"""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_command import run_command
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertForMaskedLM

from vlbench.model.language_model import TINY_LANGUAGE_FOLDER

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "vlbench/connector/registry.py: exec_module": "a connector is the code that its user wrote",
    "vlbench/connector/source_files.py: exec_module": "a kept connector, once it is trusted",
    "tests: loads": "pickles that a test has made itself",
    "tests: __import__": "modules of the tests' own",
    "tests: exec_module": "modules of the tests' own",
    "tests: exec": "the lines of a model card that vlbench has written",
}
UNSAFE_MODULES = ("pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle")
PICKLE_READERS = ("load", "loads", "Unpickler")
SAFE_LOADERS = ("SafeLoader", "BaseLoader", "CSafeLoader")
EXECUTORS = ("eval", "exec", "__import__", "os.system", "os.popen", "torch.hub.load")
YAML_READERS = ("load", "load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all")

OPTIONS = ("trust_remote_code", "weights_only", "allow_pickle", "shell", "Loader")


def unsafe_calls(source: str) -> Iterator[str]:
    """Yield every call in a source that may execute what a file holds, or lacks what forbids it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = dotted_name(node.func)
            options = {
                word.arg: ast.unparse(word.value) for word in node.keywords if word.arg in OPTIONS
            }
            yield from unsafe_names(name)
            yield from unsafe_options(name, options)


def dotted_name(function: ast.expr) -> str:
    """Return the name of what is called, as `torch.hub.load`; `.load` of what is no name."""
    if isinstance(function, ast.Attribute):
        return f"{dotted_name(function.value)}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def unsafe_names(name: str) -> Iterator[str]:
    """Yield a function's name if every call of it is unsafe."""
    owner, _, method = name.rpartition(".")
    if owner in UNSAFE_MODULES and method in PICKLE_READERS:
        yield method
    if owner == "yaml" and method in YAML_READERS:
        yield name
    if name in EXECUTORS or method in ("load_state_dict_from_url", "exec_module"):
        yield method


def unsafe_options(name: str, options: dict[str, str]) -> Iterator[str]:
    """Yield what is wrong with the options of a call."""
    owner, _, method = name.rpartition(".")
    is_auto = owner.rpartition(".")[2].startswith("Auto") and method.startswith("from_")
    wanted = {"trust_remote_code": "False" if is_auto else None}
    wanted["weights_only"] = "True" if name == "torch.load" else None
    for option, value in wanted.items():
        if value and options.get(option) != value:
            yield f"{name} without {option}={value}"
    for option in ("trust_remote_code", "allow_pickle", "shell"):
        if options.get(option, "False") != "False":
            yield f"{name} with {option}"
    if options.get("Loader", "SafeLoader").rpartition(".")[2] not in SAFE_LOADERS:
        yield f"{name} with an unsafe loader"


def test_no_source_executes_what_a_file_holds() -> None:
    folders = ("vlbench", "connectors", "benchmarks", "tests")
    files = [(folder, file) for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    found = {
        f"{folder if folder == 'tests' else file.relative_to(ROOT)}: {call}"
        for folder, file in files
        for call in unsafe_calls(file.read_text(encoding="utf-8"))
    }
    assert len(files) > 200 and not found - ALLOWED.keys(), sorted(found - ALLOWED.keys())


@pytest.mark.parametrize(
    "line",
    [
        "AutoTokenizer.from_pretrained(folder)",
        "transformers.AutoModel.from_pretrained(folder, trust_remote_code=trusted)",
        "LlamaForCausalLM.from_pretrained(folder, trust_remote_code=True)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "pickle.load(file)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.compose(text, Loader=yaml.FullLoader)",
        "np.load(file, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "torch.hub.load(repository, name)",
    ],
)
def test_the_scan_sees_what_it_looks_for(line: str) -> None:
    assert list(unsafe_calls(line))


TRAP = """
from pathlib import Path
Path(__file__).with_name("EXECUTED").write_text("x")
Path({marker!r}).write_text("x")
from transformers import PreTrainedTokenizerFast, LlamaConfig, LlamaForCausalLM
class TrapTokenizer(PreTrainedTokenizerFast): pass
class TrapConfig(LlamaConfig): pass
class TrapModel(LlamaForCausalLM): pass
"""
AUTO_MAP = {
    "AutoConfig": "configuration_x.TrapConfig",
    "AutoTokenizer": ["tokenization_x.TrapTokenizer", "tokenization_x.TrapTokenizer"],
    "AutoProcessor": "processing_x.TrapTokenizer",
    "AutoImageProcessor": "processing_x.TrapTokenizer",
    "AutoModel": "modeling_x.TrapModel",
    "AutoModelForCausalLM": "modeling_x.TrapModel",
}


def set_traps(folder: Path, **tokenizer_keys: object) -> None:
    """Give every JSON file of a folder an `auto_map`, and lay the code that it names."""
    marker = str(folder.parent / "EXECUTED")
    for name in ("tokenization_x", "modeling_x", "configuration_x", "processing_x"):
        (folder / f"{name}.py").write_text(TRAP.format(marker=marker))
    names = ("config.json", "tokenizer_config.json", "processor_config.json", "adapter_config.json")
    for name in (*names, "preprocessor_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.is_file() else {}
        extra = tokenizer_keys if name == "tokenizer_config.json" else {}
        file.write_text(json.dumps({**content, "auto_map": AUTO_MAP, **extra}))


def fast_tokenizer(folder: Path) -> None:
    """Write a small tokenizer.json."""
    words = {word: n for n, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "a"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


def language_with_traps(folder: Path, kind: str) -> list[str]:
    """A language model whose tokenizer is of transformers, of the folder, or unknown."""
    shutil.copytree(TINY_LANGUAGE_FOLDER, folder)
    (folder / "tokenizer.model").unlink()
    fast_tokenizer(folder)
    keys = {"known": {"tokenizer_class": "PreTrainedTokenizerFast"}}
    own = {"tokenizer_class": "TrapTokenizer"}
    set_traps(folder, eos_token="[SEP]", **keys.get(kind, own))
    if kind == "unknown":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "trap"}))
    return ["recipe=yivl_llava", f"language.weights={folder}"]


def bert_with_traps(folder: Path) -> list[str]:
    folder.mkdir()
    BertForMaskedLM(
        BertConfig(
            vocab_size=6,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(folder)
    fast_tokenizer(folder)
    set_traps(folder, tokenizer_class="TrapTokenizer")
    return ["recipe=yivl_blip2", f"connector.text={folder}"]


TRAPS = {
    "a tokenizer of transformers": lambda f: language_with_traps(f, "known"),
    "a tokenizer of the folder": lambda f: language_with_traps(f, "own"),
    "a model of the folder": lambda f: language_with_traps(f, "unknown"),
    "a BERT": bert_with_traps,
}


@pytest.mark.parametrize("name", TRAPS)
def test_code_in_a_folder_is_never_executed(name: str, tmp_path: Path) -> None:
    words = ["fit", *TRAPS[name](tmp_path / "model"), "dry_run=true"]
    outcome = run_command(words, tmp_path, stdin="y\n" * 20, timeout=60)
    assert not list(tmp_path.rglob("EXECUTED")), outcome.words
    assert outcome.stdin_bytes == 0 and "Do you wish" not in outcome.words
    assert outcome.code in (0, 2) and "Traceback" not in outcome.words, outcome.words
    if outcome.code:
        outcome.assert_one_line()
