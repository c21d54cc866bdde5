"""Measures a client on one thread: its time from image to stream, what of it is coding, its folder.

    python -m benchmarks.client [--config configs/imagenet.yaml] [--tasks 12] [--pairs 15] [--json]
    python -m benchmarks.client --model FOLDER --image PHOTOGRAPH

FOLDER is a trained codec, or its client alone. Without one, the client has the shape of the config
and random weights, none of them 0 or 1 as before a training; the latent's channels have scales from
0.1 to 4, and the densities are fitted to such latents. It codes one image, drawn or given, in turn
with its parts, whole classifiers of about its cost (`LOCAL`, with random weights), ResNet-50's
forward, and JPEG and WebP of the same image. With `--export` also in turn, in onnxruntime: the
client as `mantis export` writes it and the classifiers, in float32 and in int8, and ResNet-50.
Reading the image file is not measured. The last line is one JSON object.
A ratio is a median time divided by that of ResNet-50, `..._macs` are multiply-adds. `folder_bytes`
are those of the folder of the client alone: packed weights (`network_bytes`), packed tables, the
config, and about a thousand more; `onnx_bytes` and `onnx_int8_bytes` those of an export without
README and golden cases.
"""

import argparse
import io
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, one_hot
from torchvision.models import (
    mnasnet0_5,
    mobilenet_v3_large,
    mobilenet_v3_small,
    resnet50,
    shufflenet_v2_x1_0,
)

from benchmarks.coder import draw, seconds_of
from benchmarks.program import count, one_message, say

warnings.filterwarnings("ignore", category=FutureWarning)  # torch-geometric warns at import

from mantis_core.architecture import ModelConfig  # noqa: E402
from mantis_core.codec.checkpoint import load_client, save_half, save_model  # noqa: E402
from mantis_core.codec.client_codec import ClientCodec  # noqa: E402
from mantis_core.codec.mantis import Mantis  # noqa: E402  (imports CompressAI)
from mantis_core.codec.packed_weights import pack_weights  # noqa: E402
from mantis_core.codec.spec import ModelSpec  # noqa: E402
from mantis_core.networks.bottleneck import Bottleneck  # noqa: E402
from mantis_core.networks.client import Client, latent_size  # noqa: E402
from mantis_core.networks.conditioning import shares_of  # noqa: E402
from mantis_core.networks.cost import multiply_adds  # noqa: E402
from mantis_core.networks.inference import one_thread, still  # noqa: E402
from mantis_core.networks.preprocessing import normalise  # noqa: E402
from mantis_core.tasks import TaskSpec  # noqa: E402
from pipelines.settings.reading import load_settings  # noqa: E402

LABELS = 40  # of a task; imagenet.yaml has 1,000 in 13
QUALITY = 75
BATCH, SIDE = 12, 8  # latents of a step of the fit
STEPS = 200
SENT = ("manifest.json", "look.onnx", "code.onnx", "tables.npz")  # what a device cannot do without
LOCAL = (mobilenet_v3_small, mnasnet0_5, shufflenet_v2_x1_0, mobilenet_v3_large)
"""Classifiers that a device could run instead of a client: 57 to 217 million at 224 pixels."""


class Classifier(nn.Module):
    """A network of torchvision on uint8 images, as a client takes them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """(1, 3, H, W) uint8 to logits (1, 1000)."""
        logits: Tensor = self.network(normalise(image))
        return logits


def drawn_image(size: tuple[int, int]) -> Tensor:
    """Returns uint8 (1, 3, *size): noise of equal strength in all octaves, as photographs have."""
    noise = torch.zeros(1, 3, *size)
    for octave in range(1, 8):
        cells = torch.randn(1, 3, 2**octave, 2**octave)
        noise += interpolate(cells, size=size, mode="bilinear")
    return (128 + 25 * noise).clamp(0, 255).to(torch.uint8)


def spec_of(model: ModelConfig, num_tasks: int, size: tuple[int, int]) -> ModelSpec:
    """Returns a codec's spec with `num_tasks` tasks, a small teacher and images of `size`."""
    names = [f"label {label}" for label in range(num_tasks * LABELS)]
    tasks = []
    for k in range(num_tasks):
        own = range(k * LABELS, (k + 1) * LABELS)
        labels = tuple(names[label] for label in own)
        tasks.append(TaskSpec(f"task{k}", "classification", LABELS, tuple(own), labels))
    return ModelSpec(
        model=model,
        tasks=tuple(tasks),
        classes=tuple(names),
        class_names=tuple(names),
        single_class=True,
        image_size=size,
        short_side=min(size),
        teacher="resnet18",
        split="layer2",
        split_shape=(128, *latent_size(size, 8)),
        last_shape=(512, *latent_size(size, 32)),
    )


def fit(bottleneck: Bottleneck, scales: Tensor, steps: int) -> None:
    """Trains the density on Laplace latents with smooth neighbours and scales (C, 1, 1).

    Each task's are up to twice as large or small.
    """
    tasks = bottleneck.num_tasks
    own = torch.exp(0.4 * torch.randn(tasks, bottleneck.channels, 1, 1)) * scales
    parameters = [p for p in bottleneck.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(parameters, lr=3e-2)
    for _ in range(steps):
        primary = torch.randint(tasks, (BATCH,))
        sharp = draw(torch.ones(1), (BATCH, bottleneck.channels, SIDE + 2, SIDE + 2))
        smooth = sharp[..., 1:-1, 1:-1] + 3 * avg_pool2d(sharp, 3, 1)
        mask = one_hot(primary, tasks).bool()
        optimiser.zero_grad()
        bottleneck(0.6 * own[primary] * smooth, mask, primary).bits.mean().backward()
        optimiser.step()


@torch.no_grad()
def disturb(client: Client) -> None:
    """Moves every weight of `client` a little, as a training does: new ones are often 0 or 1."""
    for weight in client.parameters():
        weight.add_(0.01 * torch.randn_like(weight))


@torch.no_grad()
def scale_latent(codec: Mantis, image: Tensor, scales: Tensor) -> None:
    """Gives the latent of `image` mean 0 and the deviations `scales` (C, 1, 1)."""
    view = codec.client(normalise(image))
    latent = codec.client.encode(
        view, torch.sigmoid(view.logits), shares_of(torch.zeros(1), codec.spec.num_rates)
    )
    mean, factor = latent.mean((0, 2, 3)), scales.flatten() / latent.std((0, 2, 3))
    last = codec.client.encoder.to_latent
    assert last.bias is not None
    last.weight *= factor[:, None, None, None]
    last.bias.copy_((last.bias - mean) * factor)


def network_of(codec: ClientCodec, image: Tensor) -> Callable[[], object]:
    """Returns a call that computes the latent of `image` (1, 3, H, W) as `encode` does."""

    @torch.no_grad()
    def call() -> object:
        with one_thread(), still(codec.client):
            view = codec.client(normalise(image))
            return codec.client.encode(
                view, torch.sigmoid(view.logits), shares_of(torch.zeros(1), codec.spec.num_rates)
            )

    return call


def picture_coder(image: Tensor, form: str) -> Callable[[], int]:
    """Returns a call that encodes `image` with Pillow and returns its bytes."""
    picture = Image.fromarray(image[0].permute(1, 2, 0).contiguous().numpy())

    def call() -> int:
        buffer = io.BytesIO()
        picture.save(buffer, form, quality=QUALITY)
        return buffer.tell()

    return call


def untrained(
    model: ModelConfig, num_tasks: int, size: tuple[int, int], image: Tensor, steps: int
) -> Mantis:
    """Returns a codec of `num_tasks` tasks whose densities are fitted in `steps` to drawn latents.

    The latent of `image` (1, 3, *size) has the scales of these.
    """
    torch.manual_seed(0)
    codec = Mantis(spec_of(model, num_tasks, size)).eval()
    scales = torch.logspace(-1, 0.6, model.encoder.latent_channels)[:, None, None]
    disturb(codec.client)
    scale_latent(codec, image, scales)
    fit(codec.bottleneck.train(), scales, steps)
    codec.finish()
    return codec


def exported(
    client: ClientCodec,
    image: Tensor,
    request: Sequence[str] | None,
    local: Mapping[str, nn.Module],
    scratch: Path,
) -> tuple[dict[str, Callable[[], object]], dict[str, float | str]]:
    """Returns calls of the exported client and classifiers, and sizes; int8 knows one image."""
    from mantis_lite.client import IMAGE, onnx_session, open_export
    from pipelines.export.graphs import write_graph
    from pipelines.export.quantise import quantise
    from pipelines.export.write import export_client

    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, float | str] = {}
    pixels = image.numpy()
    for name, int8 in (("onnx", False), ("onnx_int8", True)):
        folder = scratch / name
        sizes[f"{name}_bytes"] = sum(
            size
            for file, size in export_client(
                client, folder, images=[pixels[0]], int8=int8
            ).files.items()
            if file in SENT
        )
        lite = open_export(folder)
        calls[name] = partial(lite.encode, pixels, request)
        calls[f"{name}_network"] = partial(lite.network.see, pixels)
        sizes[f"{name}_stream_bytes"] = len(lite.encode(pixels, request)[0])
    for name, network in local.items():
        path = scratch / f"{name}.onnx"
        for form in ("onnx", "onnx_int8"):
            if form == "onnx":
                write_graph(network, (image,), [IMAGE], ["logits"], path)
            else:
                quantise(path, [pixels[0]])
            session = onnx_session(path, threads=1)
            calls[f"{name}_{form}"] = partial(session.run, None, {IMAGE: pixels})
            sizes[f"{name}_{form}_bytes"] = path.stat().st_size
    path = scratch / "resnet50.onnx"
    write_graph(resnet50().eval(), (normalise(image),), ["image"], ["logits"], path)
    session = onnx_session(path, threads=1)
    calls["resnet50_onnx"] = partial(session.run, None, {"image": normalise(image).numpy()})
    return calls, sizes


def measure(
    whole: Path, image: Tensor, pairs: int, *, export: bool = False
) -> dict[str, float | str]:
    """Measures the client in the folder `whole`, which codes `image`, a uint8 (1, 3, H, W).

    Runs all calls in turn, `pairs` times. A client that is asked is asked for its first task.
    """
    local = {make.__name__: Classifier(make()).eval() for make in LOCAL}
    more: dict[str, Callable[[], object]] = {}
    sizes: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "client"
        save_half(folder, whole, "client")
        bytes_of = {path.name: path.stat().st_size for path in folder.iterdir()}
        client = load_client(folder)
        request = client.facts.tasks[:1] if client.facts.requests == "asked" else None
        if export:
            more, sizes = exported(client, image, request, local, Path(scratch))
    described = client.describe()
    (seen,) = client.look(image, request)
    pictures = normalise(image)
    resnet = resnet50().eval()
    jpeg, webp = picture_coder(image, "JPEG"), picture_coder(image, "WEBP")
    calls: dict[str, Callable[[], object]] = {
        "resnet50": torch.no_grad()(lambda: resnet(pictures)),
        "image_to_stream": lambda: client.encode(image, request),
        "network": network_of(client, image),
        "coding": lambda: client.write_together([seen]),
        **{name: torch.no_grad()(partial(network, image)) for name, network in local.items()},
        "jpeg": jpeg,
        "webp": webp,
        **more,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    base = median.pop("resnet50")
    own = median["image_to_stream"]
    weights = pack_weights(client.client.state_dict())
    network_bytes = sum(weight.nbytes for weight in weights.values())
    return {
        "latent": "x".join(map(str, seen.image.map.shape)),
        "tasks": len(client.spec.tasks),
        **{name: round(value / base, 4) for name, value in median.items()},
        "coding_share": round(median["coding"] / own, 3),
        "rest_share": round(1 - (median["coding"] + median["network"]) / own, 3),
        "folder_bytes": sum(bytes_of.values()),
        "network_bytes": network_bytes,
        "table_bytes": described["client_bytes"] - network_bytes,
        "config_bytes": bytes_of["config.yaml"],
        "stream_bytes": len(client.encode(image, request)[0]),
        "jpeg_bytes": jpeg(),
        "webp_bytes": webp(),
        "client_macs": described["client_macs"],
        **{f"{n}_macs": multiply_adds(partial(network, image)) for n, network in local.items()},
        **sizes,
        "pairs": pairs,
    }


@one_message
def main() -> None:
    """Measures the client of a config, then prints one line a figure and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config", default="configs/imagenet.yaml", help="a config's model section"
    )
    parser.add_argument("--tasks", type=count, help="number of tasks; the config's")
    parser.add_argument("--model", help="a trained codec's folder, instead of random weights")
    parser.add_argument("--image", help="a photograph, instead of a drawn image; with --model")
    parser.add_argument("--pairs", type=count, default=15, help="rounds of all calls in turn")
    parser.add_argument(
        "--export", action="store_true", help="measure the client that `mantis export` writes too"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if bool(arguments.model) != bool(arguments.image):
        parser.error("--model and --image go together")
    if arguments.model:
        image = load_client(arguments.model).prepare_images([Path(arguments.image).read_bytes()])
        result = measure(Path(arguments.model), image, arguments.pairs, export=arguments.export)
    else:
        settings = load_settings(arguments.config)
        tasks = arguments.tasks or len(settings.tasks)
        image = drawn_image(settings.data.size)
        codec = untrained(settings.model, tasks, settings.data.size, image, STEPS)
        with tempfile.TemporaryDirectory() as scratch:
            save_model(whole := Path(scratch) / "whole", codec, {})
            result = measure(whole, image, arguments.pairs, export=arguments.export)
    if not arguments.json:
        for name, value in result.items():
            say(f"{name:34} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
