"""Training curves from metrics.csv: losses and gates over the seeds of a row, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from vlbench.compare.report.analysis import RowResult
from vlbench.compare.report.finished_runs import FinishedRun
from vlbench.compare.report.svg_figure import (
    MUTED_COLOR,
    figure_to_svg,
    make_subplots,
    plot_style,
    row_style,
    widen_range,
    wrap_label,
)
from vlbench.errors import UserError
from vlbench.text_files import read_csv

MIN_LOSS_SPAN = 0.2  # of a loss axis, as a share of the largest loss on it
MIN_GATE_SPAN = 0.1  # of the axis of gates, whose values are in -1..1
LOG_SCALE_RATIO = 8  # the loss axis is logarithmic where largest / smallest is more than this

MetricsTable = list[dict[str, str]]
"""The rows of a metrics.csv."""


@dataclass(frozen=True)
class MetricSeries:
    """A column of metrics.csv within one stage, at the steps at which every seed has it."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    """The smallest value over the seeds."""
    high: list[float]


def load_row_metrics(row: RowResult) -> list[MetricsTable]:
    """Return the metrics of the runs of a row that have any."""
    tables = [load_run_metrics(run) for run in row.runs]
    return [table for table in tables if table]


def load_run_metrics(run: FinishedRun) -> MetricsTable:
    """Return the metrics of a run, [] without any; a line cut off by a kill is left out."""
    file = run.folder / "metrics.csv"
    lines = read_csv(file)
    if lines and not {"stage", "step", "seconds"} <= set(lines[0]):
        raise UserError(f"{file}: has no columns stage, step and seconds")
    return [line for line in lines if line["seconds"]]


def stage_names(tables: Sequence[MetricsTable]) -> list[str]:
    """Return the names of all stages, in the order of training."""
    return list(dict.fromkeys(line["stage"] for table in tables for line in table))


def metric_columns(tables: Sequence[MetricsTable], prefix: str) -> list[str]:
    """Return the columns that begin with `prefix` and have values, in the order of the files."""
    filled = (
        key for table in tables for line in table for key, value in line.items() if key and value
    )
    return [key for key in dict.fromkeys(filled) if key.startswith(prefix)]


def series_by_stage(tables: Sequence[MetricsTable], column: str) -> dict[str, MetricSeries]:
    """Return stage -> series of a column over the seeds; stages without values are left out."""
    by_stage = {
        stage: _aggregate_seeds([_step_values(table, stage, column) for table in tables])
        for stage in stage_names(tables)
    }
    return {stage: series for stage, series in by_stage.items() if series.steps}


def _step_values(table: MetricsTable, stage: str, column: str) -> dict[int, float]:
    """Return step -> value of a column in a stage, without empty and non-finite values."""
    try:
        values = {
            int(line["step"]): float(line[column])
            for line in table
            if line["stage"] == stage and line.get(column)
        }
    except ValueError as error:
        raise UserError(
            f"metrics.csv: column {column} has a value that is not a number ({error})"
        ) from error
    return {step: value for step, value in values.items() if math.isfinite(value)}


def _aggregate_seeds(seed_values: Sequence[dict[int, float]]) -> MetricSeries:
    steps = sorted(set.intersection(*map(set, seed_values))) if seed_values else []
    values_by_step = [[values[step] for values in seed_values] for step in steps]
    return MetricSeries(
        steps=steps,
        mean=[sum(values) / len(values) for values in values_by_step],
        low=[min(values) for values in values_by_step],
        high=[max(values) for values in values_by_step],
    )


@plot_style()
def plot_losses(
    tables_by_row: Mapping[str, Sequence[MetricsTable]], row_names: Sequence[str]
) -> Markup | None:
    """Draw held-out losses (thick) and training losses (thin) of rows, a panel for each stage.

    Stages without any are left out; None if there is no other. `row_names` are all rows of the
    page: the index of a row gives its color and marker.
    """
    names = _stages_with(tables_by_row.values(), ["loss", "held_out_loss"])
    if not names:
        return None
    figure, (panels,) = make_subplots(3.4, columns=len(names))
    for row_name, tables in tables_by_row.items():
        style = row_style(row_names.index(row_name))
        training = series_by_stage(tables, "loss")
        held_out = series_by_stage(tables, "held_out_loss")
        for panel, stage in zip(panels, names, strict=False):
            if stage in training:
                series = training[stage]
                look = {"color": style["color"], "linewidth": 0.7, "alpha": 0.55}
                panel.plot(series.steps, series.mean, marker=_point_marker(series), **look)
            if stage in held_out:
                _plot_with_band(
                    panel, held_out[stage], {**style, "markersize": 4.5, "linewidth": 1.8}
                )
    for panel in panels:
        _scale_losses(panel)
    _label_stage_panels(panels, names, "loss")
    return figure_to_svg(figure, "plot-losses", "Losses of each row against steps, stage by stage")


def _scale_losses(panel: Axes) -> None:
    low, high = panel.dataLim.intervaly
    if 0 < low and high > LOG_SCALE_RATIO * low:
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
    else:
        span = MIN_LOSS_SPAN * max(abs(low), abs(high))
        panel.set_ylim(*widen_range(low, high, span or MIN_LOSS_SPAN))


def _stages_with(
    tables_by_row: Iterable[Sequence[MetricsTable]], columns: Sequence[str]
) -> list[str]:
    """Return the stages in which any of the columns has values, in the order of training."""
    by_row = list(tables_by_row)
    drawn = {
        stage
        for tables in by_row
        for column in columns
        for stage in series_by_stage(tables, column)
    }
    return [name for name in stage_names([t for tables in by_row for t in tables]) if name in drawn]


def _plot_with_band(axes: Axes, series: MetricSeries, style: dict[str, Any]) -> None:
    axes.plot(series.steps, series.mean, **style)
    axes.fill_between(
        series.steps, series.low, series.high, color=style["color"], alpha=0.18, linewidth=0
    )


def _label_stage_panels(panels: Sequence[Axes], stages: Sequence[str], label: str) -> None:
    """Set the titles and axis labels of panels, one for each stage."""
    for panel, stage in zip(panels, stages, strict=False):
        panel.set_title(wrap_label(stage, 24))
        panel.set_xlabel("step of the stage")
        panel.set_xlim(0, 1.04 * max(1.0, panel.dataLim.xmax))
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panels[0].set_ylabel(label)


@plot_style()
def plot_gates(tables: Sequence[MetricsTable], svg_id: str, row_name: str) -> Markup | None:
    """Draw the gates of a row against steps, early layers dark; None if it has none."""
    columns = metric_columns(tables, "gate_")
    names = _stages_with([tables], columns)
    if not names:
        return None
    figure, (panels,) = make_subplots(2.9, columns=len(names), sharey=True)
    layers = sorted({_layer_index(column) for column in columns})
    for column in columns:
        relative_depth = layers.index(_layer_index(column)) / max(1, len(layers) - 1)
        style = {"color": matplotlib.colormaps["viridis"](0.88 * relative_depth), "linewidth": 1.6}
        linestyle = "--" if column.startswith("gate_ff_") else "-"
        by_stage = series_by_stage(tables, column)
        for panel, stage in zip(panels, names, strict=True):
            if stage in by_stage:
                series = by_stage[stage]
                marker = _point_marker(series)
                panel.plot(series.steps, series.mean, marker=marker, linestyle=linestyle, **style)
    for panel in panels:
        panel.axhline(0, color=MUTED_COLOR, linewidth=0.8)
    ends = [end for panel in panels for end in panel.dataLim.intervaly]
    panels[0].set_ylim(*widen_range(min(ends), max(ends), MIN_GATE_SPAN))
    _label_stage_panels(panels, names, "tanh of the gate")
    return figure_to_svg(figure, svg_id, f"Gates of {row_name} against steps")


def _point_marker(series: MetricSeries) -> str:
    """Return the marker of a line: a single value has no line that would show it."""
    return "." if len(series.steps) == 1 else ""


def _layer_index(column: str) -> int:
    ending = column.rpartition("_")[2]
    return int(ending) if ending.isdecimal() else 0
