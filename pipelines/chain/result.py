"""The result of a run of the chain, on Ray or in plain processes, and what is noted of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.stages.record import made_by, mark_adopted
from pipelines.stages.spec import StageOutcome, StageSpec
from pipelines.storage import Store
from pipelines.terminal.console import Console


@dataclass(frozen=True)
class ChainResult:
    """The object that `mantis run --json` prints. `metrics` are those of the main arm."""

    run_id: str | None
    root: str
    stages: dict[str, StageOutcome]
    metrics: dict[str, float]
    model: str | None


def note_adopted(specs: Sequence[StageSpec], store: Store, console: Console) -> None:
    """Records each adopted stage in its own folder, and prints a line about it."""
    for spec in specs:
        if spec.adopted_for:
            mark_adopted(store, spec)
            commit = made_by(store, spec)[:12] or "an unknown commit"
            console.note(
                f"{spec.name}: adopted from {spec.folder}, made with the same recipe by other "
                f"code or packages ({commit})"
            )


def note_all(notes: Sequence[str], console: Console) -> None:
    """Prints the notes of a preflight."""
    for text in notes:
        console.note(f"note: {text}")
