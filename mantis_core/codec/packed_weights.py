"""A client's weights, rounded to what float16 holds, and packed as that in the client's folder.

Rounding is done once, when training is over. Packing and unpacking lose nothing: weights that
float16 does not hold exactly stay float32.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from mantis_core.bitstream.byte_planes import deflate_planes, inflate_planes

logger = logging.getLogger(__name__)

PACKED = "float16"
"""The entry that holds all packed weights. No weight of a client has this name."""
_PRECISION = 2.0**-11  # the largest relative change of a value from 2**-14 to 65504


@torch.no_grad()
def round_weights(module: nn.Module) -> None:
    """Rounds the parameters of `module` to the nearest values that float16 holds, in place.

    No value changes by more than 2**-11 of the largest one in its row. A row holds the weights of
    one output; a vector is one row. A parameter for which this cannot be kept stays as it is, with
    a warning: it has values beyond 65504, none finite, or a row that is below 2**-14 everywhere.
    Buffers are not touched.
    """
    for name, weight in module.named_parameters():
        rounded = weight.half().float()
        rows = weight.flatten(1) if weight.ndim > 1 else weight.reshape(1, -1)
        limit = _PRECISION * rows.abs().amax(dim=1, keepdim=True)
        if ((rounded.reshape(rows.shape) - rows).abs() <= limit).all():  # never true of nan
            weight.copy_(rounded)
        else:
            logger.warning(
                "%s stays float32, for float16 cannot hold its values (largest %.3g): it takes 4 "
                "bytes a weight of the client's folder",
                name,
                float(weight.abs().max()),
            )


def pack_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns `weights` with all that float16 holds exactly in one entry, PACKED, of bytes (N,).

    These are the float16 values in the order of the names. Packed weights are returned as they are.
    """
    if PACKED in weights:
        return dict(weights)
    packed = [name for name in sorted(weights) if _is_exact(weights[name])]
    left = {name: weight for name, weight in weights.items() if name not in packed}
    if packed:
        values = torch.cat([weights[name].detach().cpu().half().flatten() for name in packed])
        planes = deflate_planes(values.view(torch.int16).numpy().view(np.uint16), zlib.Z_RLE)
        left[PACKED] = torch.from_numpy(planes)
    return left


def unpack_weights(weights: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the weights that were packed, bit for bit and float32, beside those that were not.

    `like` holds a tensor of the right shape for each name. Raises ValueError if the bytes are not
    the weights of such shapes. Weights that are not packed are returned as they are.
    """
    unpacked = dict(weights)
    planes = unpacked.pop(PACKED, None)
    if planes is not None:
        names = sorted(like.keys() - unpacked.keys())
        sizes = [like[name].numel() for name in names]
        values = inflate_planes(planes.numpy(), sum(sizes), "weights").view(np.int16)
        floats = torch.from_numpy(values).view(torch.float16).float()
        for name, own in zip(names, torch.split(floats, sizes), strict=True):
            unpacked[name] = own.reshape(like[name].shape)
    return unpacked


def _is_exact(weight: Tensor) -> bool:
    """Whether a tensor is float32 and float16 holds each of its values bit for bit."""
    if weight.dtype != torch.float32:
        return False
    return torch.equal(weight.half().float().view(torch.int32), weight.view(torch.int32))
