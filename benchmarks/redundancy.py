"""Estimates what an entropy model with more context would save on a codec's real symbols.

    python -m benchmarks.redundancy MODEL DATA.parquet [DATA.parquet ...] [--images 2500]

Each context selects the probability table of a symbol. Tables are counted on one half of the images
and code the other half, and the other way round. So a context with too many tables pays for
overfitting. The figures are bits per image without the task field. The last line is one JSON
object.
"""

import argparse
import json
import sys
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.determinism import image_bytes
from benchmarks.program import one_message
from mantis_core.codec.checkpoint import load_client

Symbols = NDArray[np.int64]
WIDEST = 12  # larger symbols are clipped to it; they are rare and affect all contexts alike
PRIOR_WEIGHT = 20.0  # weight of the table without context in every other table, in symbols


def read_symbols(model: str, files: list[str], images: int) -> tuple[Symbols, Symbols]:
    """Returns the latent's symbols (N, C, h, w) and the primary task (N,) of the first images."""
    import torch

    codec = load_client(model)
    symbols, primary = [], []
    for data in islice(image_bytes(files), images):
        for seen in codec.look(torch.stack([codec.prepare_image(data)])):
            symbols.append(seen.image.map)
            primary.append(seen.image.tasks.primary)
    return np.stack(symbols).astype(np.int64).clip(-WIDEST, WIDEST), np.array(primary)


def contexts(symbols: Symbols, primary: Symbols) -> dict[str, Symbols]:
    """Maps each context to its index for every symbol.

    A decoder knows each of these contexts before it decodes the symbol.
    """
    height, width = symbols.shape[2:]
    signs = np.sign(symbols) + 1
    left, up, before = np.ones_like(signs), np.ones_like(signs), np.zeros_like(signs)
    left[..., 1:] = signs[..., :-1]
    up[..., 1:, :] = signs[..., :-1, :]
    before[:, 1:] = np.cumsum(symbols[:, :-1] != 0, axis=1)
    neighbours = 3 * left + up
    task = np.broadcast_to(primary[:, None, None, None], symbols.shape)
    place = np.arange(height * width).reshape(height, width)
    return {
        "nothing": np.zeros_like(symbols),
        "primary task": task,
        "position": np.broadcast_to(place, symbols.shape),
        "non-zero symbols of earlier channels": before.clip(max=8),
        "signs of the left and upper symbol": neighbours,
        "those signs and the primary task": 9 * task + neighbours,
    }


def bits_per_image(symbols: Symbols, context: Symbols) -> float:
    """Returns the cross-fitted code length per image, with separate tables for each channel."""
    half = np.arange(len(symbols)) % 2
    values, size, total = symbols + WIDEST, int(context.max()) + 1, 0.0
    for fold in (0, 1):
        for channel in range(symbols.shape[1]):
            seen = values[half == fold, channel].ravel()
            paid = values[half != fold, channel].ravel()
            base = np.bincount(seen, minlength=2 * WIDEST + 1) + 0.02
            base = base / base.sum()
            counts = np.zeros((size, 2 * WIDEST + 1))
            np.add.at(counts, (context[half == fold, channel].ravel(), seen), 1)
            table = counts + PRIOR_WEIGHT * base
            table /= table.sum(axis=1, keepdims=True)
            total -= np.log2(table[context[half != fold, channel].ravel(), paid]).sum()
    return float(total / len(symbols))


@one_message
def main() -> int:
    """Reads the symbols once and prints the code length for each context."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a codec or of its client")
    parser.add_argument("data", nargs="+", help="Parquet files with encoded images")
    parser.add_argument(
        "--images", type=int, metavar="N", default=2500, help="only the first N images"
    )
    arguments = parser.parse_args()
    symbols, primary = read_symbols(arguments.model, arguments.data, arguments.images)
    bits = {
        name: bits_per_image(symbols, each) for name, each in contexts(symbols, primary).items()
    }
    shown = Table("context", "bits per image", "change")
    for name, value in bits.items():
        shown.add_row(name, f"{value:.1f}", f"{100 * (value / bits['nothing'] - 1):+.1f} %")
    Console(stderr=True).print(shown)
    zeros = float((symbols == 0).mean())
    print(
        json.dumps(
            {
                "images": len(symbols),
                "zeros": round(zeros, 4),
                "bits": {name: round(value, 1) for name, value in bits.items()},
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
