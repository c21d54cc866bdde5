"""A tiny untrained codec for the tests of commands on streams."""

from pathlib import Path

import pytest

TASKS = ("one", "two")


@pytest.fixture(scope="session")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A codec of two classifications and a segmentation, saved as a model folder.

    It loads in this process alone: its teacher is none of torchvision's networks.
    """
    torch = pytest.importorskip("torch")
    from mantis_core.architecture import ModelConfig
    from mantis_core.codec.checkpoint import save_model
    from mantis_core.codec.mantis import Mantis
    from mantis_core.codec.spec import model_spec
    from mantis_core.config import TeacherConfig
    from mantis_core.tasks import Problem, TaskSpec
    from mantis_core.training.teacher import new_teacher
    from tests.mantis_core.narrow_resnet import NAME

    torch.manual_seed(0)
    tasks = (
        TaskSpec("one", "classification", 2, (0, 1), ("a", "b")),
        TaskSpec("two", "classification", 2, (2, 3), ("c", "d")),
        TaskSpec("areas", "segmentation", 3, (), ("x", "y", "z")),
    )
    names = ("a", "b", "c", "d")
    problem = Problem(tasks, names, names, True, (32, 32), 32)
    config = TeacherConfig(name=NAME, weights="train", split="layer2")
    teacher = new_teacher(config, problem)
    small = ModelConfig.model_validate(
        {
            "stem": {"channels": [8, 8]},
            "detector": {"channels": 8, "hidden": 8},
            "encoder": {"channels": 8, "latent_channels": 4},
            "decoder": {"channels": 8, "task_channels": 8},
        }
    )
    model = Mantis(model_spec(small, teacher, problem))
    model.finish()
    folder = tmp_path_factory.mktemp("codec") / "model"
    save_model(folder, model, {"stage": "stage2"})
    return folder
