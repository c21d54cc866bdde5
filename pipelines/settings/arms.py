"""Every kind of arm: what it measures, which setting requests it, its label and look. Plain data.

An arm is one line of an evaluation. A new kind is one record in `ARM_KINDS`. If it needs code of
its own to answer, that is one function in `pipelines/evaluation/answers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

TUNED = "_tuned"
"""The suffix of kinds whose teacher was fine-tuned on the images of their image codec."""
UNCONDITIONED = ("model.conditioning.kind=none", "model.prior=shared")
"""Overrides of a codec to which tasks make no difference before its server."""
ANSWERING = ("model.send_answer=true",)
"""Override of a codec whose client sends its own answer beside the latent."""


@dataclass(frozen=True)
class Look:
    """How an arm is drawn: `colour` on a white page, `dark` on a dark one.

    An arm that sends nothing has a `dash` pattern: it is drawn as a horizontal line.
    """

    colour: str
    dark: str
    marker: str
    hollow: bool = False
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class ArmKind:
    """One kind of arm.

    `measures` names the stage whose weights it uses. `own` is a stage 2 trained with `overrides`.
    The name of such a kind is that stage 2 at the same rate and seed. Any other value is the stage
    of that name. `asked_by` is the field of `evaluate` that requests the arm; an arm with
    "" is always measured. `answers` names the function of `evaluation.answers` that runs it, and
    `loads` the kind of model it loads. An arm with `own_stage1` has another client than all others
    and starts from a stage 1 of its own. `note` explains the arm in the report.
    """

    name: str
    label: str
    look: Look
    measures: Literal[
        "own",
        "mantis",
        "none",
        "answer",
        "student",
        "local",
        "individual",
        "teacher",
        "codec_teacher",
    ]
    asked_by: Literal["", "baselines", "early_exit", "codecs", "codec_teachers"] = "baselines"
    answers: Literal["codec", "oracle", "student", "local", "per_task", "individual", "teacher"] = (
        "codec"
    )
    loads: Literal["codec", "local", "per_task", "individual", "teacher"] = "codec"
    overrides: tuple[str, ...] = ()
    own_stage1: bool = False
    asked_label: str = ""
    note: str = ""

    def label_for(self, requests: str) -> str:
        """Returns the label of the arm in an experiment with this `model.requests`."""
        return (requests == "asked" and self.asked_label) or self.label

    @property
    def sends(self) -> bool:
        """Returns whether the arm sends bytes. If not, it is drawn as a horizontal line."""
        return not self.look.dash


def _image_codec(name: str, label: str, colour: str, dark: str, marker: str) -> tuple[ArmKind, ...]:
    """Returns two kinds: the codec with the plain teacher, and with a teacher fine-tuned on it."""
    files = (
        "Image codecs: whole files as Pillow writes them, in front of the uncompressed teacher. "
        "Payload bytes leave out container headers."
    )
    tuned = (
        "Tuned teachers: the teacher fine-tuned on the decoded images of its codec, at all the "
        "qualities shown."
    )
    return (
        ArmKind(
            name,
            f"{label}, then the teacher",
            Look(colour, dark, marker),
            measures="teacher",
            asked_by="codecs",
            answers="teacher",
            loads="teacher",
            note=files,
        ),
        ArmKind(
            name + TUNED,
            f"{label}, then a teacher tuned on it",
            Look(colour, dark, marker, hollow=True),
            measures="codec_teacher",
            asked_by="codec_teachers",
            answers="teacher",
            loads="teacher",
            note=tuned,
        ),
    )


ARM_KINDS: dict[str, ArmKind] = {
    kind.name: kind
    for kind in (
        ArmKind(
            "mantis",
            "MANTiS",
            Look("#0072B2", "#56B4E9", "o"),
            measures="own",
            asked_by="",
        ),
        ArmKind(
            "early_exit",
            "MANTiS, early exit",
            Look("#0B3C8C", "#8FB4FF", "*"),
            measures="mantis",
            asked_by="early_exit",
        ),
        ArmKind(
            "answer",
            "MANTiS, client's answer sent",
            Look("#1D6FD1", "#9CCBFF", "o", hollow=True),
            measures="own",
            overrides=ANSWERING,
            note="Client's answer sent: the label that the detector gives goes along with the "
            "latent, and the server decides with both.",
        ),
        ArmKind(
            "answer_exit",
            "MANTiS, client's answer sent, early exit",
            Look("#1D6FD1", "#9CCBFF", "*", hollow=True),
            measures="answer",
            asked_by="early_exit",
        ),
        ArmKind(
            "none",
            "no conditioning",
            Look("#D55E00", "#F08A4B", "s"),
            measures="own",
            overrides=UNCONDITIONED,
            note="No conditioning: the same architecture and schedule, without FiLM and with one "
            "prior for all tasks.",
        ),
        ArmKind(
            "none_exit",
            "no conditioning, early exit",
            Look("#9C4400", "#FFB27F", "s", hollow=True),
            measures="none",
            asked_by="early_exit",
        ),
        ArmKind(
            "none_answer",
            "no conditioning, client's answer sent",
            Look("#E0761B", "#FFC48A", "o", hollow=True),
            measures="own",
            overrides=(*UNCONDITIONED, *ANSWERING),
        ),
        ArmKind(
            "none_told",
            "no conditioning, oracle tasks",
            Look("#C97B4A", "#FFC9A3", "s", hollow=True),
            measures="none",
            answers="oracle",
            asked_label="no conditioning, all asked at once",
            note="No conditioning, oracle tasks: the server knows the true tasks and the encoder "
            "does not.",
        ),
        ArmKind(
            "none_prior",
            "no conditioning, task prior",
            Look("#A87B00", "#E8C14F", "P"),
            measures="own",
            overrides=("model.conditioning.kind=none",),
        ),
        ArmKind(
            "channels",
            "a set of channels for each request",
            Look("#8C564B", "#D9A79C", "h"),
            measures="own",
            overrides=("model.conditioning.kind=channels", "model.prior=shared"),
            note="A set of channels for each request: the encoder is the same whatever is asked "
            "for, and the latent channels that a task does not need are not sent.",
        ),
        ArmKind(
            "channels_prior",
            "a set of channels, request prior",
            Look("#8C564B", "#D9A79C", "h", hollow=True),
            measures="own",
            overrides=("model.conditioning.kind=channels",),
        ),
        ArmKind(
            "film",
            "FiLM alone",
            Look("#5B7FBF", "#A9C4F5", "D"),
            measures="own",
            overrides=("model.conditioning.kind=film", "model.prior=shared"),
            note="FiLM alone: no set of channels for each task, and one prior for all.",
        ),
        ArmKind(
            "film_prior",
            "FiLM, request prior",
            Look("#5B7FBF", "#A9C4F5", "D", hollow=True),
            measures="own",
            overrides=("model.conditioning.kind=film",),
        ),
        ArmKind(
            "features",
            "detector's features",
            Look("#6A8A22", "#B5D35C", ">"),
            measures="own",
            overrides=("model.conditioning.kind=features", "model.prior=shared"),
            note="Detector's features: the encoder reads the detector's map, and no task.",
        ),
        ArmKind(
            "features_prior",
            "detector's features, task prior",
            Look("#3F6B1D", "#8FBF5A", ">", hollow=True),
            measures="own",
            overrides=("model.conditioning.kind=features",),
        ),
        ArmKind(  # Matsubara et al., WACV 2022
            "student",
            "entropic student",
            Look("#A23B3B", "#E88A8A", "<"),
            measures="own",
            answers="student",
            overrides=(
                *UNCONDITIONED,
                "model.single_task=true",
            ),
            note="Entropic student: the same client and schedule with a single task of all "
            "classes. It detects and sends no tasks.",
        ),
        ArmKind(
            "student_exit",
            "entropic student, early exit",
            Look("#7A1F1F", "#FFB3B3", "<", hollow=True),
            measures="student",
            asked_by="early_exit",
            answers="student",
        ),
        ArmKind(
            "student_wide",
            "entropic student, wide encoder",
            Look("#C24F8A", "#F2A3CB", "<"),
            measures="own",
            answers="student",
            overrides=(
                *UNCONDITIONED,
                "model.single_task=true",
                "model.wide_encoder=true",
            ),
            own_stage1=True,
            note="Entropic student, wide encoder: it has no detector, and an encoder that costs "
            "the client as much as detector and encoder of the others.",
        ),
        ArmKind(
            "local",
            "answered on the device",
            Look("#111111", "#FFFFFF", "*", hollow=True),
            measures="local",
            answers="local",
            loads="local",
            note="Answered on the device: a classifier of the client's multiply-adds, distilled "
            "from the same teacher for as many epochs. It sends its answer.",
        ),
        ArmKind(
            "oracle",
            "oracle tasks",
            Look("#009E73", "#2FC99B", "^", hollow=True),
            measures="mantis",
            answers="oracle",
            asked_label="MANTiS, all asked at once",
            note="Oracle tasks: the same model, given the true tasks of each image. A server that "
            "asks names all of them at once.",
        ),
        ArmKind(
            "per_task",
            "individual codecs, the task known",
            Look("#3A3A3A", "#D5DADE", "d", hollow=True),
            measures="own",
            answers="per_task",
            loads="per_task",
            asked_label="individual codecs",
            overrides=(
                *UNCONDITIONED,
                "model.per_task=true",
            ),
            note="Individual codecs: one for each task, trained on the images of that task alone. "
            "The task is known. An image of several tasks is sent once for each.",
        ),
        ArmKind(
            "individual",
            "individual models, uncompressed",
            Look("#B5568B", "#E29AC2", "D", dash=(1, 2)),
            measures="individual",
            answers="individual",
            loads="individual",
        ),
        ArmKind(
            "teacher",
            "teacher, uncompressed",
            Look("#6B6B6B", "#A9B2BA", "v", dash=(3.5, 2)),
            measures="teacher",
            answers="teacher",
            loads="teacher",
        ),
        *_image_codec("jpeg", "JPEG", "#8A6D5B", "#C9A993", "X"),
        *_image_codec("webp", "WebP", "#7A5FB0", "#B7A3E6", "p"),
        *_image_codec("avif", "AVIF", "#4F7F86", "#8FC1C8", "h"),
    )
}


def trained_kinds() -> tuple[str, ...]:
    """Returns the kinds that train a stage 2."""
    return tuple(name for name, kind in ARM_KINDS.items() if kind.measures == "own")


def baselines() -> tuple[str, ...]:
    """Returns the kinds that `evaluate.baselines` may name."""
    return tuple(name for name, kind in ARM_KINDS.items() if kind.asked_by == "baselines")


def image_codecs() -> tuple[str, ...]:
    """Returns the kinds that `evaluate.codecs` may name."""
    return tuple(name for name, kind in ARM_KINDS.items() if kind.asked_by == "codecs")


def unfit_requests(name: str) -> tuple[str, ...]:
    """Returns the values of `model.requests` under which an arm of this kind cannot be measured."""
    kind = ARM_KINDS[name]
    if kind.answers == "oracle":
        return ("detect",)
    own = ARM_KINDS[kind.measures] if kind.measures in trained_kinds() else kind
    needs = ("model.single_task=true", "model.conditioning.kind=features", *ANSWERING)
    return ("asked",) if set(needs) & set(own.overrides) else ()
