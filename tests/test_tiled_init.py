"""`init=` of a run without tiles begins one with tiles, and the other way around."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from random_vlm import small_vlm
from safetensors.torch import save_file

from vlbench.connector import registry
from vlbench.data.image_tiling import ImageTiling
from vlbench.data.view_layout import ViewSettings
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.model.view_tokens import NEWLINE_NAME
from vlbench.state_dicts import WeightMismatch
from vlbench.train.resume import load_checkpoint_weights

TILES = ViewSettings(ImageTiling(4), "newline")


def llava(view_settings: ViewSettings | None = None) -> LoadedVLM:
    return small_vlm(registry.load_connector("llava_mlp"), view_settings=view_settings)


def write_weights(vlm: LoadedVLM, folder: Path) -> dict[str, torch.Tensor]:
    """Write a model as a checkpoint has it; return its connector's state, not zero anywhere."""
    with torch.no_grad():
        for parameter in vlm.connector.parameters():
            parameter.add_(1.0)
    tensors = {
        f"{part}.{name}": tensor.clone().contiguous()
        for part, module in vlm.model.named_parts()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
    return {k: v.clone() for k, v in vlm.connector.state_dict().items()}


@pytest.mark.parametrize("had_tiles", [False, True])
@pytest.mark.parametrize("gets_tiles", [False, True])
def test_a_newline_that_init_lacks_begins_anew(
    had_tiles: bool, gets_tiles: bool, tmp_path: Path
) -> None:
    stored = write_weights(llava(TILES if had_tiles else None), tmp_path)
    vlm = llava(TILES if gets_tiles else None)
    own = {k: v.clone() for k, v in vlm.connector.state_dict().items()}
    load_checkpoint_weights(tmp_path, vlm.model, adapt_newline=True)
    loaded = vlm.connector.state_dict()
    assert (NEWLINE_NAME in loaded) == gets_tiles
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[name] if name in stored else own[name]), name


@pytest.mark.parametrize("had_tiles", [False, True])
def test_a_checkpoint_of_a_run_itself_must_have_all(had_tiles: bool, tmp_path: Path) -> None:
    write_weights(llava(TILES if had_tiles else None), tmp_path)
    with pytest.raises(WeightMismatch, match=NEWLINE_NAME):
        load_checkpoint_weights(tmp_path, llava(None if had_tiles else TILES).model)
