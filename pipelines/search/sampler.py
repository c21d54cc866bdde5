"""Draws samples from a search space with Optuna.

Each call builds a new study from the journal's records. A sample depends on the records, the seed
and the trial's number only, so a resumed search draws the samples of an uninterrupted one.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from pipelines.search.journal import TrialRecord
from pipelines.search.points import RdPoint, SearchObjective
from pipelines.search.space import Params, distributions
from tune_spaces.domains import Field

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from optuna.study import Study

SearchKind = Literal["optuna", "random"]


def propose(
    space: Mapping[str, Field],
    records: Iterable[TrialRecord],
    number: int,
    *,
    kind: SearchKind,
    objective: SearchObjective,
    seed: int,
    startup_trials: int,
    attempt: int = 0,
) -> Params:
    """Returns the sample of trial `number`. Another `attempt` gives another sample.

    A random search draws every sample uniformly; otherwise the first `startup_trials` are uniform.
    Later samples come from multi-objective TPE (Ozaki et al., GECCO 2020), fitted to the last
    figures of every trial.
    """
    import optuna

    own_seed = random.Random(f"{seed}/{number}/{attempt}").randrange(2**31)
    sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=own_seed)
    if kind == "optuna":
        sampler = optuna.samplers.TPESampler(seed=own_seed, n_startup_trials=startup_trials)
    study = study_of(space, records, objective, sampler)
    return dict(study.ask(distributions(space)).params)


def random_weight(seed: int, number: int) -> float:
    """Draws the weight of the first objective in a trial's scalar cost, uniform in [0, 1)."""
    return random.Random(f"{seed}/{number}/weight").random()


def study_of(
    space: Mapping[str, Field],
    records: Iterable[TrialRecord],
    objective: SearchObjective,
    sampler: BaseSampler | None = None,
    *,
    epoch: int | None = None,
) -> Study:
    """Builds an in-memory Optuna study of the trials. All objectives are minimised.

    A trial enters with its last figures, or with those of `epoch` if given. A trial without a point
    enters as running if it still runs, so that its sample is not drawn again, and else as failed.
    """
    import optuna
    from optuna.trial import TrialState, create_trial

    known = distributions(space)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["minimize"] * objective.dimensions, sampler=sampler)
    for record in records:
        if epoch is not None:
            figures = record.epochs.get(epoch, {})
        else:
            last = record.epochs[max(record.epochs)] if record.epochs else {}
            figures = record.figures or last
        losses = None if record.state == "failed" else objective.losses(figures)
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
    space: Mapping[str, Field],
    records: Iterable[TrialRecord],
    reference: RdPoint,
    *,
    epoch: int,
) -> dict[str, dict[str, float]]:
    """Returns the importance of each field for each objective. Those of an objective sum to 1.

    Uses Optuna's PED-ANOVA on the points after `epoch`, because the last points of stopped and
    finished trials are not comparable. Leaves out an objective with fewer than four points or with
    equal values.
    """
    import optuna

    found: dict[str, dict[str, float]] = {}
    for objective in ("bits", "top1"):
        study = study_of(space, records, SearchObjective(objective, reference), epoch=epoch)
        complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
        if len(complete) < MIN_TRIALS or len({trial.values[0] for trial in complete}) == 1:
            continue
        found[objective] = optuna.importance.get_param_importances(study)
    return found


MIN_TRIALS = 4
