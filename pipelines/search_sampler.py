"""Which sample of a space comes next: Optuna, asked anew each time with what the journal knows.

A proposal depends on the records, the seed and the trial's number alone, so a resumed search
proposes what the uninterrupted one would have.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pipelines.search_journal import TrialRecord
from pipelines.search_points import losses_of
from pipelines.search_space import Params, distributions
from tune_spaces.domains import Field

if TYPE_CHECKING:
    from optuna.study import Study

SearchKind = Literal["optuna", "random"]


def propose(
    space: Mapping[str, Field],
    records: Iterable[TrialRecord],
    number: int,
    *,
    kind: SearchKind,
    objective: str,
    seed: int,
    startup_trials: int,
    attempt: int = 0,
) -> Params:
    """The sample of trial `number`; another `attempt` gives another one.

    The first `startup_trials`, and all of a random search, are drawn evenly; then multi-objective
    TPE (Ozaki et al., GECCO 2020) learns from every trial's last figures.
    """
    import optuna

    own_seed = random.Random(f"{seed}/{number}/{attempt}").randrange(2**31)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=own_seed)
    if kind == "optuna":
        sampler = optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=startup_trials)
    study = study_of(space, records, objective, sampler)
    return dict(study.ask(distributions(space)).params)


def random_weight(seed: int, number: int) -> float:
    """The weight of the first objective in a trial's scalar cost, evenly from 0 to 1."""
    return random.Random(f"{seed}/{number}/weight").random()


def study_of(
    space: Mapping[str, Field],
    records: Iterable[TrialRecord],
    objective: str,
    sampler: object = None,
    *,
    epoch: int | None = None,
) -> Study:
    """An Optuna study in memory of the trials that have a point, all objectives minimised.

    Each trial counts by its last figures, or by those of one `epoch`. One that failed is told as
    such; one that runs and has no point yet is told as running, so that it is not proposed twice.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    known = distributions(space)
    dimensions = 2 if objective == "pareto" else 1
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * dimensions, sampler=sampler)
    for record in records:
        if epoch is not None:
            figures = record.epochs.get(epoch, {})
        else:
            last = record.epochs[max(record.epochs)] if record.epochs else {}
            figures = record.figures or last
        losses = None if record.state == "failed" else losses_of(figures, objective)
        state = TrialState.COMPLETE
        if losses is None:
            state = TrialState.RUNNING if record.state == "running" else TrialState.FAIL
        study.add_trial(
            create_trial(
                state=state, values=losses, params=dict(record.params), distributions=known
            )
        )
    return study


def importances(
    space: Mapping[str, Field], records: Iterable[TrialRecord], *, epoch: int
) -> dict[str, dict[str, float]]:
    """Which fields matter for each objective: name of the objective to field to share (sum 1).

    By Optuna's PED-ANOVA over points after the same number of epochs, as those of stopped trials
    and finished ones could not be compared otherwise. Empty with fewer than four points.
    """
    import optuna

    found: dict[str, dict[str, float]] = {}
    for objective in ("bits", "top1"):
        study = study_of(space, records, objective, epoch=epoch)
        complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        if len(complete) < MIN_TRIALS or len({trial.values[0] for trial in complete}) == 1:
            continue
        found[objective] = optuna.importance.get_param_importances(study)
    return found


MIN_TRIALS = 4
