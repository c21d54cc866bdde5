"""The study: does knowing the tasks pay? Trains what is missing, gives points, BD figures, floors.

    python -m benchmarks.rate_accuracy --config configs/tiny_imagenet.yaml --protocol full \
        data.root=FOLDER teacher.weights=FILE

Every seed is one run of the stage chain (`mantis evaluate`), resumable and keyed, so that nothing
is trained twice. A finished point is a row of results/rate_accuracy.csv and its images' sizes and
hits a file below results/images: a point that is there is not trained again, on whatever machine it
was made. The last line is one JSON object. `--data PATH` then scores the models on other images.

`--seeds 0 --phases 1` does a part of it, to be gone on with later or elsewhere.

`--plain SHARDS --jobs N` trains and measures without Ray and MLflow, N processes at once, on shards
that `mantis prepare` wrote: for a machine with a GPU and little else.
"""

import argparse
import csv
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from mantis_core.rate_accuracy import Curve, CurveError, label_floor_bits, over_seeds
from pipelines.plan import Arm, StageSpec, plan_arms
from pipelines.report_figures import rd_figure, styled, to_png
from pipelines.settings import load_settings
from pipelines.stages import Plan, make_plan

RESULTS = Path("results")
FIGURES = {
    "top1": "val/top1",
    "wire_bytes": "val/wire_bytes",
    "payload_bytes": "val/payload_bytes",
    "estimated_bytes": "val/estimated_bytes",
    "coverage": "val/detection/coverage",
    "active_tasks": "val/detection/active_tasks",
    "first_task": "val/detection/first",
}
COLUMNS = ("point", "config", "protocol", "kind", "seed", "rate_weight", "quality", "commit")
CODECS = "{jpeg: [5, 10, 20, 40, 75], webp: [0, 5, 10, 20, 40, 75], avif: [20, 30, 40, 55, 75]}"


@dataclass(frozen=True)
class Protocol:
    """`baselines` by phase: a later phase is begun when every seed has the earlier one."""

    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    phases: tuple[tuple[str, ...], ...]
    overrides: tuple[str, ...] = ()
    codecs: str = "{}"


PROTOCOLS = {
    "screen": Protocol((0,), (1e-3, 4e-3), (("none",),), ("data.train_rows=10000",)),
    "full": Protocol(
        (0, 1, 2),
        (3e-4, 1e-3, 3e-3, 1e-2),
        (("none",), ("none", "none_prior", "student", "oracle", "teacher"), ("per_task",)),
        overrides=("stage1.epochs=6",),
        codecs=CODECS,
    ),
}


@dataclass(frozen=True)
class Step:
    """One run of the chain: a seed with some baselines, its arms and the stages they come from.

    Steps of one `phase` may run side by side."""

    phase: int
    seed: int
    overrides: tuple[str, ...]
    arms: tuple[Arm, ...]
    plan: Plan
    name: str

    @property
    def specs(self) -> Mapping[str, StageSpec]:
        return {spec.name: spec for spec in self.plan.specs}

    def point_of(self, arm: Arm) -> str:
        """Names a point by the key of the weights it measures, for ever."""
        stage = self.specs[arm.stage].key[:12] if arm.stage else f"seed{arm.seed}"
        quality = "" if arm.quality is None else f"-q{arm.quality}"
        return f"{self.name}-{arm.kind}-{stage}{quality}"


def steps(protocol: Protocol, config: str, overrides: Sequence[str]) -> Iterator[Step]:
    """The runs of a study, phase by phase, all seeds in each."""
    main, *others = protocol.rates
    for number, baselines in enumerate(protocol.phases):
        for seed in protocol.seeds:
            own = [
                *overrides,
                *protocol.overrides,
                f"seed={seed}",
                f"stage2.rate_weight={main!r}",
                f"evaluate.rate_weights={others!r}",
                f"evaluate.baseline_rate_weights={list(protocol.rates)!r}",
                f"evaluate.baselines=[{', '.join(baselines)}]",
                "evaluate.seeds=[]",
            ]
            once = number == 1 and seed == protocol.seeds[0]
            own.append(f"evaluate.codecs={protocol.codecs if once else '{}'}")
            own.append("evaluate.codec_teachers=true")
            settings = load_settings(config, own)
            arms = tuple(plan_arms(settings))
            yield Step(number, seed, tuple(own), arms, make_plan(settings), Path(config).stem)


def run_step(step: Step, config: str) -> None:
    """Trains and measures what the step lacks by the stage chain; ends the program if it fails."""
    command = [sys.executable, "-m", "pipelines", "evaluate", "--config", config, *step.overrides]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def collect(step: Step, protocol: str, known: set[str]) -> list[dict[str, Any]]:
    """The rows of the step's points that are not known yet; writes their images' files."""
    folder = Path(step.specs["evaluate"].folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    predictions = pq.read_table(
        folder / "predictions.parquet",
        columns=["arm", "row_id", "class_label", "class_index", "wire_bytes", "payload_bytes"],
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    measured = {arm["name"]: arm["metrics"] for arm in evaluation["arms"]}
    rows = []
    for arm in step.arms:
        point = step.point_of(arm)
        if point in known:
            continue
        known.add(point)
        own = predictions.filter(pc.equal(predictions["arm"], arm.name)).sort_by("row_id")
        images = {name: own[name].to_numpy() for name in own.column_names if name != "arm"}
        (RESULTS / "images").mkdir(parents=True, exist_ok=True)
        np.savez_compressed(
            RESULTS / "images" / f"{point}.npz",
            wire_bytes=images["wire_bytes"].astype(np.int32),
            payload_bytes=images["payload_bytes"].astype(np.float32),
            hits=np.packbits(
                (images["class_index"] == images["class_label"]) & (images["class_label"] >= 0)
            ),
        )
        values = (point, step.name, protocol, arm.kind, arm.seed, arm.rate_weight, arm.quality)
        row = dict(zip(COLUMNS, (*values, commit), strict=True))
        figures = measured[arm.name]
        row |= {name: figures.get(metric) for name, metric in FIGURES.items()}
        labels = sum(len(task["labels"]) for task in evaluation["tasks"])
        row["classes"] = labels if evaluation["single_class"] else None
        rows.append(row)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The table's rows, numbers as numbers, empty cells as None."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: _parsed(value) for name, value in row.items()} for row in csv.DictReader(file)
        ]


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds rows to the table, which is made with its first."""
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *FIGURES, "classes"], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def curves(rows: Sequence[Mapping[str, Any]], size: str) -> dict[str, dict[int, Curve]]:
    """Kind to seed to curve, of kinds that send bytes; `size` is wire_bytes or payload_bytes."""
    found: dict[str, dict[int, Curve]] = {}
    for kind, seed in sorted({(r["kind"], r["seed"]) for r in rows if r["wire_bytes"] is not None}):
        own = [row for row in rows if (row["kind"], row["seed"]) == (kind, seed)]
        sizes, hits = [], []
        for row in sorted(own, key=lambda row: row["wire_bytes"]):
            with np.load(RESULTS / "images" / f"{row['point']}.npz") as images:
                sizes.append(images[size].astype(float))
                hits.append(np.unpackbits(images["hits"], count=len(sizes[-1])).astype(bool))
        found.setdefault(kind, {})[seed] = Curve(np.array(sizes), np.array(hits))
    return found


def bd_figures(rows: Sequence[Mapping[str, Any]], size: str, *, accuracy: bool) -> dict[str, Any]:
    """BD of MANTiS against each baseline: mean, low, high and each seed's, or why there is none."""
    by_kind = curves(rows, size)
    ours = by_kind.pop("mantis", {})
    out: dict[str, Any] = {}
    for kind, theirs in by_kind.items():
        if len(theirs) == 1 and len(ours) > 1:  # an image codec has no seeds
            theirs = dict.fromkeys(ours, next(iter(theirs.values())))
        seeds = sorted(ours.keys() & theirs.keys())
        try:
            if not seeds:
                raise CurveError("no seed has both")
            found = over_seeds(
                [theirs[s] for s in seeds], [ours[s] for s in seeds], accuracy=accuracy
            )
            out[kind] = {
                "mean": round(found.mean, 2),
                "low": round(found.low, 2),
                "high": round(found.high, 2),
                "seeds": [round(value, 2) for value in found.seeds],
            }
        except CurveError as error:
            out[kind] = {"refused": str(error)}
    return out


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One point a kind and rate: means and standard deviations over seeds, and the floor."""
    points = []
    groups = {(row["kind"], row["rate_weight"], row["quality"]) for row in rows}
    for kind, rate, quality in sorted(groups, key=str):
        own = [
            r for r in rows if (r["kind"], r["rate_weight"], r["quality"]) == (kind, rate, quality)
        ]
        point: dict[str, Any] = {
            "kind": kind,
            "rate_weight": rate,
            "quality": quality,
            "seeds": sorted(row["seed"] for row in own),
        }
        for name in FIGURES:
            values = [row[name] for row in own if row[name] is not None]
            if values:
                point[name] = round(float(np.mean(values)), 5)
            if len(values) > 1:
                point[f"{name}_std"] = round(float(np.std(values, ddof=1)), 5)
        if own[0]["classes"] and "payload_bytes" in point:
            floor = label_floor_bits(int(own[0]["classes"]), point["top1"])
            point["floor_bits"] = round(floor, 3)
            point["payload_over_floor"] = (
                round(8 * point["payload_bytes"] / floor, 1) if floor else None
            )
        points.append(point)
    return points


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The R-D curves of all kinds, seeds as small marks, as a PNG."""
    arms = [
        {
            "kind": row["kind"],
            "rate_weight": row["rate_weight"],
            "quality": row["quality"],
            "metrics": {FIGURES[name]: row[name] for name in FIGURES if row[name] is not None},
        }
        for row in rows
    ]
    with styled():
        return to_png(rd_figure(arms, width=8.0))


def score_elsewhere(done: Sequence[Step], data: str) -> list[dict[str, Any]]:
    """Every trained codec of the study on other images of its classes."""
    scored = []
    for folder in sorted({s.specs[a.stage].folder for s in done for a in s.arms if a.stage}):
        model = Path(folder) / "checkpoint"
        if "stage2" not in folder or "per_task" in folder or not model.is_dir():
            continue
        command = [sys.executable, "-m", "pipelines", "evaluate", "--json"]
        command += ["--model", str(model), "--data", data]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        metrics = json.loads(answer.splitlines()[-1])["metrics"]
        scored.append(
            {"model": Path(folder).name, **{n: metrics.get(m) for n, m in FIGURES.items()}}
        )
    return scored


def main() -> None:
    """Runs the study's missing steps, then prints points and, last, one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--protocol", choices=PROTOCOLS, required=True)
    parser.add_argument("--data", help="score the trained models on these images too")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the curves there")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these of the protocol's")
    parser.add_argument("--phases", type=int, help="only the first so many of the protocol's")
    parser.add_argument("--plain", metavar="SHARDS", help="without Ray, on these prepared shards")
    parser.add_argument("--jobs", type=int, default=1, help="with --plain: processes at once")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    protocol = PROTOCOLS[arguments.protocol]
    strangers = sorted(set(arguments.seeds or ()) - set(protocol.seeds))
    if strangers:
        parser.error(f"--seeds {strangers}: protocol {arguments.protocol} has {protocol.seeds}")
    table = RESULTS / "rate_accuracy.csv"
    done: list[Step] = []
    if not arguments.report_only:
        done = [
            step
            for step in steps(protocol, arguments.config, arguments.overrides)
            if (arguments.seeds is None or step.seed in arguments.seeds)
            and (arguments.phases is None or step.phase < arguments.phases)
        ]
        for _, phase in itertools.groupby(done, key=lambda step: step.phase):
            known = {row["point"] for row in read_rows(table)}
            missing = [s for s in phase if any(s.point_of(arm) not in known for arm in s.arms)]
            if arguments.plain and missing:
                from benchmarks.plain_chain import run_plain

                plans = [step.plan for step in missing]
                run_plain(plans, prepared=arguments.plain, jobs=arguments.jobs, say=_say)
            for step in missing:
                if not arguments.plain:
                    run_step(step, arguments.config)
                append_rows(table, collect(step, arguments.protocol, known))
    wanted = (Path(arguments.config).stem, arguments.protocol)
    rows = [row for row in read_rows(table) if (row["config"], row["protocol"]) == wanted]
    points = summarise(rows)
    _show(points)
    result: dict[str, Any] = {
        "points": points,
        "bd_rate": bd_figures(rows, "wire_bytes", accuracy=False),
        "bd_rate_payload": bd_figures(rows, "payload_bytes", accuracy=False),
        "bd_top1": bd_figures(rows, "wire_bytes", accuracy=True),
    }
    if arguments.plot:
        arguments.plot.write_bytes(plot(rows))
    if arguments.data:
        result["elsewhere"] = score_elsewhere(done, arguments.data)
    print(json.dumps(result))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _show(points: Sequence[Mapping[str, Any]]) -> None:
    columns = ("kind", "rate_weight", "quality", "seeds", "top1", "top1_std", "wire_bytes")
    columns += ("payload_bytes", "coverage", "active_tasks", "floor_bits", "payload_over_floor")
    shown = Table(*columns)
    for point in points:
        shown.add_row(*("" if point.get(c) is None else str(point[c]) for c in columns))
    Console(stderr=True).print(shown)


def _parsed(value: str) -> Any:
    if value == "":
        return None
    try:
        return int(value)
    except ValueError:
        try:
            return float(value)
        except ValueError:
            return value


if __name__ == "__main__":
    main()
