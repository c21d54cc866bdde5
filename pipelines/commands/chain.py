"""Commands that run stages: run, prepare, teacher, stage1, stage2, evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from data_prep.sources.remembering import one_look
from pipelines.commands.errors import (
    MISTAKE,
    Stopped,
    ending_well,
    print_json,
    resumable,
    terminal,
)
from pipelines.commands.messages import command_line
from pipelines.commands.options import (
    Address,
    AsJson,
    Config,
    DryRun,
    Model,
    Overrides,
    Root,
    joined,
    model_folder,
)
from pipelines.stages.order import STAGES
from pipelines.stages.spec import with_upstream

if TYPE_CHECKING:
    from pipelines.chain.plan import Plan
    from pipelines.settings.sections import Settings
    from pipelines.terminal.console import Console

Adopt = Annotated[
    bool,
    typer.Option(
        "--adopt",
        help="Reuse finished stages of the same recipe made by other code or package versions.",
    ),
]


@ending_well
@one_look()
def run(
    config: Config,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SHARDS KEY=VALUE",
            help="Overrides of config fields, such as stage2.rate_weight=0.01. With --plain also "
            "a folder of shards from `mantis prepare`.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    address: Address = None,
    adopt: Adopt = False,
    plain: Annotated[
        bool, typer.Option("--plain", help="Run in plain processes, without Ray and MLflow.")
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", min=1, help="With --plain, number of stages or arms that run at once."
        ),
    ] = 1,
) -> None:
    """Run the whole chain: prepare, train, evaluate, register.

    Skips finished stages and resumes interrupted ones.

    Example: mantis run --config configs/quickstart.yaml stage2.epochs=4
    """
    folders = [each for each in arguments or () if "=" not in each]
    overrides = [each for each in arguments or () if "=" in each]
    if len(folders) > int(plain):
        allowed = "one folder of shards and overrides" if plain else "overrides"
        raise Stopped(
            f"error: {folders[-1]!r} is not of the form key=value; `mantis run"
            f"{' --plain' if plain else ''}` takes {allowed}, such as stage2.rate_weight=0.01",
            MISTAKE,
        )
    if jobs > 1 and not plain:
        raise Stopped(
            "error: --jobs needs --plain. On Ray, `cluster.workers` is the number of processes of "
            "a training.",
            MISTAKE,
        )
    plan = _plan(config, joined(overrides, address), adopt=adopt)
    if dry_run:
        print_plan(plan, plan.specs, as_json, ray=not plain)
        return
    options = [
        *(["--adopt"] if adopt else []),
        *(["--plain", "--jobs", str(jobs)] if plain else []),
    ]
    resume = _command("run", config, [*options, *(arguments or ())], address)
    if plain:
        _run_plain(plan, next(iter(folders), None), jobs, config.stem, as_json, resume)
    else:
        _run(plan, None, config.stem, as_json, resume)


@ending_well
@one_look()
def add_task(
    model: Model,
    config: Config,
    overrides: Overrides = None,
    grade: Annotated[
        Literal["server", "row", "adapter"] | None,
        typer.Option(
            "--grade",
            help="What changes. server: answers alone. row: also a row of the client's "
            "conditioning and coding tables. adapter: also low-rank changes of its encoder. The "
            "default is `extend.grade`.",
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    address: Address = None,
    root: Root = None,
) -> None:
    """Add the tasks of a config to a trained codec, and register it with them.

    Streams and answers of all tasks of before stay as they are, to the bit. With the grade server
    the new tasks are answered from what is sent already. With row and adapter they have streams of
    their own, and clients take a patch to send these (`mantis patch`). The config holds `data`,
    `tasks` and, if wanted, `extend`. Skips finished stages and resumes interrupted ones.

    Example: mantis add-task models:/mantis@champion --config birds.yaml --grade row
    """
    from pipelines.extending.plan import extension_plan

    overrides = [*(overrides or ()), *([] if grade is None else [f"extend.grade={grade}"])]
    plan = extension_plan(model_folder(model, root), config, joined(overrides, address))
    if dry_run:
        print_plan(plan, plan.specs, as_json)
        return
    words = [model, "--config", str(config), *(["--root", str(root)] if root else [])]
    words += [*([] if address is None else ["--address", address]), *overrides]
    _run(plan, None, config.stem, as_json, command_line(["add-task", *words]))


def _stage_command(name: str, text: str) -> Callable[..., None]:
    """Returns the command that runs the chain up to the stage `name`."""

    def command(
        config: Config,
        overrides: Overrides = None,
        dry_run: DryRun = False,
        as_json: AsJson = False,
        address: Address = None,
        adopt: Adopt = False,
    ) -> None:
        plan = _plan(config, joined(overrides, address), adopt=adopt)
        if name not in plan.by_name:
            raise Stopped(
                f"error: this config has no stage {name}: teacher.weights is "
                f"{plan.settings.teacher.weights!r}. Only `train` trains one.",
                MISTAKE,
            )
        if dry_run:
            print_plan(plan, with_upstream(plan.specs, name), as_json)
            return
        options = ["--adopt"] if adopt else []
        resume = _command(name, config, [*options, *(overrides or ())], address)
        _run(plan, name, config.stem, as_json, resume)

    command.__name__ = name
    command.__doc__ = (
        f"{text}\n\nRuns missing stages before it and skips finished ones.\n\n"
        f"Example: mantis {name} --config configs/quickstart.yaml"
    )
    return ending_well(one_look()(command))


COMMANDS = (
    run,
    add_task,
    *(_stage_command(stage.name, stage.help) for stage in STAGES.values() if stage.help),
)


def _plan(config: Path, overrides: Sequence[str], *, adopt: bool) -> Plan:
    from pipelines.chain.plan import make_plan
    from pipelines.settings.reading import load_settings

    return make_plan(load_settings(config, overrides), adopt=adopt)


def _command(name: str, config: Path, words: Sequence[str], address: str | None) -> str:
    """Returns the command line that repeats the command."""
    own = [] if address is None else ["--address", address]
    return command_line([name, "--config", str(config), *own, *words])


def _run(plan: Plan, until: str | None, name: str, as_json: bool, resume: str) -> None:
    """Runs the chain on Ray and shows its results."""
    from pipelines.chain.run import run_chain

    with _console(plan.settings, as_json, resume) as console:
        result = run_chain(plan, console=console, config_name=name, until=until)
        if "evaluate" in result.stages:
            _show_evaluation(plan, console)
        if result.model:
            console.note(f"model: {result.model}")
    if as_json:
        print_json(asdict(result))


def _run_plain(
    plan: Plan, shards: str | None, jobs: int, name: str, as_json: bool, resume: str
) -> None:
    """Runs the chain in plain processes and shows its results."""
    import sys

    from pipelines.chain.plain import plain_chain
    from pipelines.cluster.preflight import check_room
    from pipelines.terminal.console import Console

    check_room(plan.settings.storage.root)
    with (
        resumable(resume),
        Console(sys.stderr if as_json else sys.stdout, live=False) as console,
    ):
        result = plain_chain(plan, shards=shards, jobs=jobs, console=console, config_name=name)
        _show_evaluation(plan, console)
        if "register" in plan.by_name:
            console.note(
                "no model was registered: that needs MLflow and `mantis run` without --plain"
            )
    if as_json:
        print_json(asdict(result))


@contextmanager
def _console(settings: Settings, as_json: bool, resume: str) -> Iterator[Console]:
    """Yields the console of a run on Ray."""
    from pipelines.terminal.console import Console

    with terminal(settings, as_json, resume) as stream, Console(stream) as console:
        yield console


def print_plan(
    plan: Plan,
    specs: Sequence[Any],
    as_json: bool,
    *,
    space: Mapping[str, str] | None = None,
    ray: bool = True,
) -> None:
    """Prints what a run of these stages would do, with the reason for each that would run.

    `space` are the searched fields and their domains, as text. `ray` is False for `--plain`.
    """
    import yaml

    from pipelines.chain.effort import ASSUMED, effort_of, in_all
    from pipelines.chain.keys import without_defaults
    from pipelines.chain.preflight import Preflight, check_batch_fits, few_steps, listed_rows
    from pipelines.chain.reasons import why_new
    from pipelines.cluster.preflight import unused_gpu
    from pipelines.settings.reading import printable
    from pipelines.settings.tracking import describe_store
    from pipelines.stages.record import read_result, stage_state
    from pipelines.stages.schedule import schedule
    from pipelines.storage import Store

    store, uri = Store(plan.settings.storage.root), plan.settings.tracking.uri
    names = {"done": "skip", "started": "resume", "new": "run"}
    preflight = Preflight(plan, specs, dry=True)
    notes = preflight.check()
    actions = {
        spec.name: "adopt" if spec.adopted_for else names[stage_state(store, spec, uri)]
        for spec in specs
    }
    trainings, rows = [spec for spec in specs if spec.stage.trains], None
    if actions["prepare"] in ("skip", "adopt"):
        rows = read_result(store, specs[0])["rows"]["train"]
    elif trainings:
        rows = listed_rows(plan)
        check_batch_fits(trainings, rows)
        notes += few_steps(trainings, rows)
    if ray and trainings:
        notes += unused_gpu(plan.settings)
    planned = [(spec, schedule(spec, rows)) for spec in specs]
    efforts = {
        spec.name: effort
        for spec, training in planned
        if training and spec.name in preflight.costs
        if (effort := effort_of(preflight.costs[spec.name], training))
    }
    reasons = {
        spec.name: why_new(store, spec) if actions[spec.name] == "run" else "" for spec in specs
    }
    mlflow = describe_store(plan.settings.tracking, plan.settings.storage.root)
    if as_json:
        stages = [
            {
                "stage": spec.name,
                "key": spec.key,
                "action": actions[spec.name],
                "reason": reasons[spec.name],
                "epochs": training and training.epochs,
                "training": training and asdict(training),
                "effort": asdict(efforts[spec.name]) if spec.name in efforts else None,
            }
            for spec, training in planned
        ]
        config = printable(plan.settings).model_dump(mode="json")
        searched = {} if space is None else {"space": dict(space)}
        found = {"config": config, "mlflow": mlflow, "stages": stages, "notes": notes}
        if preflight.macs:
            found["client"] = dict(zip(("macs", "detector_macs"), preflight.macs, strict=True))
        print_json({**found, **searched})
        return
    typer.echo("# The fields that differ from their defaults; --json prints all of them.")
    chosen = without_defaults(printable(plan.settings))
    typer.echo(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True))
    typer.echo(f"MLflow: {mlflow}")
    if preflight.macs:
        whole, detector = (f"{macs / 1e6:.1f}" for macs in preflight.macs)
        size = " x ".join(map(str, plan.settings.data.size))
        typer.echo(
            f"client: {whole} million multiply-adds for an image of {size} pixels, {detector} of "
            "them for detection alone"
        )
    width = max(map(len, actions))
    for spec, training in planned:
        epochs = f"  {training.epochs} epochs" if training else ""
        typer.echo(f"{spec.name:{width}}  {spec.key[:12]}  {actions[spec.name]}{epochs}")
        if reasons[spec.name]:
            typer.echo(f"{'':{width}}  {reasons[spec.name]}")
        if training:
            typer.echo(f"{'':{width}}  {training}")
        if spec.name in efforts:
            typer.echo(f"{'':{width}}  {efforts[spec.name]}")
    if efforts:
        macs = sum(each.macs for each in efforts.values())
        uncounted = [spec.name for spec, each in planned if each and spec.name not in efforts]
        without = f", without {', '.join(uncounted)}" if uncounted else ""
        typer.echo(f"trainings{without}: {in_all(macs)}")
        notes.append(ASSUMED)
    for name, domain in (space or {}).items():
        typer.echo(f"searched: {name} in {domain}")
    for text in notes:
        typer.echo(f"note: {text}")


def _show_evaluation(plan: Plan, console: Console) -> None:
    from pipelines.report.chance import chance_sentences
    from pipelines.storage import Store

    folder = plan.by_name["evaluate"].folder
    evaluation = Store(plan.settings.storage.root).read_json(f"{folder}/evaluation.json")
    _show_arms(evaluation["arms"], console)
    for sentence in chance_sentences(evaluation):
        console.note(sentence)
    console.note(f"report: {folder}/report/report.html")


def _show_arms(arms: Sequence[dict[str, Any]], console: Console) -> None:
    columns = {"val/top1": "top1", "val/bpp": "bpp", "val/wire_bytes": "wire bytes"}
    if not any("val/top1" in arm["metrics"] for arm in arms):
        del columns["val/top1"]  # segmentations alone
    for name in dict.fromkeys(name for arm in arms for name in arm["metrics"]):
        if name.startswith("val/task/") and name.endswith("/miou"):
            columns[name] = f"mIoU {name.split('/')[-2]}"
    rows = []
    for arm in arms:
        values = (arm["metrics"].get(name) for name in columns)
        shown = ("" if value is None else f"{value:.4g}" for value in values)
        rows.append([arm["name"], *shown])
    console.final_table("Results", ("arm", *columns.values()), rows)
