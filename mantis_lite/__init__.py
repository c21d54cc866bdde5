"""The client of a MANTiS codec on a device: numpy, onnxruntime and Pillow, and no torch.

It opens the folder that `mantis export` wrote:

    from mantis_lite import open_export

    client = open_export("camera/")
    image = client.prepare_image(Path("photo.jpg").read_bytes())
    (stream,) = client.encode(image[None], "car")
"""

from mantis_core.bitstream.container import BitstreamError
from mantis_core.errors import BudgetError, ModelError
from mantis_core.pixels import ImageError
from mantis_lite.client import LiteClient, open_export

__all__ = [
    "BitstreamError",
    "BudgetError",
    "ImageError",
    "LiteClient",
    "ModelError",
    "open_export",
]
