"""Turns the labels of a file into class ids, and counts those that have none. Reads no files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator

from data_prep.errors import DataError
from data_prep.imagenet import imagenet_wnids
from data_prep.sources.base import REFERENCES, cells, class_id_of, counted


def _as_text(value: Any) -> Any:
    """Returns a mapping whose class ids are text: YAML reads `{0: 1}` as numbers."""
    return {key: class_id_of(each) for key, each in value.items()} if _is_plain(value) else value


def _is_plain(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(each, str | bool | int | float) for each in value.values()
    )


ClassIds = Annotated[Literal["imagenet"] | dict[str, str] | None, BeforeValidator(_as_text)]
"""The setting `class_ids` of sources with labels: a mapping, ImageNet's indices, or none."""
CLASS_IDS = REFERENCES.field("class_ids").type
SHOWN = 5  # labels in a sentence
MISSING = "-1"  # Hugging Face's label of an image that has none


class Labels:
    """The class ids of the labels that one source has in one split.

    `unknown` counts the labels without a class id, by their text.
    """

    def __init__(self, class_ids: ClassIds) -> None:
        self.unknown: Counter[str] = Counter()
        self._mapping: Mapping[str, str] | None = None
        self._imagenet = class_ids == "imagenet"
        if isinstance(class_ids, dict):
            self._mapping = class_ids

    def class_ids(
        self, label: Any, where: str, names: Mapping[str, str] | None = None, *, times: int = 1
    ) -> list[str]:
        """Returns the class ids of a label or of a list of labels; [] if it has none.

        `where` names the file and what holds the label, `times` of them there. `names` are the
        class ids that the file itself gives, which count without the setting. Raises DataError for
        a label that is no index of ImageNet-1k where `class_ids` says that it is.
        """
        if isinstance(label, list):
            return [each for one in label for each in self.class_ids(one, where, names)]
        text = class_id_of(label)
        if text is None:
            return []
        if self._imagenet:
            return self._wordnet_id(text, where, times)
        mapping = names if self._mapping is None else self._mapping
        if mapping is None:
            return [text]
        for key in (text, str(label)):
            if key in mapping:
                return [mapping[key]]
        self.unknown[text] += times
        return []

    def column(self, labels: pa.Array, where: str, names: Mapping[str, str] | None) -> pa.Array:
        """Returns a list of class ids for each label of a column, as `class_ids` does for one."""
        if pa.types.is_dictionary(labels.type):
            labels = labels.cast(labels.type.value_type)
        if pa.types.is_nested(labels.type):
            found = (self.class_ids(label, where, names) for label in cells(labels))
            return pa.array(found, CLASS_IDS)
        encoded = labels.dictionary_encode()
        times = np.bincount(encoded.indices.drop_null(), minlength=len(encoded.dictionary))
        lists = [
            self.class_ids(label, where, names, times=count)
            for label, count in zip(encoded.dictionary.to_pylist(), times.tolist(), strict=True)
        ]
        places = pc.fill_null(encoded.indices, len(lists))
        return pa.array([*lists, []], CLASS_IDS).take(places)

    def note(self) -> str:
        """Returns a sentence on the labels without a class id, "" if there are none."""
        if not self.unknown:
            return ""
        shown = [f"{label} ({count})" for label, count in self.unknown.most_common(SHOWN)]
        more = len(self.unknown) - SHOWN
        rest = f" and {more} more" if more > 0 else ""
        total = counted(self.unknown.total(), "label")
        return f"{total} without a class id: {', '.join(shown)}{rest}"

    def _wordnet_id(self, text: str, where: str, times: int) -> list[str]:
        wnids = imagenet_wnids()
        if text.isdecimal() and int(text) < len(wnids):
            return [wnids[int(text)]]
        if text == MISSING:
            self.unknown[text] += times
            return []
        raise DataError(
            f"{where}: label {text} is no ImageNet-1k index (0-999); give class_ids a mapping or "
            "leave it out"
        )
