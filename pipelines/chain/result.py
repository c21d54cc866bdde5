"""The result of a run of the chain, on Ray or in plain processes, and what is noted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.stages.record import made_by, mark_adopted
from pipelines.stages.spec import StageOutcome, StageSpec
from pipelines.storage import Store
from pipelines.terminal.console import Console
from pipelines.training.files import COMPUTED_ON


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


def hardware_tags(result: Mapping[str, Any]) -> dict[str, str]:
    """Returns the tags of a stage's run: mantis.device, mantis.precision and so on.

    Different values of one entry, such as two kinds of GPU, stand beside each other. A stage that
    computes nothing with torch, or that earlier code has finished, has none.
    """
    values: dict[str, list[str]] = {}
    for hardware in result.get(COMPUTED_ON, []):
        for name, value in hardware.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            if value is not None and text not in values.setdefault(name, []):
                values[name].append(text)
    return {f"mantis.{name}": ", ".join(texts) for name, texts in values.items()}
