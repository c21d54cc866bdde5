"""The whole codec: images to streams to answers."""

from __future__ import annotations

import copy
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mantis_core.architecture import ConditioningConfig, ModelConfig
from mantis_core.bitstream.container import BitstreamError, Reason, StreamSpec, pack, unpack
from mantis_core.bitstream.wire import read_stream
from mantis_core.codec.mantis import Mantis
from mantis_core.codec.masks import primary_task
from mantis_core.errors import ModelError
from mantis_core.networks.inference import still
from mantis_core.networks.preprocessing import normalise
from mantis_core.tasks import Problem

PRIORS = ("shared", "per_task", "primary")


def images(count: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 3, height, width)
    return torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)


def stream_spec(codec: Mantis) -> StreamSpec:
    return codec.client_codec().stream_spec


def codec_with(
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
    problem: Problem,
    **changes: Any,
) -> Mantis:
    return codec_of(problem, small_config(**changes))


@pytest.mark.parametrize("conditioning", ["film", "attention", "features", "none"])
@pytest.mark.parametrize("prior", PRIORS)
def test_what_is_encoded_is_decoded_for_every_prior_and_conditioning(
    prior: str,
    conditioning: str,
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> None:
    codec = codec_with(
        codec_of,
        small_config,
        problem,
        prior=prior,
        conditioning=ConditioningConfig(kind=conditioning, hidden=8),  # type: ignore[arg-type]
    )
    pixels = images()
    streams = codec.encode(pixels)
    sent = [read_stream(data, codec.tables(), stream_spec(codec)) for data in streams]
    with torch.no_grad():
        view = codec.client(normalise(pixels))
        latent = codec.client.encode(view, torch.sigmoid(view.logits))
    symbols = latent.round().numpy()
    for i, (answer, stream, data) in enumerate(
        zip(codec.decode(streams), sent, streams, strict=True)
    ):
        (image,) = stream.images
        assert np.abs(image.map).max() > 0
        np.testing.assert_array_equal(image.map, symbols[i])
        active = [t.name for t, on in zip(problem.tasks, image.tasks.mask, strict=True) if on]
        assert list(answer.tasks) == active == list(answer.labels)
        assert answer.wire_bytes == len(data)
        assert answer.payload_bytes == stream.payload_bytes
        assert answer.class_name == problem.class_names[answer.class_index]
        assert 0 < answer.class_probability <= 1


def test_only_a_detailed_encoding_asks_the_density(
    codec: Mantis, monkeypatch: pytest.MonkeyPatch
) -> None:
    detailed = [encoded.data for encoded in codec.encode_in_detail(images())]

    def fail(*_: Any) -> None:
        raise AssertionError("nobody reads this estimate")

    monkeypatch.setattr(codec.bottleneck, "forward", fail)
    assert codec.encode(images()) == detailed


@pytest.mark.parametrize("prior", PRIORS)
def test_estimated_bits_match_the_real_payload(
    prior: str,
    problem: Problem,
    codec_of: Callable[..., Mantis],
    small_config: Callable[..., ModelConfig],
) -> None:
    codec = codec_with(codec_of, small_config, problem, prior=prior)
    for encoded in codec.encode_in_detail(images(3, 128, 128)):
        real = 8 * encoded.payload_bytes
        assert abs(encoded.estimated_bits - real) <= 0.01 * real + 8 * 8


def test_streams_are_byte_strings_one_or_several(codec: Mantis) -> None:
    (stream,) = codec.encode(images(1))
    (answer,) = codec.decode(stream)  # type: ignore[arg-type]
    assert answer.to_dict() == codec.decode([stream])[0].to_dict()
    for wrong in (["no"], "no", [stream, 3]):
        with pytest.raises(ModelError, match="allowed: a list of bytes"):
            codec.decode(wrong)  # type: ignore[arg-type]


def test_only_active_tasks_are_decoded(codec: Mantis, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = torch.tensor([[True, False, False], [True, False, True], [True, False, False]])
    streams = codec.encode(images(), tasks=asked)
    seen: Counter[str] = Counter()
    answer = codec.server.answer

    def count(task: Any, split: Tensor, *rest: Any) -> Tensor:
        seen[task.name] += len(split)
        return answer(task, split, *rest)

    monkeypatch.setattr(codec.server, "answer", count)
    codec.decode(streams)
    assert seen == {"animals": 3, "kitchen": 1}


def test_the_mask_is_never_empty_and_cut_at_its_largest_size(
    problem: Problem, codec_of: Callable[..., Mantis], small_config: Callable[..., ModelConfig]
) -> None:
    codec = codec_with(codec_of, small_config, problem, max_active_tasks=2)
    p = torch.tensor([[0.1, 0.2, 0.05], [0.9, 0.8, 0.7], [0.1, 0.6, 0.3]])
    assert codec.select_mask(p).int().tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 0]]
    codec.mask_threshold.fill_(0.25)
    assert codec.select_mask(p).int().tolist() == [[0, 1, 0], [1, 1, 0], [0, 1, 1]]


def test_the_primary_task_is_the_most_probable_active_one() -> None:
    p = torch.tensor([[0.9, 0.2, 0.3], [0.9, 0.0, 0.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    assert primary_task(p, mask).tolist() == [2, 1]


def test_a_tiny_stream_cannot_claim_a_huge_image(codec: Mantis) -> None:
    spec = stream_spec(codec)
    (data,) = codec.encode(images(1))
    generous = replace(spec, max_pixels=2**40, max_total_pixels=2**40)
    forged = pack(replace(unpack(data, spec), input_shape=(4096, 4096)), generous)
    assert len(forged) < 200
    with pytest.raises(BitstreamError) as refused:
        codec.decode([forged])
    assert refused.value.reason == Reason.TOO_LARGE
    assert codec.decode(codec.encode(images(1, 128, 128)))  # 16 times the model's own


def test_a_damaged_stream_and_one_of_another_model_are_refused(
    codec: Mantis, problem: Problem, codec_of: Callable[..., Mantis]
) -> None:
    (data,) = codec.encode(images(1))
    with pytest.raises(BitstreamError) as damaged:
        codec.decode([data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]])
    assert damaged.value.reason == Reason.CORRUPT
    other = codec_of(problem)
    with torch.no_grad():
        next(other.client.stem.parameters()).add_(0.1)
    other.finish()
    with pytest.raises(BitstreamError) as foreign:
        other.decode([data])
    assert foreign.value.reason == Reason.ANOTHER_MODEL


@pytest.mark.parametrize("part", ["server.decoder", "client.detector", "bottleneck.density"])
def test_models_that_differ_in_any_weight_have_different_ids(part: str, codec: Mantis) -> None:
    other = copy.deepcopy(codec)
    name, parameter = next(
        (n, p) for n, p in other.named_parameters() if n.startswith(part) and p.ndim > 1
    )
    with torch.no_grad():
        parameter.view(-1)[0].add_(1e-3)
    other.finish()
    assert other.model_id() != codec.model_id(), name


def test_the_id_is_that_of_the_weights_now_not_of_those_once_asked_about(codec: Mantis) -> None:
    other = copy.deepcopy(codec)
    first = other.model_id()
    weights = {k: v.clone() for k, v in codec.state_dict().items()}
    weights["server.decoder.last.bias"].add_(1)
    other.load_state_dict(weights)
    assert other.model_id() != first
    other.load_state_dict(codec.state_dict())
    assert other.model_id() == first


def test_models_of_equal_weights_and_other_preprocessing_have_different_ids(codec: Mantis) -> None:
    other = copy.deepcopy(codec)
    other.spec = codec.spec.model_copy(update={"short_side": 40})
    other.finish()
    assert other.model_id() != codec.model_id()


def test_what_is_sent_of_an_image_does_not_depend_on_its_companions(codec: Mantis) -> None:
    pixels = images(4)
    together = codec.encode_in_detail(pixels)
    for i, encoded in enumerate(together):
        (alone,) = codec.encode_in_detail(pixels[i : i + 1])
        assert alone.data == encoded.data
        assert alone.estimated_bits == pytest.approx(encoded.estimated_bits, rel=1e-5)


def test_encoding_leaves_the_number_of_threads_as_it_was(codec: Mantis) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        looking = codec.client_codec().look(images(2))
        next(looking)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_several_images_share_one_stream_and_its_header(codec: Mantis) -> None:
    client, pixels = codec.client_codec(), images(5)
    data = client.write_together(list(client.look(pixels)))
    apart = codec.encode(pixels)
    assert len(data) <= sum(map(len, apart)) - 4 * 11 + 1
    answers = codec.decode([data, apart[0]])
    assert [a.labels for a in answers] == [a.labels for a in codec.decode([*apart, apart[0]])]
    assert sum(a.wire_bytes for a in answers[:5]) == pytest.approx(len(data))
    with pytest.raises(ModelError, match="a stream holds one shape"):
        client.write_together([*client.look(pixels), *client.look(images(1, 40, 40))])


def test_an_answer_does_not_depend_on_the_streams_it_is_decoded_with(codec: Mantis) -> None:
    small, wide = images(3), images(2, 40, 48)
    streams = [*codec.encode(small), *codec.encode(wide, tasks=["animals", "tools"])]
    order = [3, 0, 4, 1, 2]
    together = codec.decode(streams[i] for i in order)
    for i, answer in zip(order, together, strict=True):
        (alone,) = codec.decode([streams[i]])
        assert (alone.tasks, alone.labels, alone.class_index) == (
            answer.tasks,
            answer.labels,
            answer.class_index,
        )
        assert alone.class_probability == pytest.approx(answer.class_probability, abs=1e-5)
        assert (alone.wire_bytes, alone.payload_bytes) == (answer.wire_bytes, answer.payload_bytes)


def test_probabilities_reach_the_server_only_as_transmitted(
    problem: Problem, codec_of: Callable[..., Mantis], small_config: Callable[..., ModelConfig]
) -> None:
    sent = codec_with(codec_of, small_config, problem, send_probabilities=True)
    silent = codec_with(codec_of, small_config, problem, send_probabilities=False)
    steps = {2.0 ** (-level / 2) for level in range(16)}
    for answer in sent.decode(sent.encode(images())):
        for value in answer.task_probability.values():
            assert min(abs(value - step) for step in steps) < 1e-6
    for answer in silent.decode(silent.encode(images())):
        assert set(answer.task_probability.values()) == {1.0}


def test_segmentation_is_decoded_to_a_mask_of_the_inputs_size(
    mixed_problem: Problem, codec_of: Callable[..., Mantis]
) -> None:
    codec = codec_of(mixed_problem)
    streams = codec.encode(images(2, 40, 48), tasks=["ground", "animals"])
    for answer in codec.decode(streams):
        mask = answer.segmentation["ground"]
        assert (mask.shape, mask.dtype) == ((40, 48), np.uint8)
        assert mask.max() < 3
        assert list(answer.labels) == ["animals"]
        assert (answer.class_index, answer.class_name) == (-1, None)
        shares = json.loads(json.dumps(answer.to_dict()))["segmentation"]["ground"]
        assert sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_encoding_without_tables_says_what_to_do(
    problem: Problem, stage2_of: Callable[..., Any]
) -> None:
    with pytest.raises(RuntimeError, match="update_tables"):
        stage2_of(problem).student.encode(images())


def test_encoding_leaves_training_mode_and_weights_as_they_were(codec: Mantis) -> None:
    codec.train()
    before = {k: v.clone() for k, v in codec.state_dict().items()}
    codec.encode(images())
    assert codec.training
    assert all(torch.equal(v, before[k]) for k, v in codec.state_dict().items())
    with still(codec):
        assert not codec.training
    assert codec.training


@pytest.mark.parametrize(("width", "height"), [(64, 48), (20, 30), (32, 32), (33, 200)])
def test_an_image_file_of_any_size_is_prepared_as_in_training(
    width: int, height: int, codec: Mantis
) -> None:
    file = io.BytesIO()
    Image.new("L", (width, height), 128).save(file, "PNG")
    pixels = codec.prepare_image(file.getvalue())
    assert (pixels.shape, pixels.dtype) == ((3, 32, 32), torch.uint8)
    assert (pixels == 128).all()


def test_describe_counts_the_client(codec: Mantis) -> None:
    facts = codec.describe()
    assert facts["model_id"] == codec.model_id().hex()
    assert facts["tasks"]["animals"] == ["cat", "dog", "owl"]
    assert facts["client_parameters"] == sum(p.numel() for p in codec.client.parameters())
    first_layer = 3 * 8 * 25 * 16 * 16
    assert facts["client_macs"] > first_layer
    json.dumps(facts)


def test_without_a_word_forward_follows_the_detector(codec: Mantis) -> None:
    pixels = images(5)
    with torch.no_grad():
        seen = codec(normalise(pixels))
        p = torch.sigmoid(codec.client(normalise(pixels)).logits)
        told = codec(normalise(pixels), p, codec.select_mask(p))
    assert torch.equal(seen.mask, codec.select_mask(p))
    assert torch.equal(seen.bits, told.bits)
    coded = codec.encode_in_detail(pixels)
    assert np.array_equal(seen.mask.numpy(), [each.mask for each in coded])
    bits = torch.tensor([each.estimated_bits for each in coded])
    torch.testing.assert_close(seen.bits, bits, rtol=1e-2, atol=1.0)


def test_forward_from_a_view_is_that_from_images_and_does_not_look_again(codec: Mantis) -> None:
    given = normalise(images())
    with torch.no_grad():
        expected, view = codec(given), codec.client(given)
        codec.client.stem.register_forward_hook(lambda *_: 1 / 0)
        found = codec(given, view=view)
    assert torch.equal(found.bits, expected.bits)
    assert torch.equal(found.joint, expected.joint)
    assert torch.equal(found.decision, expected.decision)


def test_forward_encodes_and_decides_by_what_it_is_told(codec: Mantis) -> None:
    given = normalise(images())
    alone = torch.tensor([[False, True, False]]).expand(3, -1)
    with torch.no_grad():
        found = codec(given, alone.float(), alone)
    assert torch.equal(found.mask, alone)
    assert set(found.decision.tolist()) <= set(codec.spec.tasks[1].classes)
    assert list(found.tasks) == list(codec.spec.task_names)


def test_tables_follow_loaded_weights(
    problem: Problem, codec: Mantis, codec_of: Callable[..., Mantis]
) -> None:
    other = codec_of(problem)
    with torch.no_grad():
        other.bottleneck.density.biases[0].add_(0.5)
    other.finish()
    assert other.tables().digest() != codec.tables().digest()
    other.load_state_dict(codec.state_dict())
    assert other.tables().digest() == codec.tables().digest()
