"""Config sections of the science: teacher, model, the training stages. Pydantic only.

They stand in one file, not beside each module, so that a command line that only wants to check a
config or print its help never imports torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """A frozen config section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class OptimConfig(Section):
    """Optimiser and schedule of one training stage (AdamW or SGD, warm-up, cosine decay)."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=2e-3, gt=0, description="peak learning rate of new parameters")
    fine_tune_lr: float = Field(
        default=4e-4, ge=0, description="peak rate of parameters loaded trained"
    )
    density_lr: float = Field(default=1e-2, ge=0, description="peak rate of the entropy model")
    weight_decay: float = Field(default=0.01, ge=0, description="on matrices and kernels only")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="sgd only (Nesterov)")
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1, description="share of all steps")
    final_lr_fraction: float = Field(
        default=0.01, ge=0, le=1, description="of the peak, at the end"
    )
    clip_norm: float = Field(
        default=5.0, gt=0, description="gradient norm above which it is scaled down"
    )


class TrainingConfig(Section):
    """What every training stage has."""

    epochs: int = Field(default=4, ge=1)
    batch_size: int = Field(
        default=128, ge=2, description="global batch: images a step over all workers"
    )
    optim: OptimConfig = OptimConfig()
    ema_decay: float = Field(
        default=0.999, ge=0, lt=1, description="of the weights that are shipped; 0 off"
    )
    amp: Literal["auto", "off", "bf16"] = Field(
        default="auto", description="auto: bf16 on CUDA only"
    )


class LossTerm(Section):
    """One torchdistill criterion with its weight.

    With `student` (and `teacher`) it is a low-level criterion on those modules' outputs, else a
    criterion of `mantis_core.losses.CRITERIA` that reads what it needs.
    """

    criterion: str = Field(description="a name of mantis_core.losses.CRITERIA or of torchdistill")
    weight: float = Field(default=1.0, ge=0)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    student: str | None = Field(
        default=None, description="module path in the student, e.g. tail.layer3"
    )
    teacher: str | None = Field(default=None, description="module path in the teacher, e.g. layer3")


def _without_nulls(terms: Any) -> Any:
    if isinstance(terms, dict):
        return {name: term for name, term in terms.items() if term is not None}
    return terms


LossTerms = Annotated[dict[str, LossTerm], BeforeValidator(_without_nulls)]
"""Terms by name; one that is null is left out, as in a file that extends another."""


class TeacherConfig(Section):
    """The frozen uncompressed network that stage 1 and 2 distil."""

    name: str = Field(
        default="resnet50", description="any torchvision classification model by name"
    )
    weights: str = Field(
        default="pretrained", description="train | pretrained | a local .safetensors or .pth file"
    )
    start: str | None = Field(
        default=None,
        description="with weights: train, a file of this network's weights from other data to "
        "begin with; its classifier is not used",
    )
    split: str = Field(default="layer2", description="layer whose output the decoder reconstructs")
    training: TrainingConfig = TrainingConfig(
        epochs=12, optim=OptimConfig(kind="sgd", lr=0.1, weight_decay=5e-4), ema_decay=0.0
    )
    label_smoothing: float = Field(default=0.1, ge=0, lt=1, description="when trained")


class CodecTeacherConfig(TrainingConfig):
    """The baseline of a teacher fine-tuned on what an image codec leaves of its images."""

    epochs: int = Field(default=2, ge=1)
    optim: OptimConfig = OptimConfig(kind="sgd", lr=0.01, weight_decay=5e-4)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    codec: Literal["jpeg", "webp", "avif"] = Field(default="webp", description="set for each arm")
    qualities: tuple[int, ...] = Field(
        default=(50,), min_length=1, description="set for each arm: one drawn for each image"
    )


class StemConfig(Section):
    channels: tuple[int, int] = Field(
        default=(32, 48), description="after each of its two halvings"
    )


class DetectorConfig(Section):
    channels: int = Field(default=96, ge=1, description="of its own convolutions")
    blocks: int = Field(default=1, ge=0, description="residual blocks after its first convolution")
    deep_channels: int = Field(
        default=0, ge=0, description="of one more block at half the resolution; 0 none"
    )
    hidden: int = Field(default=128, ge=1, description="of its MLP")
    classes: bool = Field(
        default=False,
        description="name an image's class, a task being as probable as its classes together; "
        "needs images of one class each",
    )


class ConditioningConfig(Section):
    kind: Literal["film", "attention", "features", "none"] = Field(
        default="film",
        description="film: by task; attention: by task and position, off the detector's map; "
        "features: attention without the tasks; none",
    )
    hidden: int = Field(default=64, ge=1, description="of each generator's MLP")


class EncoderConfig(Section):
    channels: int = Field(default=64, ge=1)
    blocks: int = Field(
        default=1, ge=0, description="FiLMed residual blocks after the last halving"
    )
    latent_channels: int = Field(default=16, ge=1)
    stride: Literal[8, 16] = Field(
        default=8, description="input pixels per latent position, each way"
    )


class DecoderConfig(Section):
    """Server side: what rebuilds the teacher's split feature, and what follows per task."""

    channels: int = Field(default=128, ge=1)
    blocks: int = Field(default=2, ge=0, description="residual blocks of the decoder")
    task_channels: int = Field(default=128, ge=1, description="of each task's own decoder")


class ModelConfig(Section):
    """Architecture of client, bottleneck and server."""

    stem: StemConfig = StemConfig()
    detector: DetectorConfig = DetectorConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    prior: Literal["shared", "per_task", "primary"] = "primary"
    quantizer: Literal["ste", "noise"] = Field(
        default="ste", description="of the latent, in training"
    )
    neighbour_contexts: bool = Field(
        default=False,
        description="code a symbol of the latent by its neighbours already decoded",
    )
    send_probabilities: bool = Field(
        default=True, description="send a 4-bit log-probability for each active task"
    )
    coverage: float = Field(
        default=0.9,
        gt=0,
        le=1,
        description="share of true tasks the calibrated mask threshold must keep",
    )
    single_task: bool = Field(
        default=False,
        description="one task of all classes, nothing to detect: the entropic-student baseline",
    )
    per_task: bool = Field(
        default=False,
        description="a codec of its own for every task, which is known: a baseline",
    )
    max_active_tasks: int = Field(
        default=6, ge=1, description="mask size at which a detected mask is cut"
    )


class Stage1Config(TrainingConfig):
    """Rate + distillation of the teacher's features: L = sum of terms + rate_weight * bits."""

    rate_weight: float = Field(
        default=2e-3, ge=0, description="loss units per payload bit per image"
    )
    rate_ramp_fraction: float = Field(
        default=1.0, ge=0, le=1, description="share of steps until full rate"
    )
    losses: LossTerms = Field(
        min_length=1,
        default_factory=lambda: {
            "split": LossTerm(criterion="RelativeMSE", student="decoder", teacher="@split"),
            "last": LossTerm(criterion="RelativeMSE", student="tail", teacher="@last"),
            "logits": LossTerm(criterion="TeacherLogits"),
            "detection": LossTerm(criterion="TaskDetection", weight=0.3),
        },
    )


class Stage2Config(TrainingConfig):
    """Detection + task losses + rate, stem frozen."""

    rate_weight: float = Field(
        default=1e-3, ge=0, description="loss units per payload bit per image"
    )
    rate_ramp_fraction: float = Field(
        default=0.1, ge=0, le=1, description="share of steps until full rate"
    )
    teacher_forcing: tuple[float, float] = Field(
        default=(0.5, 0.0),
        description="share of images conditioned on the true tasks, at the first and last step",
    )
    subset_fraction: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="of the forced images: a random subset of their tasks, each size as likely",
    )
    losses: LossTerms = Field(
        min_length=1,
        default_factory=lambda: {
            "detection": LossTerm(criterion="TaskDetection", weight=0.3),
            "tasks": LossTerm(criterion="TaskLosses", weight=0.1),
            "joint": LossTerm(criterion="JointDecision", weight=0.5),
            "distillation": LossTerm(criterion="TeacherDecision", weight=1.0),
        },
    )


class IndividualConfig(TrainingConfig):
    """The baseline of one uncompressed network per task, trained in one fit."""
