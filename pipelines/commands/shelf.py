"""`mantis ls` and `clean`: what lies below a storage root, and what may go."""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.filesize import decimal

from pipelines.commands.errors import MISTAKE, SOME_FAILED, Stopped, ending_well, print_json
from pipelines.commands.options import AsJson, tracker_of

if TYPE_CHECKING:
    from pipelines.storage import Store

AGE = re.compile(r"(\d+)\s*([smhdw])")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
Root = Annotated[str, typer.Option("--root", help="Storage root of the runs.")]


@ending_well
def ls(root: Root = "./runs", as_json: AsJson = False) -> None:
    """List the stages below a storage root: key, state, size, date, and who uses them.

    Then the runs, newest first, with the ids that report, register and lineage take.

    Example: mantis ls --root runs
    """
    from pipelines.shelf.contents import plans, shelved

    store = _store(root)
    stages = shelved(store, _registered(store, root), since=time.time())
    known = plans(store)
    if as_json:
        runs = [{"config": p.config, "run_id": p.run_id, "used": p.used} for p in known]
        shown = [vars(stage) for stage in stages]
        print_json({"root": store.root, "stages": shown, "runs": runs})
        return
    width = max((len(stage.name) for stage in stages), default=0)
    for stage in stages:
        users = ", ".join(stage.used_by) or "-"
        shown_size = f"{decimal(stage.size):>9}"
        line = f"{stage.name:{width}}  {stage.key}  {stage.state:7}  {shown_size}"
        typer.echo(f"{line}  {_date(stage.changed)}  {users}")
    total = decimal(sum(stage.size for stage in stages))
    typer.echo(f"{len(stages)} stages in {store.root}, {total}")
    for plan in known:
        typer.echo(f"run {plan.run_id or '-'}  {_date(plan.used)}  {plan.config}")


@ending_well
def clean(
    root: Root = "./runs",
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Leave what has changed since: 12h, 30d, 8w. 0d takes all that nothing needs.",
        ),
    ] = "30d",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be removed, remove nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no plan needs any more: old stages, checkpoints, partial files, Ray's logs.

    Keeps the newest plan of each config, and each plan run within --older-than.

    Keeps what a registered model needs, the trials of a search, and stages at work.

    Example: mantis clean --older-than 30d --dry-run
    """
    from pipelines.shelf.contents import shelved
    from pipelines.shelf.sessions import (
        command_lines,
        ended_sessions,
        ray_folders,
        remove_session,
    )
    from pipelines.shelf.sweep import WRITING_S, remove, waste

    store, age, now = _store(root), _seconds(older_than), time.time()
    if as_json and not (yes or dry_run):
        raise Stopped("error: --json asks nothing. Add --yes or --dry-run.", MISTAKE)
    stages = shelved(store, _registered(store, root), since=now - age)
    items = waste(store, stages, now=now, older_than_s=age)
    sessions = ended_sessions(ray_folders(), command_lines(), before=now - max(age, WRITING_S))
    listed: list[dict[str, Any]] = [
        *({"path": store.join(item.path), "bytes": item.size, "why": item.why} for item in items),
        *({"path": str(s.path), "bytes": s.size, "why": "an ended Ray session"} for s in sessions),
    ]
    total = sum(entry["bytes"] for entry in listed)
    for entry in [] if as_json else listed:
        typer.echo(f"{decimal(entry['bytes']):>8}  {entry['path']}  ({entry['why']})")
    if not as_json:
        stay = len(stages) - sum(item.is_stage for item in items)
        what = f"{len(listed)} to remove, {decimal(total)}" if listed else "nothing to remove"
        typer.echo(f"{what}; {stay} of {len(stages)} stages stay")
    go = bool(listed) and not dry_run and (yes or typer.confirm("Remove them?"))
    left: list[str] = []
    if go:
        left = [why for item in items if (why := remove(store, item))]
        left += [why for session in sessions if (why := remove_session(session))]
    if as_json:
        done = {"removed": go, "items": listed, "bytes": total, "left": left}
        print_json({"root": store.root, **done})
    for why in left:
        typer.echo(f"error: {why}", err=True)
    if left:
        raise Stopped(f"error: {len(left)} of {len(listed)} were not removed", SOME_FAILED)
    if go and not as_json:
        typer.echo("removed")


COMMANDS = (ls, clean)


def _store(root: str) -> Store:
    """Returns the store of an existing root."""
    from pipelines.storage import Store

    store = Store(root)
    if not store.is_folder(""):
        raise Stopped(f"error: there is no folder {store.root}. Give --root.", MISTAKE)
    return store


def _registered(store: Store, root: str) -> set[str]:
    """Returns the keys of stages that registered models name, here and on the tracking server.

    Raises Stopped if the runs of this root were recorded in a store that is not named.
    """
    from pipelines.stages.record import recorded_in
    from pipelines.tracking import registry

    roots: list[str | None] = [root] if store.is_local else []
    if os.environ.get("MLFLOW_TRACKING_URI"):
        roots.append(None)
    keys: set[str] = set()
    for each in roots:
        try:
            tracker = tracker_of(each)
        except Stopped:
            if len(roots) == 1 and recorded_in(store):  # in a store that was not named
                raise
            continue  # no run was recorded there, so no model is registered
        for model in registry.models(tracker):
            keys |= {model[name] for name in ("stage_key", "evaluate_key") if model[name]}
    return keys


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def _seconds(age: str) -> float:
    found = AGE.fullmatch(age.strip())
    if found is None:
        raise Stopped(
            f"error: {age!r} is no age. Give a number and s, m, h, d or w, such as 30d.", MISTAKE
        )
    return float(int(found[1]) * SECONDS[found[2]])
