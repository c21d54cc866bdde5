"""benchmarks/coder.py: what it measures is there, and both coders carry the same symbols."""

from benchmarks.coder import measure


def test_both_coders_are_timed_on_one_latent():
    found = measure((4, 4, 4), 1)
    assert min(found["encode_ratio"], found["decode_ratio"]) > 0
    assert found["payload_bytes"] <= found["compressai_bytes"]
    assert 0 <= found["over_ideal_bytes"] <= 2
