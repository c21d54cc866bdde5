"""Config sections of a codec's networks: client, bottleneck and server. Pydantic only."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mantis_core.config import Quantizer, Section


class StemConfig(Section):
    """The client's first layers, which all tasks share."""

    channels: tuple[int, int] = (32, 48)
    """The number of channels after each of the two halvings of the resolution. The client `lite0`
    has channels of its own."""


class DetectorConfig(Section):
    """What finds the tasks of an image, on the client."""

    channels: int = Field(default=96, ge=1)
    """The number of channels of the detector's own convolutions."""
    blocks: int = Field(default=1, ge=0)
    """The number of residual blocks after the detector's first convolution. In the client
    `lite0` the number of EfficientNet-Lite0's blocks that the detector takes over behind those of
    the trunk; its other widths are theirs."""
    deep_channels: int = Field(default=0, ge=0)
    """The number of channels of one more block, at half the resolution. 0 leaves it out, which
    keeps the client small."""
    hidden: int = Field(default=128, ge=1)
    """The number of hidden units of the detector's MLP."""
    classes: bool = False
    """Whether the detector names the class of an image; the probability of a task is then the
    sum over its classes. Off by default, because it needs images of one class each and the loss
    ClassDetection."""


class ConditioningConfig(Section):
    """What turns detected tasks into modulation of the encoder."""

    kind: Literal["film", "attention", "features", "channels", "gated", "none"] = "film"
    """What modulates the encoder. `film`: the probabilities of the tasks. `attention`: also
    what the detector sees at each position. `features`: the latter alone. `channels`: nothing, but
    each task has a set of channels of the latent, learned, and the others are not sent. `gated`:
    `film` and such sets. `none`: nothing."""
    hidden: int = Field(default=64, ge=1)
    """The number of hidden units of the network that makes the modulation."""


class EncoderConfig(Section):
    """What turns the stem's features into the latent."""

    start: Literal["stem", "detector"] = "stem"
    """Where the encoder begins. `stem`: beside the detector. `detector`: behind it, at the map
    from which it names the tasks. Stem and detector's convolutions are then one trunk, which all
    losses train, and nothing is computed twice."""
    channels: int = Field(default=64, ge=1)
    """The number of channels of the encoder's blocks."""
    blocks: int = Field(default=1, ge=0)
    """The number of modulated residual blocks after the last halving of the resolution."""
    latent_channels: int = Field(default=16, ge=1)
    """The number of channels of the latent: symbols that are sent for each position."""
    stride: Literal[8, 16] = 8
    """The number of input pixels for each position of the latent, each way. 16 has a quarter of
    the positions of 8, for larger images."""


class DecoderConfig(Section):
    """The server: what rebuilds the teacher's split feature, and what each task does with it."""

    channels: int = Field(default=128, ge=1)
    """The number of channels of the decoder that all tasks share."""
    blocks: int = Field(default=2, ge=0)
    """The number of residual blocks of that decoder."""
    task_channels: int = Field(default=128, ge=1)
    """The number of hidden channels of the decoder that each task has of its own."""


class ModelConfig(Section):
    """Architecture of client, bottleneck and server."""

    client: Literal["residual", "lite0"] = "residual"
    """Which network the client is. `residual`: a small one of residual blocks, as `stem`,
    `detector` and `encoder` say. `lite0`: one trunk, made for images of 160 pixels and more:
    EfficientNet-Lite0 up to its fifth block, of 114 million multiply-adds at 224 pixels, behind
    which detector and encoder begin. `stage1.start` says where its weights come from."""
    stem: StemConfig = StemConfig()
    detector: DetectorConfig = DetectorConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    requests: Literal["both", "asked", "detect"] = "both"
    """Who says for which tasks an image is coded. `both`: the client detects them, unless the
    server asks for some. `asked`: the server asks, always; the client has no detector, and costs
    less. `detect`: the client, always; nothing can be asked for."""
    prior: Literal["shared", "per_task", "primary", "request"] = "primary"
    """Which density codes a latent. `primary`: that of the most probable task. `per_task`: the
    mean of its active tasks' densities. `request`: that of the only task which is active or asked
    for, and one of its own where there are several. `shared`: the same for all images."""
    quantizer: Quantizer = "ste"
    """What decoders get in training, and what the rate is estimated of. `ste`: decoders get the
    rounded latent, as when the model is used, with the gradient passed straight through; the rate
    is of the latent with uniform noise. `noise`: that latent for both. `rounded`: the rounded one
    for both. `jitter`: as `ste`, but the latent is moved by up to 0.2 before it is rounded.
    `soft`: as `ste`, but the rate is of the softly rounded latent with the noise."""
    neighbour_contexts: bool = False
    """Whether the neighbours of a symbol that are decoded already choose the table that codes
    it. It saves bytes and takes more calls of the coder."""
    send_probabilities: bool = True
    """Whether the stream holds the probability of each active task, of at most 4 bits each. The
    joint decision on the server weighs the tasks by them."""
    send_answer: bool = False
    """Whether the client sends its own answer beside the latent: the label that its detector gives
    within the primary task, and how sure it is, in a byte or less. The server decides with both.
    It needs a detector that names classes (`detector.classes`). An image whose most probable task
    is a segmentation carries no answer."""
    coverage: float = Field(default=0.9, gt=0, le=1)
    """The share of the true tasks that the mask must keep. The threshold of the mask is
    calibrated to it on rows that are held back from training."""
    exit_heads: bool = False
    """Whether a client that is asked has a head for each classification, and may answer a request
    itself. With `exit_confidence` it then sends its label alone where it is that sure. The heads
    read what the request has made of the encoder, and the loss ExitAnswers trains them."""
    single_task: bool = False
    """Whether all classes are one task, so that there is nothing to detect. This is the
    entropic-student baseline."""
    wide_encoder: bool = False
    """Whether the client has no detector, and an encoder as wide as the detector's multiply-adds
    allow. This is a baseline; it needs `single_task`."""
    per_task: bool = False
    """Whether each task has a codec of its own and is known instead of detected. This is a
    baseline."""
    max_active_tasks: int = Field(default=6, ge=1)
    """The largest number of tasks in a detected mask. Each task that is active costs bits and a
    decoder."""

    @model_validator(mode="after")
    def _lite_is_one_trunk(self) -> ModelConfig:
        if self.client != "lite0":
            return self
        if self.encoder.start == "detector":
            raise ValueError(
                "model.encoder.start=detector joins two networks, and the client lite0 is one "
                "trunk already: leave model.encoder.start out"
            )
        if self.wide_encoder:
            raise ValueError(
                "model.wide_encoder widens the client of residual blocks: set "
                "model.client=residual, or leave out the baseline student_wide"
            )
        if self.requests != "asked" and self.detector.blocks < 1:
            raise ValueError(
                "model.detector.blocks: the detector of the client lite0 needs at least 1 block"
            )
        return self

    @model_validator(mode="after")
    def _a_wide_encoder_detects_nothing(self) -> ModelConfig:
        if self.wide_encoder and not (self.single_task and self.conditioning.kind == "none"):
            raise ValueError(
                "model.wide_encoder leaves nothing that detects tasks: set model.single_task=true "
                "and model.conditioning.kind=none, or leave model.wide_encoder out"
            )
        return self

    @model_validator(mode="after")
    def _a_client_that_is_asked_detects_nothing(self) -> ModelConfig:
        if self.requests != "asked":
            return self
        needs = {
            "model.conditioning.kind": self.conditioning.kind in ("attention", "features"),
            "model.encoder.start": self.encoder.start == "detector",
            "model.detector.classes": self.detector.classes,
            "model.send_answer": self.send_answer,
            "model.single_task": self.single_task,
        }
        if wrong := [name for name, needed in needs.items() if needed]:
            raise ValueError(
                f"model.requests=asked leaves nothing that detects tasks or classes, and "
                f"{wrong[0]} needs it: set {wrong[0]} to another value, or model.requests=both"
            )
        return self

    @model_validator(mode="after")
    def _exit_heads_answer_requests(self) -> ModelConfig:
        if self.exit_heads and self.requests != "asked":
            raise ValueError(
                "model.exit_heads answer what a server asks for: set model.requests=asked; a "
                "client that detects answers by model.detector.classes=true"
            )
        return self

    @model_validator(mode="after")
    def _an_answer_is_a_class(self) -> ModelConfig:
        if self.send_answer and not self.detector.classes:
            raise ValueError(
                "model.send_answer sends what the detector names, and this one names tasks alone: "
                "set model.detector.classes=true, or leave model.send_answer out"
            )
        return self
