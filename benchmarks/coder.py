"""Compares our coder with CompressAI's on the same symbols: speed, sizes and the ideal size.

    python -m benchmarks.coder [--pairs 15] [--json]

Both encode a latent from a float tensor and decode it to one, on one thread, one image at a time,
in alternating runs. CompressAI uses its own tables of the same density. The last line is one JSON
object. A ratio is CompressAI's median time divided by ours.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as RichTable

from mantis_core.bitstream.coder import TOTAL, Ints, RangeReader, RangeWriter, Table, to_symbols

warnings.filterwarnings("ignore", category=FutureWarning)  # torch-geometric warns at import

from mantis_core.codec.tables import table_set, update_tables  # noqa: E402
from mantis_core.networks.bottleneck import Bottleneck  # noqa: E402  (imports CompressAI)

LATENTS = ((16, 8, 8), (16, 16, 16), (48, 28, 28), (24, 55, 55))
SMALL = LATENTS[0]
BURST_SECONDS = 0.02  # a timing repeats its call for at least this long


def trained_bottleneck(channels: int, steps: int = 150) -> tuple[Bottleneck, torch.Tensor]:
    """Fits a density to Laplace latents. Also returns the scales (C, 1, 1), from 0.1 to 4."""
    torch.manual_seed(0)
    bottleneck = Bottleneck(channels, 1, "shared")
    scales = torch.logspace(-1, 0.6, channels)[:, None, None]
    optimiser = torch.optim.Adam(bottleneck.parameters(), lr=3e-2)
    mask, primary = torch.ones(8, 1, dtype=torch.bool), torch.zeros(8, dtype=torch.long)
    for _ in range(steps):
        optimiser.zero_grad()
        bottleneck(draw(scales, (8, channels, 8, 8)), mask, primary).bits.mean().backward()
        optimiser.step()
    update_tables(bottleneck)
    bottleneck.density.update(force=True, update_quantiles=True)  # finds the tails
    with torch.no_grad():
        bottleneck.density.quantiles[:, :, 1] = 0  # our median, so both encode the same integers
    bottleneck.density.update(force=True)
    return bottleneck.eval(), scales


def draw(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Draws a Laplace latent (..., C, h, w) with one scale per channel."""
    return torch.distributions.Laplace(0.0, 1.0).sample(shape) * scales


def ideal_bytes(symbols: Ints, table: Table) -> float:
    """Returns the ideal size of symbols (C, h, w) in bytes: the sum of -log2 p, divided by 8.

    p are the integer probabilities of the table. An escaped symbol adds the length of its code.
    """
    bits = 0.0
    for values, row, offset, length in zip(
        symbols.reshape(len(symbols), -1), table.cdf, table.offsets, table.lengths, strict=True
    ):
        entries = values.astype(np.int64) - offset
        outside = (entries < 0) | (entries >= length - 1)
        counts = np.diff(row)[np.where(outside, length - 1, entries)]
        distance = np.where(entries < 0, -entries, entries - length + 2)[outside]
        bits += -np.log2(counts / TOTAL).sum() + (2 * np.floor(np.log2(distance)) + 2).sum()
    return float(bits / 8)


def encode(symbols: Ints, table: Table) -> bytes:
    """Encodes one latent (C, h, w) to a payload without a header."""
    writer = RangeWriter()
    writer.put_symbols(symbols, table)
    return writer.close()


def decode(payload: bytes, table: Table, shape: tuple[int, int, int]) -> torch.Tensor:
    """Decodes a latent (C, h, w), as a reader of format version 2 does."""
    reader = RangeReader(payload, exact=False)
    symbols = reader.take_symbols(table, shape)
    reader.close()
    return torch.from_numpy(symbols).float()


def seconds_of(call: Callable[[], object]) -> float:
    """Returns the mean seconds of a call, over calls for BURST_SECONDS."""
    started = time.perf_counter()
    count = 0
    while (spent := time.perf_counter() - started) < BURST_SECONDS or count == 0:
        call()
        count += 1
    return spent / count


@torch.no_grad()
def measure(shape: tuple[int, int, int], pairs: int) -> dict[str, float | str]:
    """Measures times and sizes for a latent (C, h, w), in `pairs` alternating pairs of runs."""
    with torch.enable_grad():
        bottleneck, scales = trained_bottleneck(shape[0])
    density, table = bottleneck.density, table_set(bottleneck).table_for((True,), 0)
    latent = draw(scales, (1, *shape))
    symbols = to_symbols(latent[0].numpy())
    payload, theirs = encode(symbols, table), density.compress(latent)
    assert torch.equal(decode(payload, table, shape), density.decompress(theirs, shape[1:])[0])
    calls: dict[str, Callable[[], object]] = {
        "encode": lambda: encode(to_symbols(latent[0].numpy()), table),
        "compressai_encode": lambda: density.compress(latent),
        "decode": lambda: decode(payload, table, shape),
        "compressai_decode": lambda: density.decompress(theirs, shape[1:]),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(pairs):
        for name, call in calls.items():
            times[name].append(seconds_of(call))
    median = {name: statistics.median(values) for name, values in times.items()}
    ideal = ideal_bytes(symbols, table)
    return {
        "latent": "x".join(map(str, shape)),
        "encode_us": round(median["encode"] * 1e6, 1),
        "decode_us": round(median["decode"] * 1e6, 1),
        "compressai_encode_us": round(median["compressai_encode"] * 1e6, 1),
        "compressai_decode_us": round(median["compressai_decode"] * 1e6, 1),
        "encode_ratio": round(median["compressai_encode"] / median["encode"], 2),
        "decode_ratio": round(median["compressai_decode"] / median["decode"], 2),
        "payload_bytes": len(payload),
        "compressai_bytes": len(theirs[0]),
        "ideal_bytes": round(ideal, 2),
        "over_ideal_bytes": round(len(payload) - ideal, 2),
    }


def main() -> None:
    """Measures all latents, then prints a table and one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="alternating pairs of runs")
    parser.add_argument("--json", action="store_true", help="print the JSON object only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(shape, arguments.pairs) for shape in LATENTS]
    if not arguments.json:
        shown = RichTable(*rows[0])
        for row in rows:
            shown.add_row(*map(str, row.values()))
        Console(stderr=True).print(shown)
    small, large = rows[0], rows[1:]
    result = {
        "encode_ratio": min(row["encode_ratio"] for row in large),
        "decode_ratio": min(row["decode_ratio"] for row in large),
        "small_encode_ratio": small["encode_ratio"],
        "small_decode_ratio": small["decode_ratio"],
        "payload_over_ideal_bytes": max(row["over_ideal_bytes"] for row in rows),
        "latents": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
