"""The whole codec: client, bottleneck and server put together, images to streams to answers.

Shapes: B batch, K tasks, C latent channels, H W input pixels, h w latent size.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mantis_core.answer import Answer, Encoded
from mantis_core.bitstream import (
    BitstreamError,
    Reason,
    Stream,
    StreamSpec,
    dequantise_level,
    pack,
    quantise_log2,
    unpack,
)
from mantis_core.bottleneck import Bottleneck
from mantis_core.client import STRIDE, Client
from mantis_core.coder import TableSet, decode_symbols, encode_symbols, to_symbols
from mantis_core.config import ModelConfig
from mantis_core.server import JointDecision, Server
from mantis_core.tasks import TaskSpec
from mantis_core.teacher import Backbone, ModelError, normalise

_MAX_AREA_RATIO = 16
"""An input of more than this many times the model's own pixels is refused, coding and decoding."""


class ModelSpec(BaseModel):
    """All that is needed to build a model's modules and read its answers: a checkpoint's config."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: ModelConfig
    tasks: tuple[TaskSpec, ...]
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    single_class: bool
    image_size: tuple[int, int]
    short_side: int
    teacher: str
    split: str
    split_shape: tuple[int, int, int]
    last_shape: tuple[int, int, int]


class Mantis(nn.Module):
    """Task-adaptive codec.

    x ─ stem ─┬─ detector ─▶ p ─ conditioning ─▶ gamma, beta
              └───────────── encoder ──────────────┴─▶ y ─ round ─ coder(table[mask]) ─▶ bits
    bits ─ coder ─▶ y_hat ─ decoder ─ trunk ─ decoder_k ─ tail_k, k in mask ─▶ joint decision
    """

    mask_threshold: Tensor

    def __init__(self, spec: ModelSpec, *, trunk: nn.Module | None = None) -> None:
        """`trunk`: the teacher's blocks behind its split; none builds them untrained, by name."""
        super().__init__()
        self.spec = spec
        config, tasks = spec.model, spec.tasks
        channels = config.encoder.latent_channels
        self.client = Client(config, len(tasks))
        self.bottleneck = Bottleneck(channels, len(tasks), config.prior, quantizer=config.quantizer)
        self.server = Server(
            config.decoder,
            tasks,
            latent_channels=channels,
            image_size=spec.image_size,
            split_shape=spec.split_shape,
            last_shape=spec.last_shape,
            trunk=Backbone(spec.teacher).tail_after(spec.split) if trunk is None else trunk,
        )
        self.joint = JointDecision(tasks, len(spec.classes)) if spec.single_class else None
        self.register_buffer("mask_threshold", torch.tensor(0.5))
        self._model_id: bytes | None = None
        self.register_load_state_dict_post_hook(_forget_id)  # type: ignore[no-untyped-call]

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.spec.tasks)

    @torch.no_grad()
    def encode(self, images: Tensor, tasks: Sequence[str] | Tensor | None = None) -> list[bytes]:
        """uint8 images (B, 3, H, W) to one stream each.

        `tasks` None detects them; names ask for these alone, of every image; a bool tensor (B, K)
        says which for each. Raises ModelError for an unknown name or images of another kind.
        """
        return [encoded.data for encoded in self.encode_in_detail(images, tasks)]

    @torch.no_grad()
    def encode_in_detail(
        self, images: Tensor, tasks: Sequence[str] | Tensor | None = None
    ) -> list[Encoded]:
        """As `encode`, with the sizes and the detector's view of each image."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ModelError(
                f"images are {images.dtype} {tuple(images.shape)}; allowed: uint8 (B, 3, H, W)"
            )
        with still(self):
            stem, logits = self.client(normalise(images))
            detected = torch.sigmoid(logits.float())
            asked = self._asked(tasks, len(images), images.device)
            mask = self.select_mask(detected) if asked is None else asked
            probabilities = detected if asked is None else asked.float()
            primary = primary_task(detected, mask)
            latent = self.client.encode(stem, probabilities)
            estimated = self.bottleneck(latent, mask, primary).bits
        tables = self.tables()
        stream_spec = self.stream_spec()
        symbols = to_symbols(latent.float().cpu().numpy())
        shape = (int(images.shape[2]), int(images.shape[3]))
        sends = self.spec.model.send_probabilities and asked is None
        rows = zip(
            symbols,
            mask.cpu().numpy(),
            primary.tolist(),
            detected.cpu().numpy(),
            estimated.tolist(),
            strict=True,
        )
        encoded = []
        for image_symbols, active, first, p, bits in rows:
            payload = encode_symbols(image_symbols, tables.table_for(active, first))
            stream = Stream(
                mask=tuple(bool(a) for a in active),
                primary=first if self.spec.model.prior == "primary" else None,
                log2_levels=tuple(quantise_log2(float(v)) for v in p[active]) if sends else None,
                input_shape=shape,
                payload=payload,
            )
            encoded.append(Encoded(pack(stream, stream_spec), len(payload), bits, p, active))
        return encoded

    @torch.no_grad()
    def decode(self, streams: Iterable[bytes]) -> list[Answer]:
        """Streams to answers; only the active tasks of each are decoded.

        Raises BitstreamError for the first stream that is not one of this model's.
        """
        spec, tables = self.stream_spec(), self.tables()
        data = list(streams)
        parsed = [unpack(stream, spec) for stream in data]
        with_primary = self.spec.model.prior == "primary"
        if any((stream.primary is not None) != with_primary for stream in parsed):
            raise BitstreamError(
                Reason.CORRUPT,
                f"a stream of this model must {'' if with_primary else 'not '}name a primary task",
            )
        latents = [
            decode_symbols(
                stream.payload,
                tables.table_for(stream.mask, stream.primary or 0),
                spec.latent_shape(stream.input_shape),
            )
            for stream in parsed
        ]
        answers: list[Answer | None] = [None] * len(parsed)
        for shape in sorted({stream.input_shape for stream in parsed}):
            rows = [i for i, stream in enumerate(parsed) if stream.input_shape == shape]
            group = self._decode_group(
                [parsed[i] for i in rows], np.stack([latents[i] for i in rows]), shape
            )
            for i, answer in zip(rows, group, strict=True):
                answers[i] = Answer(
                    **answer, wire_bytes=len(data[i]), payload_bytes=len(parsed[i].payload)
                )
        return [answer for answer in answers if answer is not None]

    def select_mask(self, probabilities: Tensor) -> Tensor:
        """Which tasks a stream carries, bool (B, K), from p (B, K).

        Those above the calibrated threshold, the most probable `max_active_tasks` at most, and the
        most probable one always.
        """
        limit = min(self.spec.model.max_active_tasks, probabilities.shape[1])
        best = probabilities.topk(limit, dim=1).indices
        allowed = torch.zeros_like(probabilities, dtype=torch.bool).scatter_(1, best, True)
        mask = allowed & (probabilities > self.mask_threshold)
        return mask.scatter(1, best[:, :1], True)

    def stream_spec(self) -> StreamSpec:
        """What a stream of this model must look like."""
        return StreamSpec(
            model_id=self.model_id(),
            num_tasks=len(self.spec.tasks),
            input_shape=self.spec.image_size,
            latent_channels=self.spec.model.encoder.latent_channels,
            stride=STRIDE,
            max_pixels=_MAX_AREA_RATIO * math.prod(self.spec.image_size),
        )

    def tables(self) -> TableSet:
        """The integer tables; RuntimeError before `finish`."""
        return self.bottleneck.tables()

    def model_id(self) -> bytes:
        """4 bytes of a hash over every weight, table, task and the preprocessing."""
        if self._model_id is None:
            digest = hashlib.sha256(self.spec.model_dump_json().encode())
            for name, tensor in sorted(self.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._model_id = digest.digest()[:4]
        return self._model_id

    def finish(self) -> None:
        """Makes the integer tables from the weights as they are; training is over."""
        self.bottleneck.update_tables()
        self.eval()
        self._model_id = None

    def train(self, mode: bool = True) -> Self:
        """As usual; the id worked out from the weights is forgotten."""
        if mode:
            self._model_id = None
        super().train(mode)
        return self

    def prepare_image(self, data: bytes) -> Tensor:
        """An image file's bytes to uint8 (3, H, W) as in training: short side, centre crop."""
        with Image.open(io.BytesIO(data)) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        height, width = self.spec.image_size
        scale = self.spec.short_side / min(upright.size)
        if scale != 1:
            size = [max(self.spec.short_side, round(side * scale)) for side in upright.size]
            upright = upright.resize((size[0], size[1]), Image.Resampling.BICUBIC)
        left, top = (upright.width - width) // 2, (upright.height - height) // 2
        if left < 0 or top < 0:
            upright = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC)
        else:
            upright = upright.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()

    def describe(self) -> dict[str, Any]:
        """What a person or the registry wants to know: tasks, sizes, multiply-adds, id."""
        image = torch.zeros(1, 3, *self.spec.image_size)
        counter = FlopCounterMode(display=False)
        with torch.no_grad(), still(self), counter:
            stem, logits = self.client(normalise(image.to(self.mask_threshold.device)))
            self.client.encode(stem, torch.sigmoid(logits))
        parameters = sum(p.numel() for p in self.client.parameters())
        return {
            "model_id": self.model_id().hex(),
            "tasks": {task.name: list(task.labels) for task in self.spec.tasks},
            "classes": len(self.spec.classes),
            "image_size": list(self.spec.image_size),
            "client_parameters": parameters,
            "client_bytes": parameters * 4,
            "client_macs": counter.get_total_flops() // 2,
            "server_parameters": sum(p.numel() for p in self.server.parameters()),
        }

    def _asked(
        self, tasks: Sequence[str] | Tensor | None, count: int, device: torch.device
    ) -> Tensor | None:
        if tasks is None:
            return None
        if isinstance(tasks, Tensor):
            empty = (~tasks.any(dim=1)).nonzero()
            if len(empty):
                raise ModelError(f"image {int(empty[0])} is asked about no task; name at least one")
            return tasks.to(device)
        unknown = [name for name in tasks if name not in self.task_names]
        if unknown or not tasks:
            raise ModelError(
                f"tasks {unknown or 'none'} asked for; this model has {', '.join(self.task_names)}"
            )
        wanted = torch.tensor([name in tasks for name in self.task_names], device=device)
        return wanted.expand(count, -1)

    def _decode_group(
        self, streams: Sequence[Stream], symbols: NDArray[np.int32], shape: tuple[int, int]
    ) -> list[dict[str, Any]]:
        device = self.mask_threshold.device
        mask = torch.tensor([stream.mask for stream in streams], device=device)
        log_p = torch.tensor([_log_probabilities(stream) for stream in streams], device=device)
        count, tasks = len(streams), self.spec.tasks
        with still(self):
            latent = torch.from_numpy(symbols).to(device).float()
            latent = latent.contiguous(memory_format=torch.channels_last)
            split, last = self.server.features(latent)
            outputs: dict[str, Tensor] = {}
            for k, task in enumerate(tasks):
                rows = mask[:, k].nonzero()[:, 0]
                width = task.num_classes + task.is_classification
                tail = (width,) if task.is_classification else (width, *shape)
                output = torch.full((count, *tail), -math.inf, device=device)
                if len(rows):
                    output[rows] = self.server.answer(task, split[rows], last[rows], shape).float()
                outputs[task.name] = output
            classes: Tensor | None = None
            if self.joint is not None:
                scores = self.joint(outputs, log_p)
                classes = torch.softmax(scores, dim=1)
        answers = []
        for i, stream in enumerate(streams):
            active = [task for k, task in enumerate(tasks) if stream.mask[k]]
            named = [task for task in active if task.is_classification]
            labels = {t.name: int(outputs[t.name][i, :-1].argmax()) for t in named}
            index = -1 if classes is None else int(classes[i].argmax())
            answers.append(
                {
                    "tasks": tuple(task.name for task in active),
                    "task_probability": {
                        t.name: float(log_p[i, tasks.index(t)].exp()) for t in active
                    },
                    "labels": labels,
                    "label_names": {t.name: t.labels[labels[t.name]] for t in named if t.labels},
                    "label_probability": {
                        t.name: float(outputs[t.name][i, labels[t.name]].exp()) for t in named
                    },
                    "class_index": index,
                    "class_name": self.spec.class_names[index] if index >= 0 else None,
                    "class_probability": 0.0 if classes is None else float(classes[i, index]),
                    "segmentation": {
                        t.name: outputs[t.name][i].argmax(dim=0).to(torch.uint8).cpu().numpy()
                        for t in active
                        if not t.is_classification
                    },
                }
            )
        return answers


class still:
    """Context in which a module is in eval mode without autocast, float32."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.was_training = module.training
        device = next(module.parameters()).device.type
        self.autocast = torch.autocast(device, enabled=False)

    def __enter__(self) -> None:
        if self.was_training:
            self.module.eval()
        self.autocast.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        self.autocast.__exit__(*error)
        if self.was_training:
            self.module.train()


def _forget_id(model: Mantis, _: object) -> None:
    model._model_id = None


def primary_task(probabilities: Tensor, mask: Tensor) -> Tensor:
    """Index (B,) of the most probable task among the active ones, p and mask being (B, K)."""
    return probabilities.masked_fill(~mask, -1.0).argmax(dim=1)


def _log_probabilities(stream: Stream) -> list[float]:
    """log p_k as transmitted: -inf for tasks not sent, 0 where no probabilities were sent."""
    levels = iter(stream.log2_levels or ())
    return [
        -math.inf
        if not active
        else math.log(dequantise_level(next(levels)))
        if stream.log2_levels is not None
        else 0.0
        for active in stream.mask
    ]
