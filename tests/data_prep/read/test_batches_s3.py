"""Shards in a bucket: the requests of a row group, and the same batches as from a disk."""

from __future__ import annotations

import numpy as np

from data_prep.read.batches import local_batches
from data_prep.storage import files_below, join, read_bytes, write_bytes
from tests.data_prep.conftest import Prepared
from tests.s3 import s3_environment, s3_server


def test_a_row_group_in_a_bucket_takes_few_requests(shapes: Prepared) -> None:
    with s3_server() as server, s3_environment(server):
        for found in files_below(shapes.folder):
            write_bytes(
                join("s3://bucket/shards", found.path), read_bytes(join(shapes.folder, found.path))
            )
        server.requests.clear()
        batches = {
            folder: list(
                local_batches(
                    folder, shapes.manifest, shapes.data.reading, global_batch=8, split="val"
                )
            )
            for folder in (shapes.folder, "s3://bucket/shards")
        }
        groups = sum(len(s.row_group_rows) for s in shapes.manifest.split("val").shards)
        # The size of the file, its footer, and the columns together.
        assert len(server.requests) <= 3 * groups + 1
    for local, remote in zip(*batches.values(), strict=True):
        assert local.keys() == remote.keys()
        assert all(np.array_equal(local[name], remote[name]) for name in local)
