"""Estimates what more context would save on a codec's real symbols, and how firmly they stand.

    python -m benchmarks.redundancy MODEL DATA.parquet [...] [--images 2500]
                                    [--level N [--prefix M]]

Each context selects the probability table of a symbol. Tables are counted on one half of the images
and code the other half, and the other way round. So a context with too many tables pays for
overfitting. The figures are bits per image without the task field.

A symbol just above the threshold of rounding costs bits and says little, and another processor or a
JPEG file in front of the client may flip it. `near_threshold` is the share of non-zero symbols that
would be smaller, had the latent been smaller by less than 0.1. `flipped` are changed symbols for
each non-zero one: after a JPEG of quality 95 of the client's image, and after normal noise of a
hundredth of the channel's deviation on the latent. The last line is one JSON object.

With `--prefix M` it also says what a stream of level N would cost whose beginning is a stream of
level M, for a server that may stop there: the bits of level M, and those of level N when the
symbol of level M at each place is known too.
"""

import argparse
import json
import sys
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.determinism import image_bytes
from benchmarks.program import one_message, say
from mantis_core.baselines.image_codecs import IMAGE_CODECS
from mantis_core.codec.checkpoint import load_client
from mantis_core.symbols import CONTEXTS, MOST, REACH, first_context, neighbour_sums, pass_of

Symbols = NDArray[np.int64]
Values = NDArray[np.float32]
JPEG, JPEG_QUALITY = IMAGE_CODECS["jpeg"], 95
NEAR = 0.1
WIDEST = 12  # larger symbols are clipped to it; they are rare and affect all contexts alike
PRIOR_WEIGHT = 20.0  # weight of the table without context in every other table, in symbols


class PrefixBits(NamedTuple):
    """Bits per image of a level, of a lower one, and of the first when the second is known."""

    alone: float
    prefix: float
    rest: float

    @property
    def change(self) -> float:
        """What the prefix adds to the level's bits, as a share of them."""
        return (self.prefix + self.rest) / self.alone - 1


class Latents(NamedTuple):
    """Latents of images before rounding, (N, C, h, w), also of their JPEGs; primary task (N,)."""

    plain: Values
    of_jpegs: Values
    primary: Symbols

    @property
    def symbols(self) -> Symbols:
        """The symbols that are sent, clipped to WIDEST."""
        return np.rint(self.plain).astype(np.int64).clip(-WIDEST, WIDEST)


def read_latents(model: str, files: list[str], images: int, level: int = 0) -> Latents:
    """Runs the client on the first images, each alone, as it does when it codes them."""
    import torch

    from mantis_core.networks.conditioning import shares_of
    from mantis_core.networks.inference import one_thread, still
    from mantis_core.networks.preprocessing import normalise

    codec = load_client(model)
    shares = shares_of(torch.tensor([level]), codec.spec.num_rates)

    def latent(image: torch.Tensor) -> Values:
        with torch.no_grad(), one_thread(), still(codec.client):
            view = codec.client(normalise(image[None]))
            found = codec.client.encode(view, torch.sigmoid(view.logits.float()), shares)
        values: Values = found[0].numpy()
        return values

    plain, of_jpegs, primary = [], [], []
    for data in islice(image_bytes(files), images):
        image = codec.prepare_image(data)
        (seen,) = codec.look(image[None], level=level)
        plain.append(latent(image))
        if not np.array_equal(np.rint(plain[-1]), seen.image.map):
            raise AssertionError("the client rounds to other symbols than it sends")
        again = JPEG.decode(JPEG.encode(image.permute(1, 2, 0).numpy(), JPEG_QUALITY))
        of_jpegs.append(latent(torch.tensor(again).permute(2, 0, 1)))
        primary.append(seen.image.tasks.primary)
    return Latents(np.stack(plain), np.stack(of_jpegs), np.array(primary))


def near_threshold(latents: Values) -> float:
    """The share of non-zero symbols less than NEAR above the threshold towards zero."""
    size = np.abs(latents)
    sent = np.rint(size)
    nonzero = sent > 0
    return float((size - sent + 0.5 < NEAR)[nonzero].mean()) if nonzero.any() else 0.0


def flipped(latents: Values, others: Values) -> float:
    """Symbols that differ, for each non-zero one of `latents`; both (N, C, h, w)."""
    symbols = np.rint(latents)
    return float((symbols != np.rint(others)).sum() / max(1, (symbols != 0).sum()))


def with_noise(latents: Values, share: float) -> Values:
    """Latents with normal noise of `share` of each channel's standard deviation."""
    spread = latents.std(axis=(0, 2, 3), keepdims=True)
    noise = np.random.default_rng(0).normal(size=latents.shape)
    changed: Values = (latents + share * spread * noise).astype(np.float32)
    return changed


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
    coded = coded_contexts(symbols)
    half = symbols.shape[1] // 2
    of_first_half = np.zeros_like(before)
    of_first_half[:, half:] = before[:, [half]]
    task = np.broadcast_to(primary[:, None, None, None], symbols.shape)
    place = np.arange(height * width).reshape(height, width)
    return {
        "nothing": np.zeros_like(symbols),
        "primary task": task,
        "position": np.broadcast_to(place, symbols.shape),
        "non-zero symbols of earlier channels": before.clip(max=8),
        "signs of the left and upper symbol": neighbours,
        "those signs and the primary task": 9 * task + neighbours,
        "neighbours as they are coded": coded,
        "those and the primary task": CONTEXTS * task + coded,
        "those and non-zero symbols of earlier channels": CONTEXTS * before.clip(max=5) + coded,
        "those and non-zero symbols of the first half": CONTEXTS * of_first_half.clip(max=5)
        + coded,
    }


def coded_contexts(symbols: Symbols) -> Symbols:
    """The context of each symbol (N, C, h, w) by its neighbours, as `symbols.py` defines it."""
    height, width = symbols.shape[2:]
    padded = np.pad(symbols.clip(-REACH, REACH), ((0, 0), (0, 0), (1, 1), (1, 1)))
    found = np.zeros_like(symbols)
    for number in (1, 2):
        own = pass_of(height, width) == number
        sums = neighbour_sums(padded, number) + MOST + first_context(number)
        found[..., own] = sums[..., own]
    return found


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


def prefix_bits(symbols: Symbols, lower: Symbols) -> PrefixBits:
    """What it costs that the stream of `symbols` begins with that of `lower`, both (N, C, h, w).

    All three code lengths use the neighbours as they are coded. For the rest, the symbol of `lower`
    at the same place selects the table too.
    """
    known = lower.clip(-REACH, REACH) + REACH
    own = coded_contexts(symbols)
    return PrefixBits(
        bits_per_image(symbols, own),
        bits_per_image(lower, coded_contexts(lower)),
        bits_per_image(symbols, CONTEXTS * known + own),
    )


@one_message
def main() -> int:
    """Reads the symbols once and prints the code length for each context."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a codec or of its client")
    parser.add_argument("data", nargs="+", help="Parquet files with encoded images")
    parser.add_argument(
        "--images", type=int, metavar="N", default=2500, help="only the first N images"
    )
    parser.add_argument(
        "--level", type=int, metavar="N", default=0, help="rate level of a model of several rates"
    )
    parser.add_argument(
        "--prefix", type=int, metavar="M", help="a level of smaller streams, above --level"
    )
    arguments = parser.parse_args()
    of_which = (arguments.model, arguments.data, arguments.images)
    level, prefix = arguments.level, arguments.prefix
    if prefix is not None and prefix <= level:
        parser.error(f"--prefix is {prefix}: it must be above --level, which is {level}")
    lower = None if prefix is None else read_latents(*of_which, prefix).symbols
    found = read_latents(*of_which, level)
    symbols = found.symbols
    bits = {
        name: bits_per_image(symbols, each)
        for name, each in contexts(symbols, found.primary).items()
    }
    shown = Table("context", "bits per image", "change")
    for name, value in bits.items():
        shown.add_row(name, f"{value:.1f}", f"{100 * (value / bits['nothing'] - 1):+.1f} %")
    Console(stderr=True).print(shown)
    zeros = float((symbols == 0).mean())
    near = near_threshold(found.plain)
    flips = {
        "jpeg": flipped(found.plain, found.of_jpegs),
        "noise": flipped(found.plain, with_noise(found.plain, 0.01)),
    }
    say(f"{100 * near:.1f} % of the non-zero symbols are less than {NEAR} above their threshold")
    say(
        f"changed symbols for each non-zero one: {100 * flips['jpeg']:.1f} % by JPEG, "
        f"{100 * flips['noise']:.1f} % by noise"
    )
    figures = {
        "images": len(symbols),
        "zeros": round(zeros, 4),
        "near_threshold": round(near, 4),
        "flipped": {name: round(value, 4) for name, value in flips.items()},
        "bits": {name: round(value, 1) for name, value in bits.items()},
    }
    if lower is not None:
        cost = prefix_bits(symbols, lower)
        say(
            f"level {level} alone {cost.alone:.1f} bits; behind level {prefix}, "
            f"{cost.prefix:.1f} + {cost.rest:.1f} bits: {100 * cost.change:+.1f} %"
        )
        figures["prefix"] = {name: round(value, 1) for name, value in cost._asdict().items()}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
