"""From a run or a checkpoint on disk to a model that answers."""

from __future__ import annotations

import json
from pathlib import Path

from vlbench import recipe as recipes
from vlbench.mistakes import Mistake
from vlbench.model.compose import compose
from vlbench.model.vlm import VLM
from vlbench.train import checkpoint


def load_run(path: str) -> VLM:
    """Return the model of a run folder (its newest checkpoint) or of a checkpoint folder."""
    folder = checkpoint.find(Path(path))
    recipe = recipes.load_file(folder / "recipe.yaml")
    vlm = compose(recipe, checkpoint.image_size(folder))
    checkpoint.load_weights(folder, vlm)
    stored = json.loads((folder / "preprocess.json").read_text())["transform_hash"]
    if stored != vlm.transform.hash():
        raise Mistake(
            f"{folder} was trained with other image preprocessing (hash {stored}, "
            f"this version has {vlm.transform.hash()}): its answers would not be its own"
        )
    return vlm.eval()
