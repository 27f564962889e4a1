"""`python -m vlbench graft`: say what three parts are together, write their recipe."""

from __future__ import annotations

import time
from dataclasses import replace

from vlbench.data.own_template import bind_template
from vlbench.data.tokenizer import Tokenizer
from vlbench.graft.graft_options import GraftOptions, page_path
from vlbench.graft.graft_recipe import fit_command, write_recipe
from vlbench.graft.missing_files import LocalLanguage, file_lines, find_local_language
from vlbench.graft.part_table import (
    choose_gpu,
    count_parameters,
    memory_lines,
    parameter_lines,
    shape_lines,
)
from vlbench.graft.text_checks import (
    choose_template,
    render_page,
    text_lines,
    trip_conversations,
)
from vlbench.model.language_model import tokenizer_folder
from vlbench.model.loaded_vlm import LoadedVLM
from vlbench.planner.meta_model import build_meta_vlm
from vlbench.system_errors import explain_unwritable
from vlbench.text_files import write_for_people
from vlbench.train.shape_checks import check_stage_shapes
from vlbench.train.stage_plan import check_data, plan_stage_runs


def run_graft(options: GraftOptions) -> int:
    """Check the parts, print what they are together, write recipe and page; return the exit code.

    Raises:
        UserError: the parts do not fit, files of them are not whole, or `out` cannot be written.
    """
    start = time.monotonic()
    local = find_local_language(options.recipe.language)
    options, template_note = _settle_template(options, local)
    recipe = options.recipe
    template = {"template": recipe.language.template}
    known = recipe.model_copy(update={"language": local.config.model_copy(update=template)})
    if not local.problem:
        stage_runs = plan_stage_runs(known.selected_data, known.last_stage_data)
        check_data(stage_runs)
        check_stage_shapes(known.model, stage_runs)
        tokenizer = Tokenizer.load(tokenizer_folder(known.language.weights))
        bind_template(recipe.language.template, tokenizer)  # refuses what the tokenizer lacks
    models = {
        name: build_meta_vlm(known.model, name, stage, recipe.precision)
        for name, stage in recipe.selected_stages.items()
    }
    last = list(models.values())[-1]
    files = file_lines(recipe.model, local, count_parameters(last))
    _print_block(shape_lines(recipe.model, models))
    _print_block(parameter_lines(recipe.model, recipe.selected_stages, last))
    gpu, gpu_note = choose_gpu(options.gpu)
    plan_options = replace(options, recipe=known).plan_options(gpu)
    _print_block(memory_lines(plan_options, gpu_note))
    cautions = [local.problem] if local.problem else _check_texts(options, models)
    _print_block(["files", *(f"  {line}" for line in files)])
    _write_results(options, {} if local.problem else models)
    if template_note:
        _print_block([template_note])
    _print_block([*(f"caution: {caution}" for caution in cautions), *_closing_lines(options)])
    print(f"({time.monotonic() - start:.0f} s)", flush=True)
    return _run_trial(options) if options.tries else 0


def _run_trial(options: GraftOptions) -> int:
    """Train for a few minutes on rendered scenes, say whether the model sees; the exit code."""
    from vlbench.fit_command import train_and_evaluate
    from vlbench.graft.sight_trial import sight_lines, trial_recipe

    recipe = options.recipe.model_copy(update={"recipe": str(options.out)})
    exit_code, run = train_and_evaluate(trial_recipe(recipe))
    if exit_code or run is None:
        return exit_code
    print("\n" + "\n".join(sight_lines(run.folder)), flush=True)
    return 0


def _settle_template(options: GraftOptions, local: LocalLanguage) -> tuple[GraftOptions, str]:
    """Return the options with the chat template that fits the tokenizer, and what to say of it."""
    if options.names_template or local.problem:
        return options, ""
    recipe = options.recipe
    tokenizer = Tokenizer.load(tokenizer_folder(local.config.weights))
    name, note = choose_template(recipe.language.template, tokenizer)
    language = recipe.language.model_copy(update={"template": name})
    return replace(options, recipe=recipe.model_copy(update={"language": language})), note


def _print_block(lines: list[str]) -> None:
    print("\n".join(lines) + "\n", flush=True)


def _check_texts(options: GraftOptions, models: dict[str, LoadedVLM]) -> list[str]:
    """Print what becomes of texts; return what to think of."""
    processor = list(models.values())[-1].processor
    trips = trip_conversations(processor)
    _print_block(text_lines(processor, trips))
    return [caution for trip in trips for caution in trip.cautions]


def _write_results(options: GraftOptions, models: dict[str, LoadedVLM]) -> None:
    """Write the recipe and, where the tokenizer is here, the page."""
    recipe = options.recipe
    try:
        write_recipe(recipe, options.out)
        if models:
            page = render_page(recipe.model, recipe.stages, models)
            write_for_people(page_path(options.out), page)
    except OSError as error:
        raise explain_unwritable(error, f"out={options.out}") from error


def _closing_lines(options: GraftOptions) -> list[str]:
    page = page_path(options.out)
    lines = [f"wrote {options.out}"]
    if page.is_file():
        lines[0] += f", and {page}: which tokens are learned"
    if options.takes_scenes:
        lines.append(
            "no data were named: it trains on rendered scenes; data.train=FILE.json "
            "data.images=FOLDER are your own"
        )
    return [*lines, fit_command(options.out)]
