"""The networks of a codec's extension: what tasks that came later have of their own. All else they
share with the codec.

Shapes: B batch, K tasks of the extension, C channels, h w of a feature map, r rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from mantis_core.errors import ModelError
from mantis_core.networks.blocks import without_autocast
from mantis_core.networks.client import Client, FiLMedEncoder
from mantis_core.networks.conditioning import READ_BY_TASK, Modulation
from mantis_core.networks.detector import NoDetector, TaskDetector, View
from mantis_core.symbols import Prior

if TYPE_CHECKING:  # at run time a client needs no compressai
    from mantis_core.networks.bottleneck import Bottleneck
    from mantis_core.networks.server import AnswersLater, Server

Module = TypeVar("Module", bound=nn.Module)

MOST_OF_CLIENT = 0.02
"""The largest share of a client's parameters that an extension may add to it."""


class ClientExtension(nn.Module):
    """What a client has of its own for an extension: its rows of the conditioning, its adapters.

    One row stands for all tasks of the extension together: whichever of them are asked for, the
    encoder computes the same.
    """

    def __init__(self, client: Client, kind: str, *, rank: int = 0) -> None:
        """Takes the shapes of `client`, whose conditioning is of `kind`. Rank 0 has no adapters."""
        super().__init__()
        self.kind = kind
        self.rows = nn.ParameterList(
            torch.zeros_like(_row(client.conditioning.get_parameter(name), axis, [0]))
            for name, axis in READ_BY_TASK[kind]
        )
        self.adapters: Adapters | None = Adapters(client.encoder, rank) if rank else None

    @torch.no_grad()
    def start(self, client: Client, tasks: Sequence[int], *, together: bool) -> None:
        """Starts the rows from those of the client's own `tasks`.

        `together` is as if all of these were asked for at once, else as their mean.
        """
        for row, (name, axis) in zip(self.rows, READ_BY_TASK[self.kind], strict=True):
            known = _row(client.conditioning.get_parameter(name), axis, tasks)
            if axis == 0:  # sets of channels: their union
                row.copy_(known.amax(dim=axis, keepdim=True))
            elif together:
                row.copy_(known.sum(dim=axis, keepdim=True))
            else:
                row.copy_(known.mean(dim=axis, keepdim=True))

    def client(self, shared: Client, num_tasks: int) -> Client:
        """The client that codes for this extension's tasks: `shared` with what is its own here.

        Every tensor that is not its own is the one of `shared`, which stays as it is.
        """
        own = copy.copy(shared)
        own._modules = dict(shared._modules)
        own.conditioning = _AlwaysAsked(_sharing(shared.conditioning), self.kind, self.rows)
        own.detector = _Undetected(shared.detector, num_tasks)  # type: ignore[assignment]
        own.exits = None
        if self.adapters is not None:
            own.encoder = self.adapters.encoder(shared.encoder)
        return own


class Adapters(nn.Module):
    """Low-rank changes of an encoder's convolutions (LoRA, Hu et al., ICLR 2022).

    W + U D for each convolution's weight W, with D (r, inputs of an output) and U (outputs, r), the
    latter 0 at init: the encoder then computes what it did.
    """

    def __init__(self, encoder: FiLMedEncoder, rank: int) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for _, layer in _convolutions(encoder):
            outputs, inputs = len(layer.weight), layer.weight[0].numel()
            self.down.append(torch.randn(rank, inputs) / inputs**0.5)
            self.up.append(torch.zeros(outputs, rank))

    def encoder(self, shared: FiLMedEncoder) -> FiLMedEncoder:
        """An encoder that computes with the changes, and whose other tensors are `shared`'s."""
        own = _sharing(shared)
        layers = list(_convolutions(own))
        for (name, layer), down, up in zip(layers, self.down, self.up, strict=True):
            own.set_submodule(name, _Adapted(layer, down, up))
        return own


def adapter_parameters(encoder: FiLMedEncoder, rank: int) -> int:
    """How many parameters adapters of this rank have."""
    return rank * sum(
        len(layer.weight) + layer.weight[0].numel() for _, layer in _convolutions(encoder)
    )


def rank_within(client: Client, kind: str, rank: int | None) -> int:
    """The rank of a client's adapters: `rank`, or for None the largest that is allowed.

    An extension may add `MOST_OF_CLIENT` of the client's parameters, its rows of a conditioning of
    this `kind` among them. ModelError beyond that.
    """
    all_own = sum(p.numel() for p in client.parameters())
    rows = sum(p.numel() for p in ClientExtension(client, kind).parameters())
    each = adapter_parameters(client.encoder, 1)
    largest = (int(MOST_OF_CLIENT * all_own) - rows) // each
    share = f"{MOST_OF_CLIENT:.0%} of the client's {all_own:,} parameters"
    if largest < 1:
        raise ModelError(
            f"rows and adapters of rank 1 have {rows + each:,} parameters, more than {share}: this "
            "client is too small for the grade adapter; use the grade row"
        )
    if rank is not None and rank > largest:
        raise ModelError(
            f"extend.rank is {rank}: rows and adapters then have {rows + rank * each:,} "
            f"parameters, more than {share}; give {largest} at most, or leave it out for "
            f"{largest}"
        )
    return largest if rank is None else rank


class Extension(nn.Module):
    """All that the tasks of an extension have of their own: on the client, between, on the server.

    `bottleneck` has one density and one row of tables, whatever the prior of the codec is.
    """

    def __init__(
        self, client: ClientExtension, bottleneck: Bottleneck, server: AnswersLater
    ) -> None:
        super().__init__()
        self.client, self.bottleneck, self.server = client, bottleneck, server

    @torch.no_grad()
    def start_density(self, shared: Bottleneck, row: int) -> None:
        """Starts the density from one row of the codec's."""
        known = shared.state_dict()
        for name, own in self.bottleneck.named_parameters():
            value = known[name]
            if name.startswith("density.") and value.ndim:
                value = value.view(shared.num_rows, -1, *value.shape[1:])[row]
            own.copy_(value)


def extended_server(shared: Server, own: AnswersLater) -> Server:
    """The server that answers an extension's tasks: `shared` with their decoders and tails."""
    server = copy.copy(shared)
    server._modules = dict(shared._modules)
    server.added = own
    return server


def density_row(prior: Prior, num_tasks: int, tasks: Sequence[int]) -> int:
    """The row of a codec's density that fits what is coded for several of its `tasks` best."""
    if prior == "shared":
        return 0
    return num_tasks if prior == "request" and len(tasks) != 1 else tasks[0]


class _AlwaysAsked(nn.Module):
    """A conditioning by one row, that of the extension, in place of rows of tasks."""

    def __init__(self, inner: nn.Module, kind: str, rows: nn.ParameterList) -> None:
        super().__init__()
        self.inner = inner
        for row, (name, _) in zip(rows, READ_BY_TASK[kind], strict=True):
            path, _, own = name.rpartition(".")
            setattr(inner.get_submodule(path), own, row)

    def forward(self, probabilities: Tensor, detected: Tensor) -> Modulation:
        """(B, K), which is ignored, and the detector's map to the modulation of each layer."""
        return self.inner(probabilities.new_ones(len(probabilities), 1), detected)  # type: ignore[no-any-return]


class _Undetected(nn.Module):
    """The detector's map for the encoder to read, and no word on tasks: they are asked for."""

    members = None

    def __init__(self, detector: TaskDetector | NoDetector, num_tasks: int) -> None:
        super().__init__()
        self.detector, self.num_tasks = detector, num_tasks
        self.channels = detector.channels

    def forward(self, stem: Tensor) -> View:
        """(B, C, H/S, W/S) to a view in which all tasks are equally probable."""
        known = self.detector(stem)
        logits = stem.new_zeros(len(stem), self.num_tasks, dtype=torch.float32)
        return View(known.stem, known.detected, logits)


class _Adapted(nn.Module):
    """A convolution with a low-rank change of its weight."""

    def __init__(self, layer: nn.Conv2d, down: nn.Parameter, up: nn.Parameter) -> None:
        super().__init__()
        self.layer, self.down, self.up = layer, down, up

    def forward(self, x: Tensor) -> Tensor:
        """As the convolution, (B, C, h, w) to (B, C', h', w')."""
        layer = self.layer
        with without_autocast(x):
            weight = layer.weight + (self.up @ self.down).view_as(layer.weight)
        return layer._conv_forward(x, weight, layer.bias)  # type: ignore[no-any-return]


def _convolutions(encoder: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    for name, layer in encoder.named_modules():
        if isinstance(layer, nn.Conv2d):
            yield name, layer


def _sharing(module: Module) -> Module:
    """A copy of a module whose tensors are those of the module itself."""
    known: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, known)


def _row(parameter: Tensor, axis: int, tasks: Sequence[int]) -> Tensor:
    return parameter.detach().index_select(axis, torch.tensor(tasks, device=parameter.device))
