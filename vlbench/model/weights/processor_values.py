"""Options of an image processor in Hugging Face's layout that can have one value here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlbench.errors import UserError

RESAMPLE_CODES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
"""PIL's numbers of the interpolations, as `resample` says them."""

FIXED_PIXEL_VALUES: dict[str, float] = {
    **dict.fromkeys(("do_rescale", "do_normalize"), True),
    "rescale_factor": 1 / 255,
}
"""Options that say what becomes of pixels, whatever makes an image a square."""
FIXED_PROCESSOR_VALUES: dict[str, float] = {
    **dict.fromkeys(("do_resize", "do_center_crop"), True),
    **FIXED_PIXEL_VALUES,
}
"""Those of a CLIPImageProcessor, which resizes and crops as well."""


def check_fixed_values(config: Mapping[str, Any], fixed: Mapping[str, float], file: Path) -> None:
    """Raise a UserError for an option of `config`, read from `file`, that has another value."""
    for key, value in fixed.items():
        given = config.get(key, value)
        if not isinstance(given, int | float) or abs(given - value) > 1e-12:
            raise UserError(f"{file}: {key} is {given!r}; only {value} can be done here")


def parse_resample(config: Mapping[str, Any], file: Path) -> str:
    """Return the interpolation that `resample` of `config`, read from `file`, says; bicubic."""
    code = config.get("resample", RESAMPLE_CODES["bicubic"])
    names = [name for name, known in RESAMPLE_CODES.items() if type(code) is int and code == known]
    if not names:
        known = ", ".join(f"{code} ({name})" for name, code in RESAMPLE_CODES.items())
        raise UserError(f"{file}: resample is {code!r}; known are {known}")
    return names[0]
