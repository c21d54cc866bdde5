"""What is known of trainings before they start: settings against rows, classes and networks.

Whatever is wrong is an error here, before Ray starts. What only looks wrong is a note. Machines and
clusters are checked in `pipelines/cluster/preflight.py`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from data_prep.errors import DataError
from data_prep.sources.remembering import forget
from pipelines.chain.effort import Cost
from pipelines.chain.plan import Plan
from pipelines.chain.processes import pool_of
from pipelines.cluster.preflight import slow_precision
from pipelines.settings.errors import SettingsError
from pipelines.stages.record import stage_state
from pipelines.stages.schedule import Schedule, check_batches, schedule
from pipelines.stages.spec import StageSpec
from pipelines.storage import Store

if TYPE_CHECKING:
    from data_prep.manifest import Manifest, TaskTable
    from mantis_core.errors import ModelError
    from pipelines.settings.sections import Settings

logger = logging.getLogger(__name__)
FEWEST_STEPS = 100
"""A training of fewer steps hardly moves random weights. The quickstart's have 104 and more."""
ADVISED_STEPS = 400
"""Steps with which a training of a few hundred images came close to its best."""
ADVISED_PER_EPOCH = 15
SMALLEST_BATCH = 8
FINE_TUNED = ("individual", "codec_teacher")
"""Stages that begin with the weights of the teacher. A few steps may be enough for them."""
WITH_A_CODEC = ("extend",)
"""Stages whose networks are those of a trained codec."""
FEWEST_HELD_BACK = 8


class Fit(NamedTuple):
    """Why networks do not fit, None if they do; else what they cost.

    `macs` are the client's multiply-adds for one image, and those of them that only detection
    needs. `costs` are those of a step of each training, by the name of the stage.
    """

    error: ModelError | None = None
    macs: tuple[int, int] | None = None
    costs: Mapping[str, Cost] = {}


@dataclass
class Preflight:
    """The checks of one command, over the stages that it is to run.

    `networks` remembers which networks fit: for data of one class an image (True), and for other
    data (False). The data says which it is once it is prepared. `saw_rows` is whether there were
    rows to check. With `dry`, where nothing follows, the notes say what the sources hold. `macs`
    and `costs` are what client and trainings cost, as `Fit` has it, once networks were built.
    """

    plan: Plan
    specs: Sequence[StageSpec]
    networks: dict[bool, Fit] = field(default_factory=dict)
    macs: tuple[int, int] | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    saw_rows: bool = False
    dry: bool = False

    def check(self, prepared: str | None = None, *, remarked: bool = False) -> list[str]:
        """Checks the unfinished trainings. Returns notes for the user.

        `prepared` is a folder of shards. None takes that of the stage `prepare`, and before that
        has finished checks what needs no rows. What `prepare` remarked on the data is among the
        notes, unless it was `remarked` a moment ago. Raises SettingsError, DataError or ModelError.
        """
        from data_prep.manifest import read_manifest

        store, uri = Store(self.plan.settings.storage.root), self.plan.settings.tracking.uri
        first = self.plan.specs[0]
        if prepared is None and stage_state(store, first, uri) == "done":
            prepared = first.folder
        notes: list[str] = []
        if prepared is None:
            notes = self._listed()
        else:
            forget()  # nothing looks at the sources again
        waiting = [
            spec
            for spec in self.specs
            if spec.stage.trains and stage_state(store, spec, uri) != "done"
        ]
        if not waiting:
            return notes
        check_batches(waiting)
        if not self.networks:  # the first time
            sections = [spec.stage.section for spec in waiting]
            notes += slow_precision(self.plan.settings, sections)
        manifest = None if prepared is None else read_manifest(prepared)
        if prepared is not None and manifest is not None:
            self.saw_rows = True
            check_rows(waiting, manifest)
            notes += few_steps(waiting, manifest.split("train").rows)
            notes += few_held_back(manifest)
            notes += () if remarked else manifest.remarks
        if built := [spec for spec in waiting if spec.kind not in WITH_A_CODEC]:
            self._check_networks(built, None if manifest is None else manifest.single_class)
        return notes

    def _listed(self) -> list[str]:
        """Returns what the sources hold, for a dry run. Raises DataError if that will not do."""
        from data_prep.prepare.remarks import listing_remarks

        found = listing_remarks(self.plan.settings.data, self.plan.table)
        return found if self.dry else []

    def _check_networks(self, trainings: Sequence[StageSpec], single_class: bool | None) -> None:
        """Raises ModelError if networks do not fit, whatever the data may turn out to be."""
        table = self.plan.table
        possible = [single_class] if single_class is not None else [True, False]
        if not table.classes:
            possible = [False]
        if missing := [one for one in possible if one not in self.networks]:
            self.networks |= tried_networks(self.plan.settings, trainings, table, missing)
        found = [self.networks[one] for one in possible]
        if all(each.error for each in found):
            assert found[0].error is not None
            raise found[0].error
        fits = next(each for each in found if not each.error)
        self.macs, self.costs = fits.macs, fits.costs


def check_rows(specs: Sequence[StageSpec], manifest: Manifest) -> None:
    """Raises SettingsError or DataError if a training cannot take a step or choose its epoch."""
    check_batch_fits(specs, manifest.split("train").rows)
    if "holdout" not in manifest.splits or not manifest.split("holdout").rows:
        raise DataError(
            "the prepared folder has no images that are held back from training. They choose the "
            "best epoch and the threshold of the mask: set data.holdout_fraction to more than 0 "
            "and prepare again"
        )


def listed_rows(plan: Plan) -> int:
    """Returns how many images a training will have, counted in the sources. Opens no image.

    Unreadable images count too, since only `prepare` finds them. Raises DataError where a split or
    a task has no image.
    """
    import pyarrow.compute as pc

    from data_prep.prepare.listing import list_sources
    from data_prep.prepare.staging import Job
    from data_prep.storage import absolute

    data = plan.settings.data
    job = Job(data, plan.table, plan.settings.seed, absolute(data.root), "")
    found = list_sources(job, ("train", "val"))
    listed: int = pc.sum(pc.equal(found.references["split"], "train")).as_py() or 0
    if found.divides:
        listed -= round((data.val_fraction or 0.0) * listed)
    return listed - math.ceil(data.holdout_fraction * listed)


def check_batch_fits(specs: Sequence[StageSpec], rows: int) -> None:
    """Raises SettingsError if a training's batch is larger than the number of its images."""
    for spec in specs:
        batch = spec.training.batch_size if spec.stage.trains else 0
        if batch > rows:
            raise SettingsError(
                f"{spec.stage.section}.batch_size is {batch}, and there are {rows} training "
                f"images: set it to {rows} or less, or add images. A smaller one makes more steps "
                f"per epoch"
            )


def few_steps(trainings: Sequence[StageSpec], rows: int) -> list[str]:
    """Returns a note for each section whose training on `rows` images is too short to learn much.

    It names values that would do.
    """
    found: dict[str, str] = {}
    for spec in trainings:
        planned = schedule(spec, rows)
        if planned is None or spec.kind in FINE_TUNED:
            continue
        if planned.steps is not None and planned.steps < FEWEST_STEPS:
            section = spec.stage.section
            batch, epochs = enough_steps(rows, planned)
            lower = f"{section}.batch_size={batch} and " if batch < planned.global_batch else ""
            found[section] = (
                f"{spec.kind} trains for {planned.steps} steps on {rows} images, which is hardly "
                f"enough to learn from ({FEWEST_STEPS} or more are): set {lower}"
                f"{section}.epochs={epochs} for about {ADVISED_STEPS} steps (now batches of "
                f"{planned.global_batch} and {planned.epochs} epochs)"
            )
    return list(found.values())


def enough_steps(rows: int, planned: Schedule) -> tuple[int, int]:
    """Returns a batch size and a number of epochs that make about ADVISED_STEPS steps.

    The batch is halved while an epoch has fewer than ADVISED_PER_EPOCH steps and it still divides
    among the workers.
    """
    batch, most = planned.global_batch, max(planned.workers)
    while rows // batch < ADVISED_PER_EPOCH and batch >= 2 * SMALLEST_BATCH:
        if batch % 2 or (batch // 2) % most:
            break
        batch //= 2
    return batch, math.ceil(ADVISED_STEPS / max(1, rows // batch))


def few_held_back(manifest: Manifest) -> list[str]:
    """Returns a note if very few images choose the best epoch and the threshold of the mask."""
    rows = manifest.split("holdout").rows
    if rows >= FEWEST_HELD_BACK:
        return []
    return [
        f"only {rows} of the training images {'is' if rows == 1 else 'are'} held back to choose "
        "the best epoch and the threshold of the mask: raise data.holdout_fraction"
    ]


def tried_networks(
    settings: Settings, trainings: Sequence[StageSpec], table: TaskTable, possible: Sequence[bool]
) -> dict[bool, Fit]:
    """Builds the networks in a process of its own, so that the driver loads no torch.

    Returns what it found for each of the possible values of `single_class`.
    """
    try:
        with pool_of(1) as pool:
            job = pool.submit(_tried, settings, list(trainings), table, list(possible))
            return job.result()
    except BrokenProcessPool:
        logger.warning("the process that builds the networks died: they are not checked")
        return dict.fromkeys(possible, Fit())


def _tried(
    settings: Settings, trainings: list[StageSpec], table: TaskTable, possible: list[bool]
) -> dict[bool, Fit]:
    warnings.simplefilter("ignore")  # those of libraries, at their import
    from mantis_core.errors import ModelError
    from pipelines.chain.dry_build import check_networks, client_macs

    found = {}
    for single_class in possible:
        try:
            costs = check_networks(trainings, table, single_class=single_class)
            macs = client_macs(settings, table, single_class=single_class)
            found[single_class] = Fit(None, macs, costs)
        except ModelError as error:
            found[single_class] = Fit(error)
    return found
