"""The trained model on the device that answers the questions at the end of a run.

Several GPUs train what one of them cannot hold: 34 billion trained weights take 138 GB as float32,
and one process asks the questions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlbench.model.frozen_bf16 import FrozenBF16
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.weights.tensor_groups import move_and_cast


def place_for_answers(
    vlm: LoadedVLM,
    hold_frozen: Callable[[], FrozenBF16],
    device: torch.device,
    print_line: Callable[[str], None],
) -> None:
    """Move a model that is no longer trained to `device`, in bfloat16 if it does not fit otherwise.

    Args:
        vlm: The model.
        hold_frozen: Holds frozen weights in bfloat16 where that changes no number.
        device: Where the questions are asked.
        print_line: Prints that the model is in bfloat16.
    """
    vlm.model.requires_grad_(False)
    held = hold_frozen()
    try:
        vlm.to(device)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
    else:
        return
    vlm.to("cpu")  # what has been moved; behind the error, whose frames would hold it
    held.restore_float32()
    move_and_cast(vlm.model, torch.bfloat16, device)
    print_line(
        f"the trained model does not fit on {device} as float32 ({reason}): the questions are "
        "asked in bfloat16; the checkpoint keeps float32"
    )
