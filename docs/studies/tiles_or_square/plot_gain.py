"""Draw the accuracy of each row of the study by the height of letters and shapes.

python docs/studies/tiles_or_square/plot_gain.py runs/tiles_or_square
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from vlbench.compare.report.svg_figure import SVG_METADATA, plot_style, row_style

FILE = Path(__file__).with_name("accuracy_by_height.svg")
KIND = re.compile(r"(?P<family>letters|shapes) (?P<low>\d+)-(?P<high>\d+) px")
ROWS = {  # name in the report -> what it is
    "tiling.thumbnail=null": "one square",
    "tiling.thumbnail=False": "2 x 2 tiles",
    "tiling.thumbnail=True": "2 x 2 tiles and thumbnail",
}
Curves = dict[str, dict[float, list[float]]]
"""Name of a row -> middle of a band of heights in pixels -> accuracy of each seed."""


def read_curves(comparison: Path) -> dict[str, Curves]:
    """Return the curves of each family of questions, from the report and the runs it names.

    Those are named as they were when the report was written, from the same current folder.
    """
    families: dict[str, Curves] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    report = json.loads((comparison / "report.json").read_text(encoding="utf-8"))
    for row in report["rows"]:
        for run in row["runs"]:
            file = Path(run["folder"], "results.json")
            scores = json.loads(file.read_text(encoding="utf-8"))["accuracy_by_type"]
            for name, accuracy in scores.items():
                if kind := KIND.fullmatch(name):
                    middle = (int(kind["low"]) + int(kind["high"])) / 2
                    families[kind["family"]][row["name"]][middle].append(accuracy)
    return families


def draw_curves(families: dict[str, Curves]) -> Figure:
    """Draw a panel for each family: means as lines, seeds as points."""
    figure = Figure(figsize=(7.2, 3.2))
    panels = figure.subplots(1, len(families), sharey=True)
    for panel, (family, curves) in zip(panels, sorted(families.items()), strict=True):
        for number, row in enumerate(ROWS):
            by_height = curves[row]
            style, heights = row_style(number), sorted(by_height)
            means = [fmean(by_height[height]) for height in heights]
            panel.plot(heights, means, label=ROWS[row], **style)
            for height in heights:
                seeds = by_height[height]
                panel.plot([height] * len(seeds), seeds, ".", color=style["color"], alpha=0.5)
        panel.set_title(family)
        panel.set_xlabel("height in the picture, pixels")
    panels[0].set_ylabel("exact match")
    panels[0].set_ylim(-0.02, 1.02)
    panels[-1].legend(loc="lower right", fontsize=8)
    return figure


if __name__ == "__main__":
    with plot_style():
        draw_curves(read_curves(Path(sys.argv[1]))).savefig(FILE, metadata=SVG_METADATA)
    print(f"wrote {FILE}")
