"""A small run of the fuzzer, and a proof that it would notice what it looks for."""

import pytest

from mantis_core.bitstream.wire import Unpacked
from tests import fuzz_bitstream


@pytest.fixture
def few_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_bitstream, "STREAMS_A_MODEL", 4)


@pytest.mark.usefixtures("few_streams")
def test_every_input_is_refused_or_is_what_it_decodes_to() -> None:
    tally = fuzz_bitstream.run(20_000, seed=1)
    assert sum(tally.by_kind.values()) >= 20_000
    assert tally.wrongly_accepted == []
    assert tally.largest_bytes <= fuzz_bitstream.LIMIT_BYTES
    assert {"flip", "cut", "splice", "noise", "forged body", "forged header"} <= set(tally.by_kind)
    assert set(tally.refused) >= {"not_a_stream", "truncated", "corrupt", "version", "too_large"}
    assert sum(tally.accepted.values()) > 0


@pytest.mark.usefixtures("few_streams")
def test_a_reader_that_believes_damage_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fuzz_bitstream.models()[0]
    honest = fuzz_bitstream.read_stream(model.streams[1], model.tables, model.spec)

    def gullible(*_: object) -> Unpacked:
        return honest

    monkeypatch.setattr(fuzz_bitstream, "models", lambda: [model])
    monkeypatch.setattr(fuzz_bitstream, "read_stream", gullible)
    assert fuzz_bitstream.run(0).wrongly_accepted


@pytest.mark.usefixtures("few_streams")
def test_a_hello_that_is_believed_without_its_checksum_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fuzz_bitstream.make_named_model("hellos")
    monkeypatch.setattr(fuzz_bitstream, "models", lambda: [model])
    assert not fuzz_bitstream.run(2000).wrongly_accepted
    monkeypatch.setattr(fuzz_bitstream, "read_hello", lambda *_: fuzz_bitstream.SESSION)
    assert fuzz_bitstream.run(0).wrongly_accepted


@pytest.mark.usefixtures("few_streams")
@pytest.mark.parametrize("kind", ["messages", "replies"])
def test_messages_that_pass_without_their_checksum_are_counted(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fuzz_bitstream.make_named_model(kind)
    monkeypatch.setattr(fuzz_bitstream, "models", lambda: [model])
    tally = fuzz_bitstream.run(2000)
    assert tally.messages > 1000
    assert not fuzz_bitstream.too_many_passed(tally)
    believed = model.read(model.streams[0])
    monkeypatch.setattr(fuzz_bitstream, "read_message", lambda *_: believed)
    tally = fuzz_bitstream.run(2000)
    assert tally.passed == tally.messages
    assert fuzz_bitstream.too_many_passed(tally)
