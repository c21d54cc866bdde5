"""All kinds of sources.

A new kind is one file like shapes.py and its name in SOURCES and AnySource, below; one that holds
images of its own stands in `Images` (auto.py) too.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from data_prep.sources.auto import Auto
from data_prep.sources.base import SourceConfig
from data_prep.sources.composed import Attributes, Mosaic
from data_prep.sources.folder import ImageFolder
from data_prep.sources.parquet import ParquetFiles
from data_prep.sources.scenes import Scenes
from data_prep.sources.shapes import Shapes
from data_prep.sources.webdataset import WebDataset

SOURCES: dict[str, type[SourceConfig]] = {
    "image_folder": ImageFolder,
    "parquet": ParquetFiles,
    "auto": Auto,
    "webdataset": WebDataset,
    "shapes": Shapes,
    "scenes": Scenes,
    "mosaic": Mosaic,
    "attributes": Attributes,
}
AnySource = Annotated[
    ImageFolder | ParquetFiles | Auto | WebDataset | Shapes | Scenes | Mosaic | Attributes,
    Field(discriminator="kind"),
]
