"""Commands that run stages: run, prepare, teacher, stage1, stage2, evaluate."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from pipelines.cli_errors import (
    FAILURE,
    INTERRUPTED,
    MISTAKE,
    Stopped,
    ending_well,
    is_mistake,
    print_json,
)

if TYPE_CHECKING:
    from pipelines.console import Console
    from pipelines.plan import StageKind
    from pipelines.settings import Settings
    from pipelines.stages import ChainResult, Plan

logger = logging.getLogger(__name__)

STAGES: dict[str, tuple[StageKind | None, str]] = {
    "run": (
        None,
        "The whole chain: prepare, train, evaluate, register. Finished stages are skipped.",
    ),
    "prepare": ("prepare", "Images and labels into Parquet shards."),
    "teacher": (
        "teacher",
        "The uncompressed network that is distilled, where `teacher.weights` is `train`.",
    ),
    "stage1": ("stage1", "The task-agnostic codec, and whatever it needs first."),
    "stage2": ("stage2", "The task-aware codec (main arm), and whatever it needs first."),
    "evaluate": ("evaluate", "Every arm of an experiment, and whatever it needs first."),
}
"""Command to the stage it ends with, None for the last, and its help."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="such as stage2.rate_weight=0.01"),
]
Config = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the experiment")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the config and the plan only")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster to join; default RAY_ADDRESS, or none")
]


def _stage_command(name: str, until: StageKind | None, text: str) -> Callable[..., None]:
    """The command that runs a chain until that stage."""

    def command(
        config: Config,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
        address: Address = None,
    ) -> None:
        _chain(name, until, config, overrides, dry_run, as_json, address)

    command.__name__, command.__doc__ = name, text
    return ending_well(command)


COMMANDS = tuple(_stage_command(name, *STAGES[name]) for name in STAGES)


def _chain(
    command: str,
    until: StageKind | None,
    config: Path,
    overrides: Sequence[str] | None,
    dry_run: bool,
    as_json: bool,
    address: str | None,
) -> None:
    from pipelines.settings import load_settings
    from pipelines.stages import make_plan, run_chain

    overrides = list(overrides or ())
    joined = [*overrides, f"cluster.address={address}"] if address else overrides
    plan = make_plan(load_settings(config, joined))
    if until is not None and until not in {spec.name for spec in plan.specs}:
        raise Stopped(
            f"error: this config has no stage {until}: teacher.weights is "
            f"{plan.settings.teacher.weights!r}, only `train` trains one",
            MISTAKE,
        )
    if dry_run:
        _print_plan(plan, until, as_json)
        return
    resume = shlex.join(["mantis", command, "--config", str(config), *joined])
    with _console(plan.settings, as_json, resume) as console:
        result = run_chain(plan, console=console, config_name=config.stem, until=until)
        _show_result(plan, result, console)
    if as_json:
        print_json(asdict(result))


@contextmanager
def _console(settings: Settings, as_json: bool, resume: str) -> Iterator[Console]:
    """The console of a run."""
    from pipelines.console import Console

    with terminal(settings, as_json, resume) as stream, Console(stream) as console:
        yield console


@contextmanager
def terminal(settings: Settings, as_json: bool, resume: str) -> Iterator[TextIO]:
    """Where a run may write while its log takes all else; what is said when it does not end well.

    Also used by cli_tune.
    """
    from pipelines.cluster import check_disk
    from pipelines.last_words import last_words
    from pipelines.logs import captured_output
    from pipelines.stages import StageFailed
    from pipelines.storage import Store

    root = Store(settings.storage.root).local_path()
    if root is not None:
        check_disk(root)
    log = Path("runs/logs") if root is None else root / "logs"
    resuming = f"Resume with:\n  {resume}"
    try:
        lost = f"the command was killed, or its Ray was. Details are in {log}. {resuming}"
        with last_words(lost), captured_output(log) as (stdout, stderr, log):
            try:
                yield stderr if as_json else stdout
            except Exception:
                logger.exception("the command failed")
                raise
    except KeyboardInterrupt:
        raise Stopped(f"interrupted. {resuming}", INTERRUPTED) from None
    except Exception as error:
        cause = error.cause if isinstance(error, StageFailed) else error
        if is_mistake(cause):
            raise Stopped(f"error: {cause}", MISTAKE) from None
        told = str(error) if error is not cause else f"{type(error).__name__}: {error}"
        raise Stopped(f"{told}\nDetails are in {log}. {resuming}", FAILURE) from None


def _print_plan(plan: Plan, until: StageKind | None, as_json: bool) -> None:
    from pipelines.plan import with_upstream
    from pipelines.run_record import read_result, stage_state
    from pipelines.schedule import check_batches, schedule
    from pipelines.settings import to_yaml
    from pipelines.storage import Store

    store, uri = Store(plan.settings.storage.root), plan.settings.tracking.uri
    names = {"done": "skip", "started": "resume", "new": "run"}
    specs = plan.specs if until is None else with_upstream(plan.specs, until)
    check_batches(specs)
    actions = {spec.name: names[stage_state(store, spec, uri)] for spec in specs}
    prepared = actions["prepare"] == "skip"
    rows = read_result(store, specs[0])["rows"]["train"] if prepared else None
    planned = [(spec, schedule(spec, rows)) for spec in specs]
    if as_json:
        stages = [
            {
                "stage": spec.name,
                "key": spec.key,
                "action": actions[spec.name],
                "epochs": training and training.epochs,
                "training": training and asdict(training),
            }
            for spec, training in planned
        ]
        print_json({"config": plan.settings.model_dump(mode="json"), "stages": stages})
        return
    typer.echo(to_yaml(plan.settings))
    width = max(map(len, actions))
    for spec, training in planned:
        epochs = f"  {training.epochs} epochs" if training else ""
        typer.echo(f"{spec.name:{width}}  {spec.key[:12]}  {actions[spec.name]}{epochs}")
        if training:
            typer.echo(f"{'':{width}}  {training}")


def _show_result(plan: Plan, result: ChainResult, console: Console) -> None:
    from pipelines.storage import Store

    folder = next((s.folder for s in plan.specs if s.kind == "evaluate"), "")
    if "evaluate" in result.stages:
        evaluation = Store(plan.settings.storage.root).read_json(f"{folder}/evaluation.json")
        _show_arms(evaluation["arms"], console)
        console.note(f"report: {folder}/report/report.html")
    if result.model:
        console.note(f"model: {result.model}")


def _show_arms(arms: Sequence[dict[str, Any]], console: Console) -> None:
    columns = {"val/top1": "top1", "val/bpp": "bpp", "val/wire_bytes": "wire bytes"}
    for name in dict.fromkeys(name for arm in arms for name in arm["metrics"]):
        if name.endswith("/miou"):
            columns[name] = f"mIoU {name.split('/')[-2]}"
    rows = []
    for arm in arms:
        values = (arm["metrics"].get(name) for name in columns)
        shown = ("" if value is None else f"{value:.4g}" for value in values)
        rows.append([arm["name"], *shown])
    console.final_table("Results", ("arm", *columns.values()), rows)
