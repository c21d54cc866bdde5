"""What is said of trainings before they start: rows, steps, classes; when networks are tried."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import DataError
from data_prep.manifest import Manifest, ShardInfo, SplitInfo, TaskTable, write_manifest
from mantis_core.errors import ModelError
from pipelines.chain import preflight as module
from pipelines.chain.plan import Plan, make_plan
from pipelines.chain.preflight import Preflight
from pipelines.chain.run import workers_at_start
from pipelines.settings.errors import SettingsError
from pipelines.settings.reading import load_settings
from pipelines.settings.sections import ClusterConfig
from pipelines.stages.record import mark_done, mark_started
from pipelines.stages.schedule import schedule
from pipelines.storage import Store
from tests.pipelines.fakes import same_code

CONFIG = """
data: {sources: [{kind: shapes, train_rows: 20, val_rows: 10}]}
tasks: [{name: outline, classes_from: shapes}]
teacher: {weights: train}
evaluate: {baselines: [none]}
tracking: {enabled: false}
"""
ADVISED = [
    f"{section}.{field}"
    for section in ("stage1", "stage2")
    for field in ("batch_size=16", "epochs=25")
]


class Bench:
    """Plans of one config, prepared folders without images, and what was asked of networks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tried: list[Sequence[bool]] = []
        self.errors: dict[bool, ModelError] = {}

    def plan(self, *overrides: str) -> Plan:
        return make_plan(load_settings(self.folder / "tiny.yaml", overrides))

    def networks(
        self, settings: object, trainings: object, table: TaskTable, possible: Sequence[bool]
    ) -> dict[bool, module.Fit]:
        self.tried.append(tuple(possible))
        return {one: module.Fit(self.errors.get(one), (5, 2)) for one in possible}

    def prepare(
        self,
        plan: Plan,
        *,
        rows: Mapping[str, int] | None = None,
        remarks: tuple[str, ...] = (),
        single_class: bool = True,
    ) -> str:
        """Finishes `prepare`, with a manifest alone."""
        counts = {"train": 20_000, "holdout": 100, "val": 50, **(rows or {})}
        spec, table = plan.specs[0], plan.table
        store = Store(plan.settings.storage.root)
        splits = {}
        for split, count in counts.items():
            path = f"shards/{split}.parquet"
            shard = ShardInfo(path=path, rows=count, bytes=1, sha256="", row_group_rows=(count,))
            splits[split] = SplitInfo(rows=count, bytes=1, shards=(shard,) if count else ())
        manifest = Manifest(
            image_size=plan.settings.data.size,
            tasks=table.tasks,
            classes=table.classes,
            class_names=table.class_names,
            single_class=single_class,
            seed=0,
            splits=splits,
            unassigned={},
            rejected=0,
            fingerprint="",
            sources=(),
            remarks=remarks,
        )
        write_manifest(spec.folder, manifest)
        mark_started(store, spec)
        mark_done(store, spec, {}, None)
        return spec.folder


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    same_code(monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    bench = Bench(tmp_path)
    monkeypatch.setattr(module, "tried_networks", bench.networks)
    return bench


def check(plan: Plan, *kinds: str) -> list[str]:
    return Preflight(plan, [s for s in plan.specs if not kinds or s.kind in kinds]).check()


def test_what_the_client_costs_is_known_once_networks_were_built(bench: Bench) -> None:
    plan = bench.plan()
    preflight = Preflight(plan, plan.specs)
    assert preflight.macs is None
    preflight.check()
    assert preflight.macs == (5, 2)


def test_a_plan_that_fits_gets_no_note(bench: Bench) -> None:
    plan = bench.plan()
    assert check(plan) == []
    bench.prepare(plan)
    assert check(plan) == []


def test_a_dry_run_says_what_the_sources_hold_until_it_is_prepared(bench: Bench) -> None:
    plan = bench.plan()
    preflight = Preflight(plan, plan.specs[:1], dry=True)
    train, val, *others = preflight.check()
    assert train.startswith("train: ")
    assert "outline/triangle" in train
    assert val.startswith("val: ")
    assert any("of no task, with the classes" in note for note in others)
    bench.prepare(plan)
    assert preflight.check() == []


def test_a_task_without_images_is_refused_before_prepare(bench: Bench) -> None:
    plan = bench.plan("tasks.0.classes_from=null", "tasks.0.classes=[outline/star, outline/circle]")
    plan = dataclasses.replace(
        plan, table=dataclasses.replace(plan.table, classes=("nothing", "none"))
    )
    with pytest.raises(DataError, match="task 'outline' has no training image"):
        check(plan)


@pytest.mark.parametrize(
    ("override", "section"),
    [
        ("teacher.training.batch_size=128", "teacher.training.batch_size"),
        ("stage2.batch_size=128", "stage2.batch_size"),
    ],
)
def test_fewer_images_than_the_batch_are_refused_with_the_key(
    bench: Bench, override: str, section: str
) -> None:
    others = [f"{name}.batch_size=4" for name in ("teacher.training", "stage1", "stage2")]
    plan = bench.plan(*others, override)
    bench.prepare(plan, rows={"train": 58})
    message = rf"^{section} is 128, and there are 58 training images: set it to 58 or less"
    with pytest.raises(SettingsError, match=message):
        check(plan)


def test_data_without_held_back_images_is_refused(bench: Bench) -> None:
    plan = bench.plan()
    bench.prepare(plan, rows={"holdout": 0})
    with pytest.raises(DataError, match=r"set data\.holdout_fraction to more than 0"):
        check(plan)


def test_a_batch_that_does_not_divide_is_refused_before_prepare(bench: Bench) -> None:
    with pytest.raises(SettingsError, match="does not divide among 3 workers"):
        check(bench.plan("cluster.workers=3"))


def test_few_steps_are_noted_once_for_each_section(bench: Bench) -> None:
    plan = bench.plan("teacher.training.batch_size=4")
    bench.prepare(plan, rows={"train": 260})
    notes = check(plan)
    assert [note.split()[0] for note in notes] == ["stage1", "stage2"]
    assert notes[1].startswith("stage2 trains for 8 steps on 260 images")
    assert "set stage2.batch_size=16 and stage2.epochs=25 for about 400 steps" in notes[1]
    assert check(bench.plan("teacher.training.batch_size=4", *ADVISED)) == []


@pytest.mark.parametrize("workers", [1, 3, 4])
@pytest.mark.parametrize("rows", [9, 48, 300, 5_000])
@pytest.mark.parametrize("batch", [12, 24, 120])
def test_the_advice_makes_enough_steps_and_divides_among_the_workers(
    bench: Bench, workers: int, rows: int, batch: int
) -> None:
    plan = bench.plan(f"stage2.batch_size={batch}", f"cluster.workers={workers}")
    planned = schedule(plan.by_name["stage2"], rows)
    assert planned is not None
    size, epochs = module.enough_steps(rows, planned)
    assert size <= batch
    assert size % workers == 0
    assert size > rows or (rows // size) * epochs >= module.ADVISED_STEPS


def test_rows_are_counted_in_the_sources_before_they_are_prepared(bench: Bench) -> None:
    assert module.listed_rows(bench.plan()) == 7  # 8 of 20 images show an outline
    assert module.listed_rows(bench.plan("data.holdout_fraction=0.5")) == 4


def test_few_held_back_images_and_remarks_on_the_data_are_noted(bench: Bench) -> None:
    plan = bench.plan()
    remark = "no val image of task outline: no figure covers them"
    bench.prepare(plan, rows={"holdout": 3}, remarks=(remark,))
    few, val = check(plan)
    assert few.startswith("only 3 of the training images are held back")
    assert val == remark


def test_what_prepare_has_just_remarked_is_not_said_again(bench: Bench) -> None:
    plan = bench.plan()
    bench.prepare(plan, remarks=("a remark",))
    assert Preflight(plan, plan.specs).check(remarked=True) == []


def test_finished_trainings_are_not_checked(bench: Bench) -> None:
    plan = bench.plan("cluster.workers=3")
    assert check(plan, "prepare", "evaluate", "register") == []
    assert bench.tried == []


def test_networks_that_fit_some_data_wait_for_the_data(bench: Bench) -> None:
    plan = bench.plan()
    bench.errors[True] = ModelError("not for images of one class")
    preflight = Preflight(plan, plan.specs)
    assert preflight.check() == []
    bench.prepare(plan)
    with pytest.raises(ModelError, match="not for images of one class"):
        preflight.check()
    assert bench.tried == [(True, False)]


def test_networks_that_fit_no_data_are_refused_before_prepare(bench: Bench) -> None:
    bench.errors = {True: ModelError("no such split"), False: ModelError("no such split")}
    with pytest.raises(ModelError, match="no such split"):
        check(bench.plan())


def test_networks_are_built_in_a_process_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Died:
        def __enter__(self) -> Died:
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, *job: Any) -> Any:
            asked.append(job)
            raise module.BrokenProcessPool

    monkeypatch.undo()
    same_code(monkeypatch)
    monkeypatch.setattr(module, "pool_of", lambda jobs: Died())
    plan = bench.plan()
    tried = module.tried_networks(plan.settings, plan.specs, plan.table, [True])
    assert tried == {True: module.Fit()}
    assert asked


@pytest.mark.parametrize(
    ("autoscaling", "waiting", "expected"),
    [
        (False, ["prepare", "stage1", "evaluate"], 4),
        (True, ["prepare", "stage1", "evaluate"], 1),
        (True, ["stage1", "evaluate"], 4),
        (True, ["prepare"], 0),
        (False, ["prepare"], 0),
        (False, ["evaluate", "register"], 4),
    ],
)
def test_nodes_are_paid_for_when_there_is_work_for_them(
    autoscaling: bool, waiting: list[str], expected: int
) -> None:
    cluster = ClusterConfig(workers=4, autoscaling=autoscaling)
    assert workers_at_start(cluster, waiting) == expected
