"""The teacher: built by name, cut, loaded from files, refused where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mantis_core.errors import ModelError
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Problem
from mantis_core.teachers.backbone import Backbone
from mantis_core.teachers.teacher import Teacher, check_weights, flat_teacher, freeze
from mantis_core.teachers.weights import read_weights

INDICES = (5, 900, 17, 3)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """A torchvision state dict with the full ImageNet head."""
    torch.manual_seed(1)
    state: dict[str, Tensor] = torchvision.models.resnet18(weights=None).state_dict()
    return state


CLASSES = ("c5", "c900", "c17", "c3")


def build(
    state: dict[str, Tensor],
    classes: tuple[str, ...] = CLASSES,
    indices: tuple[int, ...] | None = INDICES,
    order: tuple[str, ...] | None = None,
) -> Teacher:
    return flat_teacher(
        "resnet18",
        state,
        split="layer2",
        classes=classes,
        imagenet_indices=indices,
        order=order,
        image_size=(32, 32),
    )


def reference_logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
    net = torchvision.models.resnet18(weights=None)
    net.load_state_dict(state)
    logits: Tensor = net.eval()(images)
    return logits


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_teacher_from_a_file_says_what_torchvisions_network_says_of_its_classes(
    suffix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": weights}, path)
    else:
        save_file(weights, path)
    teacher = build(read_weights(path)).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = reference_logits(weights, images)[:, list(INDICES)]
        torch.testing.assert_close(teacher(images)["logits"], expected)


def test_a_head_of_1000_is_put_in_the_datas_order_even_where_the_data_has_1000_classes(
    weights: dict[str, Tensor],
) -> None:
    order = tuple(reversed(range(1000)))
    teacher = build(weights, classes=tuple(f"c{i}" for i in order), indices=order)
    assert torch.equal(teacher.flat_head.weight, weights["fc.weight"].flip(0))
    assert torch.equal(teacher.flat_head.bias, weights["fc.bias"].flip(0))


def test_a_head_of_exactly_the_datas_classes_is_taken_as_it_is(weights: dict[str, Tensor]) -> None:
    own = {**weights, "fc.weight": weights["fc.weight"][:4], "fc.bias": weights["fc.bias"][:4]}
    assert torch.equal(build(own).flat_head.weight, own["fc.weight"])


def test_a_head_of_another_number_of_classes_is_refused(weights: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="1000 logits, the data has 4"):
        build(weights, indices=None)


def test_logits_in_an_order_of_their_own_are_put_in_the_datas(weights: dict[str, Tensor]) -> None:
    own = {**weights, "fc.weight": weights["fc.weight"][:5], "fc.bias": weights["fc.bias"][:5]}
    teacher = build(own, order=("c17", "c3", "unused", "c5", "c900"))
    assert torch.equal(teacher.flat_head.weight, own["fc.weight"][[3, 4, 0, 1]])
    assert torch.equal(teacher.flat_head.bias, own["fc.bias"][[3, 4, 0, 1]])


def test_weights_of_another_network_are_refused(weights: dict[str, Tensor]) -> None:
    fewer = {k: v for k, v in weights.items() if not k.startswith("layer4.1")}
    with pytest.raises(ModelError, match=r"do not fit resnet18: missing layer4.1.conv1.weight"):
        build(fewer)
    wider = {**weights, "conv1.weight": torch.zeros(64, 1, 7, 7)}
    with pytest.raises(ModelError, match=r"of another shape conv1.weight \(64, 1, 7, 7\) for"):
        build(wider)
    with pytest.raises(ModelError, match=r"no classifier of resnet18 .*; they begin with conv1"):
        build({"conv1.weight": weights["conv1.weight"]})


def test_a_file_is_checked_against_network_and_classes_without_building_a_teacher(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "own.safetensors"
    save_file({**weights, "fc.weight": torch.zeros(4, 512), "fc.bias": torch.zeros(4)}, path)
    check_weights(path, "resnet18", classes=CLASSES)
    check_weights(path, "resnet18", classes=CLASSES, order="sorted")
    with pytest.raises(ModelError, match=r"has 4 logits, the data has 3 classes. Name the class"):
        check_weights(path, "resnet18", classes=CLASSES[:3])
    with pytest.raises(ModelError, match=r"weights in .*safetensors do not fit resnet34"):
        check_weights(path, "resnet34", classes=CLASSES)
    (tmp_path / "names.txt").write_text("c5\nc900\nc17\n\n")
    with pytest.raises(ModelError, match=r"names 3 classes, .* has 4 logits"):
        check_weights(path, "resnet18", classes=CLASSES, order=str(tmp_path / "names.txt"))


def test_a_file_to_begin_with_needs_no_classifier(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    body = {k: v for k, v in weights.items() if not k.startswith("fc.")}
    save_file(body, tmp_path / "body.safetensors")
    check_weights(tmp_path / "body.safetensors", "resnet18", field="teacher.start")
    with pytest.raises(ModelError, match=r"teacher\.start: no file"):
        check_weights(tmp_path / "none.pth", "resnet18", field="teacher.start")


def test_an_unknown_name_gets_did_you_mean() -> None:
    with pytest.raises(ModelError, match=r"'resnet19'; did you mean .*resnet18"):
        Backbone("resnet19")
    with pytest.raises(ModelError, match=r"see torchvision\.models"):
        Backbone("zzzzzz")


def test_a_network_of_another_build_is_refused_with_those_that_work() -> None:
    for name in ("squeezenet1_1", "mnasnet0_5"):
        with pytest.raises(ModelError, match="take a ResNet"):
            Backbone(name)


def test_an_unknown_split_is_refused_with_the_ones_there_are() -> None:
    with pytest.raises(ModelError, match=r"cut after one of: conv1, .*layer3"):
        Teacher("resnet18", split="layer9")


@pytest.mark.parametrize(
    ("name", "split"), [("resnet18", "layer2"), ("mobilenet_v2", "features.6")]
)
def test_split_and_tail_together_are_the_whole_network(name: str, split: str) -> None:
    backbone = Backbone(name).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = backbone.features(images, [split])
        torch.testing.assert_close(backbone.tail_after(split).eval()(found[split]), found["last"])
        torch.testing.assert_close(backbone(images), found["last"])


def test_a_tail_is_a_copy_that_may_be_trained_without_the_teacher() -> None:
    backbone = Backbone("resnet18")
    tail = backbone.tail_after("layer3")
    with torch.no_grad():
        for parameter in tail.parameters():
            parameter.zero_()
    assert next(backbone.net.layer4.parameters()).abs().sum() > 0  # type: ignore[union-attr]


def test_feature_shapes_leaves_the_teacher_as_it_was(teacher: Teacher) -> None:
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert teacher.feature_shapes((64, 32)) == ((16, 8, 4), (32, 2, 1))
    assert teacher.backbone.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("name", "split", "signed"),
    [
        ("resnet18", "layer2", (False, False)),
        ("shufflenet_v2_x0_5", "stage2", (False, False)),
        ("mobilenet_v2", "features.6", (True, False)),
    ],
)
def test_a_feature_is_signed_where_its_block_ends_in_no_relu(
    name: str, split: str, signed: tuple[bool, bool]
) -> None:
    teacher = Teacher(name, split=split, flat_classes=2, image_size=(32, 32)).train()
    assert teacher.signed_features((32, 32)) == signed
    assert teacher.backbone.training


def test_a_regnet_is_cut_between_its_stages_and_keeps_the_names_of_its_weights() -> None:
    backbone = Backbone("regnet_x_400mf").eval()
    assert backbone.names == ("stem", *(f"trunk_output.block{i}" for i in range(1, 5)))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        found = backbone.features(images, ["trunk_output.block2"])
        tail = backbone.tail_after("trunk_output.block2").eval()
        torch.testing.assert_close(tail(found["trunk_output.block2"]), found["last"])
    names = {f"trunk_output.{n}" for n in backbone.net.trunk_output.state_dict()}  # type: ignore[union-attr]
    assert set(backbone.tail_after("stem").state_dict()) == names


def test_a_teacher_without_a_flat_head_answers_each_task(mixed_problem: Problem) -> None:
    teacher = Teacher("resnet18", split="layer2", tasks=mixed_problem.tasks, image_size=(32, 32))
    out = teacher.eval()(torch.randn(2, 3, 32, 32))
    assert out["logits/animals"].shape == (2, 3)
    assert out["logits/ground"].shape == (2, 3, 32, 32)
    assert "logits" not in out


def test_freeze_stops_gradients_and_training_mode() -> None:
    module = freeze(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    assert not any(p.requires_grad for p in module.parameters())
    assert not any(m.training for m in module.modules())


def test_normalise_is_imagenets() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(
        normalise(images).flatten(1),
        torch.tensor(
            [[-2.117904, -2.035714, -1.804444], [2.2489083, 2.4285715, 2.64]],
        ),
    )
