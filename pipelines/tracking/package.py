"""Writes the folder of a registered model: code, checkpoint, signature, example, pinned packages.

Does not talk to MLflow's server.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, ParamSchema, ParamSpec
from PIL import Image
from PIL.PngImagePlugin import PngInfo

# Packages that mantis_core needs in each part. They are pinned to the versions that trained the
# model, because client and server must compute the same integer tables.
_CLIENT_PACKAGES = (
    "constriction",
    "mlflow",
    "numpy",
    "pandas",
    "pillow",
    "pydantic",
    "pyyaml",
    "safetensors",
    "torch",
)

_SERVER_PACKAGES = (*_CLIENT_PACKAGES, "torchvision")
_IMAGE = Schema([ColSpec(DataType.binary, "image")])
_ERROR = ColSpec(DataType.string, "error", required=False)
_STREAM = Schema([ColSpec(DataType.binary, "stream"), ColSpec(DataType.long, "wire_bytes"), _ERROR])

_PARAMS = ParamSchema(
    [
        ParamSpec("level", DataType.long, None),
        ParamSpec("max_bytes", DataType.long, None),
        ParamSpec("tasks", DataType.string, None),
    ]
)
"""What an encoder may be given for all images, as ClientCodec.encode takes it."""

_ANSWER = Schema(
    [
        ColSpec(DataType.long, "wire_bytes"),
        ColSpec(Array(DataType.string), "tasks"),
        ColSpec(DataType.string, "class_name", required=False),
        ColSpec(DataType.long, "class_index"),
        ColSpec(DataType.string, "answer"),
        _ERROR,
    ]
)


@dataclass(frozen=True)
class Part:
    """Describes the package of the whole codec or of one half. `code` is a file in this folder."""

    code: str
    packages: tuple[str, ...]
    signature: ModelSignature


PARTS = {
    "whole": Part(
        "whole_model.py",
        (*_SERVER_PACKAGES, "compressai", "torchdistill"),
        ModelSignature(inputs=_IMAGE, outputs=_ANSWER, params=_PARAMS),
    ),
    "client": Part(
        "client_model.py",
        _CLIENT_PACKAGES,
        ModelSignature(inputs=_IMAGE, outputs=_STREAM, params=_PARAMS),
    ),
    "server": Part(
        "server_model.py",
        _SERVER_PACKAGES,
        ModelSignature(inputs=Schema([ColSpec(DataType.binary, "stream")]), outputs=_ANSWER),
    ),
}


EXAMPLE = "A procedural picture, drawn by code. It shows nobody's data."
_EXAMPLE_SIDE = 64  # pixels; a client resizes every image


def write_package(
    target: Path,
    checkpoint: Path,
    *,
    part: str,
    run_id: str | None,
    model_id: str,
    example: bytes,
) -> None:
    """Writes the MLflow model of a checkpoint folder to `target`, which must not exist.

    `part` is a key of PARTS and must match the contents of the checkpoint. `example` is the one
    row of the input example: the picture of `example_image`, or for a server its stream.
    """
    wanted = PARTS[part]
    column = wanted.signature.inputs.input_names()[0]
    save_model(
        target,
        mlflow_model=Model(run_id=run_id, model_id=model_id),
        python_model=str(Path(__file__).with_name(wanted.code)),
        artifacts={"checkpoint": str(checkpoint)},
        code_paths=[str(_package_folder("mantis_core"))],
        pip_requirements=[f"{name}=={metadata.version(name)}" for name in wanted.packages],
        signature=wanted.signature,
        input_example=pd.DataFrame({column: [example]}),
        metadata={"input_example": EXAMPLE},
    )
    _forget_this_machine(target)


def example_image() -> bytes:
    """Returns a PNG of colour gradients with a disc. Its comment says that code has drawn it."""
    y, x = np.mgrid[:_EXAMPLE_SIDE, :_EXAMPLE_SIDE] / (_EXAMPLE_SIDE - 1)
    pixels = np.stack([x, y, 1 - x * y], axis=-1)
    pixels[(x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09] = (0.9, 0.6, 0.1)
    about, stream = PngInfo(), io.BytesIO()
    about.add_text("Comment", EXAMPLE)
    Image.fromarray((255 * pixels).astype(np.uint8)).save(stream, "PNG", pnginfo=about)
    return stream.getvalue()


def example_input(part: str, whole: Path) -> bytes:
    """Returns the example of a part: a picture, or the stream that the codec `whole` makes of it.

    `whole` is the checkpoint folder of the whole codec.
    """
    picture = example_image()
    if part != "server":
        return picture
    from mantis_core.codec.checkpoint import load_client  # imports torch, which takes seconds
    from mantis_core.device.requests import named_tasks

    client = load_client(whole)
    asked = named_tasks(client.spec.facts, None)
    [stream] = client.encode(client.prepare_images([picture]), asked)
    return stream


def _forget_this_machine(model: Path) -> None:
    """Removes the paths of this machine, which MLflow writes into the model's metadata."""
    path = model / "MLmodel"
    content = yaml.safe_load(path.read_text("utf-8"))
    flavor = content["flavors"]["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def _package_folder(package: str) -> Path:
    """Returns the source folder of a package without importing the package."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
