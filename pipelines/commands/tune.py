"""The command `mantis tune`: searches a space of configs for accuracy against bits."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from data_prep.sources.remembering import one_look
from pipelines.commands.chain import print_plan
from pipelines.commands.errors import (
    FAILURE,
    SOME_FAILED,
    Stopped,
    ending_well,
    print_json,
    terminal,
)
from pipelines.commands.messages import command_line
from pipelines.commands.options import Address, AsJson, Config, DryRun, Overrides, joined

if TYPE_CHECKING:
    from typing import TextIO

    from pipelines.search.result import SearchResult
    from pipelines.settings.sections import Settings

Search = Literal["optuna", "random"]

Objective = Literal["pareto", "top1", "bits", "loss"]

SHOWN_FAILURES = 5


@ending_well
@one_look()
def tune(
    config: Config,
    space: Annotated[
        str,
        typer.Option(
            "--space",
            "-s",
            help="Search space: film, rate or joint. Each is a file of tune_spaces/.",
        ),
    ],
    trials: Annotated[
        int,
        typer.Option(
            "--trials", "-n", min=1, help="Total number of trials, those before a resume included."
        ),
    ],
    overrides: Overrides = None,
    search: Annotated[
        Search, typer.Option("--search", help="Sampler: optuna (multi-objective TPE) or random.")
    ] = "optuna",
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            help="Objective on the holdout: pareto (top1 over bytes), top1, bits or loss.",
        ),
    ] = "pareto",
    include_stage1: Annotated[
        bool,
        typer.Option(
            "--include-stage1", help="Also search fields that need a new stage 1 for each value."
        ),
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Seed of the search. The default is `seed`.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume this search. A larger --trials extends it.")
    ] = False,
    register: Annotated[
        bool,
        typer.Option(
            "--register",
            help="Measure the front with real streams and register at most 5 of its models.",
        ),
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Search a space of configs and print the Pareto front.

    Exits with 3 if some trials failed, and with 1 if all failed.

    Example: mantis tune --config configs/quickstart.yaml --space rate --trials 12
    """
    from pipelines.search.result import SearchOptions
    from pipelines.settings.reading import load_settings

    words = joined(overrides, address)
    settings = load_settings(config, words)
    if dry_run:
        _show_plan(settings, space, include_stage1, as_json)
        return
    options = SearchOptions(
        space=space,
        trials=trials,
        kind=search,
        objective=objective,
        include_stage1=include_stage1,
        resume=resume,
        register=register,
        seed=settings.seed if seed is None else seed,
    )
    command = ["tune", "--config", str(config), "--space", space]
    command += ["--trials", str(trials), "--search", search, "--objective", objective]
    command += ["--include-stage1"] if include_stage1 else []
    command += [] if seed is None else ["--seed", str(seed)]
    command += ["--register"] if register else []
    with terminal(settings, as_json, command_line([*command, "--resume", *words])) as stream:
        from pipelines.search.run import run_search

        result = run_search(settings, options, stream=stream, config_name=config.stem)
        _show(result, stream)
    if as_json:
        print_json(asdict(result))
    if result.failed:
        shown = [f"trial {n}: {why}" for n, why in list(result.failed.items())[:SHOWN_FAILURES]]
        more = len(result.failed) - len(shown)
        reasons = "\n".join([*shown, *([f"and {more} more"] if more else [])])
        code = SOME_FAILED if result.trials["finished"] else FAILURE
        raise Stopped(f"{len(result.failed)} of {trials} trials failed:\n{reasons}", code)


COMMANDS = (tune,)


def _show_plan(settings: Settings, space: str, include_stage1: bool, as_json: bool) -> None:
    """Prints the stages of a trial with the values of the config, and the searched fields."""
    from pipelines.chain.plan import make_plan
    from pipelines.search.space import describe, searched_space
    from pipelines.stages.spec import with_upstream

    searched = describe(searched_space(settings, space, include_stage1=include_stage1))
    plan = make_plan(settings)
    print_plan(plan, with_upstream(plan.specs, "stage2"), as_json, space=searched)


def _show(result: SearchResult, stream: TextIO) -> None:
    from pipelines.search.view import describe_params
    from pipelines.terminal.console import Console

    with Console(stream, live=False) as console:
        rows = [
            [
                str(point.trial),
                *([] if point.level is None else [str(point.level)]),
                f"{point.top1:.4g}",
                f"{point.wire_bytes:.1f}",
                point.model or "",
            ]
            for point in result.front
        ]
        of_level = () if all(point.level is None for point in result.front) else ("level",)
        columns = ("trial", *of_level, "top1", "bytes, estimated", "model")
        console.final_table("Pareto front on the holdout", columns, rows)
        for number, params in {point.trial: point.params for point in result.front}.items():
            console.note(f"trial {number}: {describe_params(params)}")
        counts = ", ".join(f"{count} {state}" for state, count in result.trials.items())
        console.note(f"trials: {counts}; {result.epochs} epochs; {result.seconds:.0f} s")
        if result.overhead is not None:
            console.note(
                f"scheduler and Tune: {100 * result.overhead:.1f} % of the trials' wall time"
            )
        console.note(f"report: {result.folder}/search.html")
