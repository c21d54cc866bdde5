"""Files of weights: what is taken out of them, the order of their logits, what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mantis_core.errors import ModelError
from mantis_core.teachers.weights import head_rows, read_order, read_weights

STATE = {"conv.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "content",
    [
        STATE,
        {"state_dict": STATE, "epoch": 3},
        {"model": STATE, "optimizer": {"state": {}, "param_groups": []}},
        {"model_state_dict": STATE},
        {f"module.{name}": value for name, value in STATE.items()},
        {"state_dict": {f"model._orig_mod.{name}": value for name, value in STATE.items()}},
        {"n_averaged": torch.tensor(3), **{f"module.{n}": value for n, value in STATE.items()}},
    ],
)
@pytest.mark.parametrize("name", ["t.pth", "t.pth.tar", "last.ckpt", "pytorch_model.bin"])
def test_a_checkpoint_is_unwrapped_to_the_networks_own_names(
    content: dict[str, Any], name: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / name)
    state = read_weights(tmp_path / name)
    assert list(state) == list(STATE)
    assert all(torch.equal(state[key], value) for key, value in STATE.items())


def test_a_prefix_that_not_all_names_have_stays(tmp_path: Path) -> None:
    mixed = {"model.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(mixed, tmp_path / "t.pth")
    assert set(read_weights(tmp_path / "t.pth")) == set(mixed)


class Dangerous:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("writer", ["torch", "plain"])
def test_a_pickle_with_code_is_refused_and_not_run(writer: str, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pth"
    content = {"fc.weight": Dangerous(tmp_path / "made")}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ModelError, match="not a plain state dict"):
        read_weights(path)
    assert not (tmp_path / "made").exists()


def test_other_files_are_refused_with_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="give train, pretrained, package or a file"):
        read_weights(tmp_path / "nothing.pth")
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"must end in \.safetensors, \.pth, .* or \.tar"):
        read_weights(tmp_path / "weights.onnx")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="damaged"):
        read_weights(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "more.pth")
    with pytest.raises(ModelError, match=r"more than named tensors, .*: at its top are epoch"):
        read_weights(tmp_path / "more.pth")


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2).half(), "n": torch.ones(1).long()}, tmp_path / "t.safetensors")
    state = read_weights(tmp_path / "t.safetensors")
    assert (state["a"].dtype, state["n"].dtype) == (torch.float32, torch.int64)


def test_logits_are_found_by_class_id_or_by_name() -> None:
    order = ("owl", "cat", "dog", "saw")
    assert head_rows(4, ("cat", "owl"), order=order) == [1, 0]
    assert head_rows(4, ("n1", "n2"), class_names=("saw", "dog"), order=order) == [3, 2]
    with pytest.raises(ModelError, match=r"lacks bee; it names owl, cat, dog, ..."):
        head_rows(4, ("cat", "bee"), order=order)


def test_logits_without_an_order_are_imagenets_or_the_datas() -> None:
    assert head_rows(1000, ("a", "b"), imagenet_indices=(7, 3)) == [7, 3]
    assert head_rows(2, ("b", "a")) == [0, 1]
    with pytest.raises(ModelError, match=r"k.pth has 1000 logits, the data has 2 classes"):
        head_rows(1000, ("b", "a"), source="k.pth")


def test_the_order_is_sorted_or_that_of_the_lines_of_a_file(tmp_path: Path) -> None:
    assert read_order("sorted", ("dog", "Cat", "cat")) == ("Cat", "cat", "dog")
    path = tmp_path / "names.txt"
    path.write_text("dog\r\n\n  hot dog \ncat", encoding="utf-8")
    assert read_order(path, ()) == ("dog", "hot dog", "cat")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .* or `sorted`"),
        (b"\n \n", "is empty"),
        (b"cat\ndog\ncat\n", "names 'cat' twice"),
        (b"\xff\xfe\x00", "no text in UTF-8"),
    ],
)
def test_a_file_that_names_no_order_is_refused(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / "names.txt").write_bytes(content)
    with pytest.raises(ModelError, match=rf"teacher\.classes.*{message}"):
        read_order(tmp_path / "names.txt", ("cat",))
