"""Where torch's flash attention runs, which its variable-length attention is made of.

`scaled_dot_product_attention` takes another kernel where flash attention does not run; the
variable-length attention raises an error there.
"""

from __future__ import annotations

import torch

MIN_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: Ampere; V100 and T4 are older
MAX_HEAD_WIDTH, HEAD_WIDTH_MULTIPLE = 256, 8
DTYPES = (torch.bfloat16, torch.float16)


def runs_flash_kernels(device: torch.device) -> bool:
    """Tell whether flash attention runs on a device: AMD's GPUs, and NVIDIA's from Ampere on."""
    if device.type != "cuda":
        return False
    return torch.version.hip is not None or (
        torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    )


def takes_heads(dtype: torch.dtype, head_width: int) -> bool:
    """Tell whether flash attention takes heads of this type and width."""
    return dtype in DTYPES and head_width <= MAX_HEAD_WIDTH and not head_width % HEAD_WIDTH_MULTIPLE
