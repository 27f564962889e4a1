"""What `compare` and `report` take; `arguments` has the other verbs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlbench.command_line.arguments import BudgetName, out_argument
from vlbench.command_line.parser import argument

DEFAULT_MATCH_LIMIT = 4.0
"""The most times that `match=` makes a size of a connector larger or smaller."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """`compare`: train a grid of runs and report their differences."""

    verb: ClassVar[str] = "compare"

    recipe: str = argument(
        "one recipe or several, as yivl_llava,yivl_qformer",
        metavar="NAME[,NAME ...]",
        other_names=("recipes",),
    )
    seeds: str = argument("number of seeds, 1 to 1000, or a list as [0,1,5]", "3", metavar="N")
    grid: str | None = argument(
        "changes that make a row each, 'K=V + K=V | K=V', or a YAML file with rows: [{K: V}, ...]",
        None,
        metavar="'K=V | K=V'",
    )
    match: BudgetName | None = argument(
        "make this the same in all rows by the connectors' sizes", None, metavar="NAME"
    )
    match_limit: float | None = argument(
        f"with match=: the most times that a size may grow or shrink; by default "
        f"{DEFAULT_MATCH_LIMIT:g}",
        None,
        metavar="N",
        low=1,
        high=1e6,
    )
    curve: str | None = argument(
        "train every row at each of these budgets, visual_tokens:4,16,64, flops:1e9,4e9 or "
        "samples:1600,6400 (of the last stage)",
        None,
        metavar="NAME:V,V,...",
    )
    sweep: str | None = argument(
        "factors of the connector's learning rate that every row tries first, as 0.3,1,3; of "
        "another part sweep.language= or sweep.vision=",
        None,
        metavar="F,F,...",
    )
    freeze: Literal["vision"] | None = argument(
        "never train the vision encoder, and keep its features for all runs", None, metavar="vision"
    )
    tasks: str | None = argument(
        "asked at the end of every run, and compared too: mmmu, cmmmu, FILE.json, own (always "
        "asked); keys as of eval: tasks.mmmu.data=DIR",
        None,
        metavar="TASK[,TASK ...]",
        other_names=("task", "benchmark"),
    )
    jobs: str = argument(
        "runs at once: 1 to 1000, auto, or slurm (write a job array)", "auto", metavar="N"
    )
    dry_run: bool = argument("print the plan alone", False, metavar="true")
    run: str | None = argument(
        "folder of the comparison; by default a new one, runs/compare-N",
        None,
        metavar="DIR",
        is_path=True,
        other_names=("out", "to"),
    )


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """`report`: compare finished runs, or count votes."""

    verb: ClassVar[str] = "report"

    runs: tuple[str, ...] = argument(
        "folders of runs, or folders that hold them",
        (),
        metavar="RUN...",
        is_path=True,
        is_positional=True,
    )
    votes: str | None = argument(
        "files of votes on answers side by side, as serve writes them; with or without runs",
        None,
        metavar="FILE[,FILE ...]",
    )
    out: tuple[str, ...] = out_argument(
        "file that the report is written to, .md, .html or .json; once each", (), metavar="FILE"
    )
