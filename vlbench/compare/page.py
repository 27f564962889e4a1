"""A comparison as one HTML page that needs nothing but itself: no network, no scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlbench import __version__
from vlbench.compare import cases, costs, insides, plots, traces
from vlbench.compare.album import Album, heat
from vlbench.compare.curves import tables
from vlbench.compare.figure import swatch
from vlbench.compare.findings import NAMED, Findings, Row, counted
from vlbench.compare.insides import Inside
from vlbench.compare.markdown import share, whole
from vlbench.compare.statistics import POWER
from vlbench.html import templates

TEMPLATE = "report.html.jinja"


def page(findings: Findings) -> str:
    """Return the report of a comparison as HTML; what its runs do not hold is said in it."""
    environment = templates(Path(__file__).parent)
    environment.filters |= {"share": share, "whole": whole, "heat": heat, "exp": math.exp}
    environment.globals |= {
        "counted": counted,
        "version": __version__,
        "power": POWER,
        "named": NAMED,
    }
    album = Album(findings.rows[0].runs[0])
    rows = findings.rows
    text = environment.get_template(TEMPLATE).render(
        findings=findings,
        title=_title(rows),
        places={row.name: place for place, row in enumerate(rows)},
        swatches=[swatch(place) for place in range(len(rows))],
        answered=_answered(findings),
        training=_training(rows),
        costs=_costs(rows),
        cases=cases.wins_and_losses(rows, findings.questions),
        inside=_inside(rows),
        made=_made(findings),
        album=album,
    )
    return text.encode("utf-8", "replace").decode()  # an answer may hold half a character


def _title(rows: Sequence[Row]) -> str:
    if len(rows) > NAMED:
        return f"{len(rows)} rows compared"
    return " / ".join(row.name for row in rows)


def _answered(findings: Findings) -> dict[str, Any]:
    """Return the plots of what was answered."""
    rows = findings.rows
    return {
        "accuracies": plots.accuracies(rows),
        "differences": plots.differences(findings.pairs) if findings.pairs else None,
        "drawn": len(plots.drawn(findings.pairs)),
        "kinds": plots.kinds(findings.kinds, rows) if findings.kinds else None,
        "drops": plots.drops(rows),
    }


def _training(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the plots of training, and the rows that have no metrics."""
    found = {row.name: tables(row) for row in rows}
    known = {name: some for name, some in found.items() if some}
    order = [row.name for row in rows]
    gates = {
        name: plot
        for name, some in known.items()
        if (plot := traces.gates(some, f"plot-gates-{order.index(name)}", name)) is not None
    }
    return {
        "losses": traces.losses(known, order) if known else None,
        "missing": [name for name in order if name not in known],
        "partly": [row.name for row in rows if 0 < len(found[row.name]) < len(row.runs)],
        "gates": gates,
    }


def _costs(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the plot of costs, the rows on each frontier, and everything known of the costs."""
    prices = {
        "FLOPs": [(row, row.budget.get("flops")) for row in rows],
        "seconds": [(row, row.mean("seconds")) for row in rows],
    }
    best = {}
    for label, found in prices.items():
        known = [(row, price) for row, price in found if price]
        points = [(price, row.accuracy) for row, price in known]
        best[label] = [known[index][0].name for index in costs.frontier(points)]
    return {
        "plot": plots.costs(rows) if any(best.values()) else None,
        "frontiers": {label: names for label, names in best.items() if names},
        "missing": [row.name for row, price in prices["FLOPs"] if not price],
        "card": costs.card(rows),
    }


def _inside(rows: Sequence[Row]) -> dict[str, Any]:
    """Return what diagnostics there are."""
    found: list[Inside] = insides.insides(rows)
    order = [row.name for row in rows]
    counted_ = [one for one in found if one.tokens]
    return {
        "rows": [one.row for one in found],
        "relevance": insides.relevance(found),
        "attention": insides.attention(found),
        "attends": [one for one in found if one.attention],
        "tokens": traces.tokens(counted_, order) if counted_ else None,
    }


def _made(findings: Findings) -> dict[str, Any]:
    """Return how the runs were made: versions, data, folders."""
    runs = [run for row in findings.rows for run in row.runs]
    names = dict.fromkeys(name for run in runs for name in run.versions)
    return {
        "versions": {
            name: list(dict.fromkeys(run.versions.get(name, "unknown") for run in runs))
            for name in names
        },
        "data": _data(runs[0].recipe),
        "size": runs[0].recipe["size"],
    }


def _data(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the keys of a recipe that say what was trained on, and their values."""
    wanted = ("train", "val", "images", "mix")
    return [
        (key, value if isinstance(value, str) else json.dumps(value, default=str))
        for key, value in recipe.items()
        if key.split(".")[-1] in wanted and ".data." in f".{key}" and value is not None
    ]
