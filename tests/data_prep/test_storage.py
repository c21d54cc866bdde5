"""Files by path or URI: what cannot be opened is one message."""

from __future__ import annotations

import pytest

from data_prep.errors import DataError
from data_prep.storage import filesystem


@pytest.mark.parametrize("uri", ["az://c/photos", "nosuch://x/y", "file://host/x"])
def test_a_uri_that_cannot_be_opened_is_named(uri: str) -> None:
    with pytest.raises(
        DataError, match=rf"^{uri} cannot be opened \(.*give a local path or a URI of s3"
    ):
        filesystem(uri)
