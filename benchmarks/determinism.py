"""Checks that streams do not depend on the number of threads or on the batch size.

    python -m benchmarks.determinism MODEL DATA.parquet [DATA.parquet ...] [--images 10000]

MODEL is a checkpoint folder of a codec or of its client. DATA are Parquet files with encoded images
in their first binary column, or in the field `bytes` of their first struct column. Each setting
(threads, batch) encodes every image in a process of its own. The last line is one JSON object. The
exit code is 1 if any stream differs.
"""

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

SETTINGS = ((1, 1), (2, 1), (1, 64), (2, 64))


def image_bytes(files: list[str]) -> Iterator[bytes]:
    """Yields the encoded images of Parquet files in order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in files:
        with pq.ParquetFile(name) as file:
            schema = file.schema_arrow
            column = next(
                field.name
                for field in schema
                if pa.types.is_binary(field.type) or pa.types.is_struct(field.type)
            )
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield value["bytes"] if isinstance(value, dict) else value


def encode_all(model: str, files: list[str], images: int, threads: int, batch: int) -> None:
    """Encodes with one setting. Prints hashes of all streams and symbols, and the total bytes."""
    import torch

    from mantis_core.codec.checkpoint import load_client

    torch.set_num_threads(threads)
    codec = load_client(model)
    streams, symbols = hashlib.sha256(), hashlib.sha256()
    count = wire_bytes = 0
    waiting = islice(image_bytes(files), images)
    while group := list(islice(waiting, batch)):
        pixels = torch.stack([codec.prepare_image(data) for data in group])
        for seen in codec.look(pixels):
            data = codec.write_together([seen])
            streams.update(data)
            symbols.update(seen.image.map.tobytes())
            wire_bytes += len(data)
            count += 1
    print(
        json.dumps(
            {
                "threads": threads,
                "batch": batch,
                "images": count,
                "wire_bytes": wire_bytes,
                "streams_sha256": streams.hexdigest(),
                "symbols_sha256": symbols.hexdigest(),
            }
        )
    )


def main() -> int:
    """Runs every setting and compares the hashes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="checkpoint folder of a codec or of its client")
    parser.add_argument("data", nargs="+", help="Parquet files with encoded images")
    parser.add_argument(
        "--images", type=int, metavar="N", default=10_000, help="only the first N images"
    )
    parser.add_argument("--setting", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.setting:
        threads, batch = map(int, arguments.setting.split(","))
        encode_all(arguments.model, arguments.data, arguments.images, threads, batch)
        return 0
    rows = []
    for threads, batch in SETTINGS:
        command = [sys.executable, "-m", "benchmarks.determinism"]
        command += [str(Path(name).resolve()) for name in (arguments.model, *arguments.data)]
        command += ["--images", str(arguments.images)]
        command += ["--setting", f"{threads},{batch}"]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], file=sys.stderr)
    same = all(
        (row["streams_sha256"], row["symbols_sha256"], row["images"])
        == (rows[0]["streams_sha256"], rows[0]["symbols_sha256"], rows[0]["images"])
        for row in rows
    )
    print(json.dumps({"identical": same, "images": rows[0]["images"], "settings": rows}))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
