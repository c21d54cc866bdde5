"""The command tune: searches a space of configs for the trade-off of accuracy and bits."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.cli_chain import Address, AsJson, Config, Overrides, terminal
from pipelines.cli_errors import FAILURE, SOME_FAILED, Stopped, ending_well, print_json

if TYPE_CHECKING:
    from typing import TextIO

    from pipelines.search import SearchResult

Search = Literal["optuna", "random"]
Objective = Literal["pareto", "top1", "bits", "loss"]
SHOWN_FAILURES = 5


@ending_well
def tune(
    config: Config,
    space: Annotated[
        str, typer.Option("--space", "-s", help="film, rate, joint: a file of tune_spaces/")
    ],
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="in all, resumed or not")],
    overrides: Overrides = None,
    search: Annotated[
        Search, typer.Option("--search", help="optuna (multi-objective TPE) or random")
    ] = "optuna",
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            help="pareto (top1 over bytes), or one of held-back rows: top1, bits, loss",
        ),
    ] = "pareto",
    include_stage1: Annotated[
        bool,
        typer.Option("--include-stage1", help="also fields that train a stage 1 for each value"),
    ] = False,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="of the search; default the config's")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with this search; more --trials extend it")
    ] = False,
    register: Annotated[
        bool,
        typer.Option(
            "--register", help="measure the front by real streams and register it, 5 models at most"
        ),
    ] = False,
    as_json: AsJson = False,
    address: Address = None,
) -> None:
    """Searches a space: trials of stage 2 over shared stages, stopped early, their Pareto front.

    Exit code 3: the search is over and some trials failed; 1: all of them did.
    """
    from pipelines.search_driver import SearchOptions
    from pipelines.settings import load_settings

    overrides = list(overrides or ())
    joined = [*overrides, f"cluster.address={address}"] if address else overrides
    settings = load_settings(config, joined)
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
    command = ["mantis", "tune", "--config", str(config), "--space", space]
    command += ["--trials", str(trials), "--search", search, "--objective", objective]
    command += ["--include-stage1"] if include_stage1 else []
    command += [] if seed is None else ["--seed", str(seed)]
    command += ["--register"] if register else []
    with terminal(settings, as_json, shlex.join([*command, "--resume", *joined])) as stream:
        from pipelines.search import run_search

        result = run_search(settings, options, stream=stream, config_name=config.stem)
        _show(result, stream)
    if as_json:
        print_json(asdict(result))
    if result.failed:
        shown = [f"trial {n}: {why}" for n, why in list(result.failed.items())[:SHOWN_FAILURES]]
        more = len(result.failed) - len(shown)
        told = "\n".join([*shown, *([f"and {more} more"] if more else [])])
        code = SOME_FAILED if result.trials["finished"] else FAILURE
        raise Stopped(f"{len(result.failed)} of {trials} trials failed:\n{told}", code)


COMMANDS = (tune,)


def _show(result: SearchResult, stream: TextIO) -> None:
    from pipelines.console import Console
    from pipelines.search_view import describe_params

    with Console(stream, live=False) as console:
        rows = [
            [str(point.trial), f"{point.top1:.4g}", f"{point.wire_bytes:.1f}", point.model or ""]
            for point in result.front
        ]
        columns = ("trial", "top1", "bytes, estimated", "model")
        console.final_table("Pareto front, held-back rows", columns, rows)
        for point in result.front:
            console.note(f"trial {point.trial}: {describe_params(point.params)}")
        counts = ", ".join(f"{count} {state}" for state, count in result.trials.items())
        console.note(f"trials: {counts}; {result.epochs} epochs; {result.seconds:.0f} s")
        if result.overhead is not None:
            console.note(
                f"scheduler and Tune: {100 * result.overhead:.1f} % of the trials' wall time"
            )
        console.note(f"report: {result.folder}/search.html")
