"""Private parts of torch: slots and hooks of modules, operations by name, compiler, data loader.

Checked with torch 2.14; 2.11 is the oldest that vlbench allows.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import shutil
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.flop_counter import FlopCounterMode

COMPILER_NEEDS = "On a CPU a C++ compiler is needed, on a GPU Triton and a C compiler (gcc)"
SIGCHLD_MODULE = "torch.utils.data._utils.signal_handling"
MATMUL_OPERATIONS = ("mm", "addmm", "bmm", "baddbmm")
ATTENTION_OPERATIONS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
VARLEN_OPERATION = "_varlen_attn"
C_COMPILERS = ("gcc", "clang")
NO_C_COMPILER = "Failed to find C compiler"


def parameter_slots(module: nn.Module) -> dict[str, nn.Parameter | Tensor | None]:
    """Return the live dict of a module's own parameters, `nn.Module._parameters`.

    A plain tensor may be put there for a while, which `setattr` refuses. If the attribute goes,
    frozen weights kept in bfloat16 and the planner's simulated step break.
    """
    return module._parameters  # type: ignore[return-value]


def buffer_slots(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the live dict of a module's own buffers, `nn.Module._buffers`.

    If the attribute goes, the planner's simulated step breaks.
    """
    return module._buffers


def has_forward_hooks(module: nn.Module) -> bool:
    """Tell whether a module has forward hooks: `_forward_pre_hooks` and `_forward_hooks`.

    If the attributes go, compiled decoding steps cannot tell which blocks must run eagerly.
    """
    return bool(module._forward_pre_hooks or module._forward_hooks)


def copy_module_attributes(
    source: nn.Module, target: nn.Module, rebind: Callable[[Any], Any]
) -> None:
    """Give `target`, made without `__init__`, the attributes of `source`, each through `rebind`.

    It relies on `nn.Module` keeping children in `_modules` and hooks in dicts whose names contain
    `_hooks`. If that changes, copies in evaluation mode run the original's children or hooks.
    """
    copied = vars(target)
    copied.update({name: rebind(value) for name, value in vars(source).items()})
    copied["_modules"] = {name: rebind(child) for name, child in source._modules.items()}
    for name in copied:
        if "_hooks" in name and isinstance(copied[name], dict):
            hooks = copied[name]
            copied[name] = type(hooks)((key, rebind(hook)) for key, hook in hooks.items())


def scale_in_place(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiply all tensors by `factor` in a few kernels: `torch._foreach_mul_`.

    torch clips gradients with it. If it goes, clipping with several groups of parameters breaks.
    """
    import torch

    torch._foreach_mul_(list(tensors), factor)


def is_compiler_error(error: BaseException) -> bool:
    """Tell whether `error` was raised by `torch.compile`: by the module of its class, or its text.

    Triton compiles what launches a kernel when that is first launched, and raises a RuntimeError
    where it finds no C compiler. If `torch._dynamo` or `torch._inductor` are renamed, a missing C++
    compiler ends in a stack trace instead of one line.
    """
    is_of_compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return is_of_compiler or NO_C_COMPILER in str(error)


def missing_gpu_compiler() -> str:
    """Return what torch.compile lacks for a GPU, in a few words, "" where it lacks nothing.

    That is Triton (`torch.utils._triton.has_triton`), and what Triton compiles the launchers of
    kernels with, as `triton.runtime.build` looks for it: images of containers often have no C
    compiler. If `has_triton` goes, runs on a GPU are compiled only when they are told to be.
    """
    try:
        from torch.utils._triton import has_triton
    except ImportError:
        return "torch finds no Triton for this GPU"
    if not has_triton():
        return "torch finds no Triton for this GPU"
    if not os.environ.get("CC") and not any(map(shutil.which, C_COMPILERS)):
        return "Triton finds no C compiler: install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Triton finds no Python.h: install python3-dev"
    return ""


def compiler_settings(**settings: Any) -> AbstractContextManager[object]:
    """Return a context in which `torch._dynamo.config` has other values.

    Contexts of several threads may overlap. `recompile_limit` and `optimize_ddp` are used. An
    unknown name raises an AttributeError.
    """
    from torch import _dynamo  # its import takes a second

    if has_settings_by_thread(_dynamo.config):
        return _dynamo.config.patch(**settings)  # type: ignore[no-any-return]
    return _PROCESS_SETTINGS.change(_dynamo.config, settings)


def has_settings_by_thread(config: Any) -> bool:
    """Tell whether what one thread changes in `torch._dynamo.config` is changed for it alone.

    In torch 2.11 it is not, in 2.14 it is: `user_override` of a setting is a `ContextVar` there.
    If the attributes go, the settings may stay changed after threads that compiled at once.
    """
    return isinstance(config._config["recompile_limit"].user_override, ContextVar)


class ProcessSettings:
    """Attributes of one object that overlapping threads change for a while.

    An attribute has the value that was asked for last by those who have not left. The first of
    them notes what was there, which is put back when the last of them leaves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._before: dict[str, Any] = {}
        self._asked: dict[str, list[tuple[object, Any]]] = {}

    @contextmanager
    def change(self, target: Any, settings: dict[str, Any]) -> Iterator[None]:
        """Give attributes of `target` other values, unless one is missing: AttributeError."""
        request = object()
        with self._lock:
            found = {name: getattr(target, name) for name in settings}
            for name, value in settings.items():
                self._before.setdefault(name, found[name])
                self._asked.setdefault(name, []).append((request, value))
                setattr(target, name, value)
        try:
            yield
        finally:
            with self._lock:
                for name in settings:
                    self._withdraw(target, name, request)

    def _withdraw(self, target: Any, name: str, request: object) -> None:
        others = [one for one in self._asked[name] if one[0] is not request]
        self._asked[name] = others
        setattr(target, name, others[-1][1] if others else self._before.pop(name))


_PROCESS_SETTINGS = ProcessSettings()  # of torch._dynamo.config, where threads share it


_VARLEN_ATTENTION: dict[bool, Callable[..., Tensor] | None] = {}
"""What `find_varlen_attention` has found, by `causal`."""


def find_varlen_attention(causal: bool = True) -> Callable[..., Tensor] | None:
    """Return `torch.nn.attention.varlen.varlen_attn` with grouped heads, None without one.

    The names of its options differ between versions of torch: `is_causal` or `window_size`, and
    `enable_gqa` in some. With neither of the first two, packed rows take one call per sample.

    It is called in compiled code, where `functools.cache` would be passed over, with a warning.
    """
    if causal not in _VARLEN_ATTENTION:
        _VARLEN_ATTENTION[causal] = _load_varlen_attention(causal)
    return _VARLEN_ATTENTION[causal]


def _load_varlen_attention(causal: bool) -> Callable[..., Tensor] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    options = inspect.signature(varlen_attn).parameters
    attend = with_grouped_heads(varlen_attn, "enable_gqa" in options)
    if "window_size" in options and causal:
        return functools.partial(attend, window_size=(-1, 0))
    if "window_size" in options:
        return functools.partial(_attend_to_all, attend)
    if "is_causal" in options:
        return functools.partial(attend, is_causal=causal)
    return None


def _attend_to_all(attend: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """Call `varlen_attn`, each position attending to all of its segment, by flash attention.

    Without a window torch 2.14 takes cuDNN's kernel on Hopper and Blackwell, whose plan it builds
    again at every call: 42 ms each way (pytorch/pytorch#191576). Flash attention
    takes a window as long as the longest segment for none.
    """
    import torch

    longest = max(args[5:7])
    window = (-1, -1) if torch.version.hip else (longest, longest)
    return attend(*args, window_size=window, **options)


def with_grouped_heads(attend: Callable[..., Any], supports_gqa: bool) -> Callable[..., Tensor]:
    """Return `attend` for keys with fewer heads than queries, repeated where it cannot do it."""

    def attend_grouped(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and supports_gqa:
            options["enable_gqa"] = True
        elif groups > 1:
            key, value = (heads.repeat_interleave(groups, dim=1) for heads in (key, value))
        return attend(query, key, value, *args, **options)  # type: ignore[no-any-return]

    return attend_grouped


@functools.cache
def expensive_operations() -> list[Any]:
    """Return the operations whose results selective checkpointing keeps: products and attention.

    They are found by their names in `torch.ops.aten`. What is renamed is computed again in the
    backward pass, so memory stays low and steps become slower. The variable-length attention is
    registered when its module is imported.
    """
    import torch

    find_varlen_attention()
    aten = torch.ops.aten
    kept = [getattr(aten, name).default for name in MATMUL_OPERATIONS]
    kept += [getattr(aten, name).default for name in ATTENTION_OPERATIONS if hasattr(aten, name)]
    varlen = getattr(torch.ops, "torch_attn", None)
    if varlen is not None and hasattr(varlen, VARLEN_OPERATION):
        kept.append(getattr(varlen, VARLEN_OPERATION).default)
    return kept


def make_flop_counter() -> FlopCounterMode:
    """Return torch's FLOP counter with formulas of our own for attention.

    torch does not know the attention of a CPU, and until 2.11 refuses keys with fewer heads than
    queries. It relies on the names of aten operations and on `custom_mapping`. If they change, FLOP
    of attention, and so budgets, are missing.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    aten = torch.ops.aten
    formulas: dict[Any, Callable[..., int]] = {}
    for name in ATTENTION_OPERATIONS:
        if hasattr(aten, name):
            formulas[getattr(aten, name)] = _attention_flops
            formulas[getattr(aten, f"{name}_backward")] = _attention_backward_flops
    return FlopCounterMode(display=False, custom_mapping=formulas)


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Return the operations of attention between shapes `[rows, heads, positions, head width]`."""
    rows, heads, positions, width = query
    return int(2 * rows * heads * positions * key[2] * (width + value[3]))


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any
) -> int:
    return 2 * _attention_flops(query, key, value)  # the recomputed forward is not counted


def sigchld_flag_restorer() -> Callable[[], None]:
    """Note whether torch's data loader has caught SIGCHLD; return what puts the note back.

    torch sets its handler once per process and remembers that in `_SIGCHLD_handler_set` of
    `torch.utils.data._utils.signal_handling`. If the name changes, data loaders of a program that
    called vlbench do not notice that one of their workers died. torch is not imported by this.
    """
    before = getattr(sys.modules.get(SIGCHLD_MODULE), "_SIGCHLD_handler_set", False)

    def restore() -> None:
        if SIGCHLD_MODULE in sys.modules:
            sys.modules[SIGCHLD_MODULE]._SIGCHLD_handler_set = before  # type: ignore[attr-defined]

    return restore


def forget_process_groups() -> None:
    """Let every device mesh forget its process groups: `DeviceMesh._pg_registry`.

    DTensor's caches (of shardings, planners, topologies) hold meshes until the process ends. If the
    attribute goes, so do the threads of a process group that was destroyed.
    """
    if "torch.distributed.device_mesh" in sys.modules:
        from torch.distributed.device_mesh import DeviceMesh

        for found in gc.get_objects():
            if type(found) is DeviceMesh:
                found._pg_registry.clear()
