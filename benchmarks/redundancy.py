"""What an entropy model that looked further would save: code lengths of a codec's real symbols.

    python -m benchmarks.redundancy MODEL DATA.parquet [DATA.parquet ...] [--images 2500]

Every context predicts each symbol from a table of its own. Tables are counted on one half of the
images and pay for the other half, and the other way round, so that a context with too many tables
is charged for it. Bits per image, the task field left out. The last line is one JSON object.
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
from mantis_core.checkpoint import load_client

Symbols = NDArray[np.int64]
WIDEST = 12  # symbols beyond it are counted as it: rare, and alike for all contexts
PRIOR_WEIGHT = 20.0  # how many symbols the table without context weighs in every other


def read_symbols(model: str, files: list[str], images: int) -> tuple[Symbols, Symbols]:
    """Symbols of the latent (N, C, h, w) and the primary task (N,) of the first images."""
    import torch

    codec = load_client(model)
    symbols, primary = [], []
    for data in islice(image_bytes(files), images):
        for seen in codec.look(torch.stack([codec.prepare_image(data)])):
            symbols.append(seen.image.map)
            primary.append(seen.image.tasks.primary)
    return np.stack(symbols).astype(np.int64).clip(-WIDEST, WIDEST), np.array(primary)


def contexts(symbols: Symbols, primary: Symbols) -> dict[str, Symbols]:
    """Context index of every symbol, by name; all are known before the symbol is decoded."""
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
    """Cross-fitted code length, each channel by its own tables."""
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
    """Reads the symbols once and prints what each context costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("data", nargs="+")
    parser.add_argument("--images", type=int, default=2500)
    arguments = parser.parse_args()
    symbols, primary = read_symbols(arguments.model, arguments.data, arguments.images)
    bits = {
        name: bits_per_image(symbols, each) for name, each in contexts(symbols, primary).items()
    }
    shown = Table("context", "bits per image", "against none")
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
