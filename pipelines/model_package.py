"""What a registered model consists of on disk: code, checkpoint, signature, pinned packages.

Writes a folder; knows no server and no version.
"""

import warnings
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import yaml
from mlflow.models import Model, ModelSignature
from mlflow.pyfunc import save_model
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array

# What the parts of mantis_core import. Pinned to what trained the model: tables are exact integers.
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
_STREAM = Schema([ColSpec(DataType.binary, "stream"), ColSpec(DataType.long, "wire_bytes")])
_ANSWER = Schema(
    [
        ColSpec(DataType.long, "wire_bytes"),
        ColSpec(Array(DataType.string), "tasks"),
        ColSpec(DataType.string, "class_name", required=False),
        ColSpec(DataType.long, "class_index"),
        ColSpec(DataType.string, "answer"),
    ]
)


@dataclass(frozen=True)
class Part:
    """How the whole codec or one half of it is packaged: `code` is a file of this package."""

    code: str
    packages: tuple[str, ...]
    signature: ModelSignature


PARTS = {
    "whole": Part(
        "mlflow_model.py",
        (*_SERVER_PACKAGES, "compressai", "torchdistill"),
        ModelSignature(inputs=_IMAGE, outputs=_ANSWER),
    ),
    "client": Part(
        "mlflow_client.py", _CLIENT_PACKAGES, ModelSignature(inputs=_IMAGE, outputs=_STREAM)
    ),
    "server": Part(
        "mlflow_server.py",
        _SERVER_PACKAGES,
        ModelSignature(inputs=Schema([ColSpec(DataType.binary, "stream")]), outputs=_ANSWER),
    ),
}


def write_package(
    target: Path, checkpoint: Path, *, part: str, run_id: str | None, model_id: str
) -> None:
    """Write the MLflow model of a checkpoint folder to `target`, which must not exist.

    `part` is a name of PARTS and says what the checkpoint holds."""
    wanted = PARTS[part]
    with warnings.catch_warnings():
        # An example would be stored with the model: an image of someone's data.
        warnings.filterwarnings("ignore", "(?s).*An input example was not provided")
        save_model(
            target,
            mlflow_model=Model(run_id=run_id, model_id=model_id),
            python_model=str(Path(__file__).with_name(wanted.code)),
            artifacts={"checkpoint": str(checkpoint)},
            code_paths=[str(_package_folder("mantis_core"))],
            pip_requirements=[f"{name}=={metadata.version(name)}" for name in wanted.packages],
            signature=wanted.signature,
        )
    _forget_this_machine(target)


def _forget_this_machine(model: Path) -> None:
    """MLflow notes where it copied from; a path of this machine has no meaning in a model."""
    path = model / "MLmodel"
    content = yaml.safe_load(path.read_text("utf-8"))
    flavor = content["flavors"]["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")


def _package_folder(package: str) -> Path:
    """Where a package's source is, found without importing it."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])
