"""The memory of the machine that a language model takes while it is loaded, told beforehand.

Every process loads it as float32 into the memory of the machine before it goes to a GPU: 34 billion
weights take 138 GB. Only fsdp2 leaves weights in their files. Linux ends a process that finds no
memory, without a word of its own.
"""

from __future__ import annotations

from vlbench.config.model_schema import ModelConfig
from vlbench.distributed.machine_limits import free_host_memory
from vlbench.model.language_model import build_empty_language
from vlbench.train.run_report import format_bytes
from vlbench.train.shape_checks import meta_encoder_and_config

LOADED_BYTES = 4  # of a weight


def describe_small_memory(config: ModelConfig, process_count: int) -> str:
    """Return a line if `process_count` processes of this machine need more than is free, else "".

    Those of the embedded language model are not counted: they take some megabytes.
    """
    if config.language.weights == "embedded" and not config.init:
        return ""
    _, language_config = meta_encoder_and_config(config)
    weights = sum(
        parameter.numel() for parameter in build_empty_language(language_config).parameters()
    )
    needed, free = LOADED_BYTES * weights, free_host_memory()
    if needed * process_count <= free:
        return ""
    each = f" for each of {process_count} processes" if process_count > 1 else ""
    return (
        f"caution: loading the language model takes {format_bytes(needed)} of this machine's "
        f"memory{each}, and {format_bytes(free)} are free. If the run ends with 'Killed' now, that "
        "is why: take a machine with more memory, or several GPUs with trainer.strategy=fsdp2, "
        "which leaves the weights in their files"
    )
