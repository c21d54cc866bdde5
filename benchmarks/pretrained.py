"""Measures a teacher's own ImageNet weights on photographs: top1 of all classes and of theirs.

    python -m benchmarks.pretrained efficientnet_lite0 DATA.parquet [--images N]

DATA has the columns `image` and `imagenet_index`. Each photograph is resized to the side that the
network was made for. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys

import pyarrow.parquet as pq
import torch

from benchmarks.program import count, one_message, say
from mantis_core.networks.lite import SCALES, build_lite
from mantis_core.networks.preprocessing import normalise, prepare_image
from mantis_core.teachers.package import package_state


@one_message
def main() -> int:
    """Prints the shares of photographs that the network names right."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("network", choices=SCALES)
    parser.add_argument("data", help="Parquet file of photographs")
    parser.add_argument("--images", type=count, metavar="N", help="only the first N")
    arguments = parser.parse_args()
    net = build_lite(arguments.network)
    net.load_state_dict(package_state(arguments.network, field=arguments.network))
    net.eval()
    table = pq.read_table(arguments.data, columns=["image", "imagenet_index"])
    rows = table.slice(0, arguments.images or table.num_rows)
    truth = torch.tensor(rows["imagenet_index"].to_pylist())
    own, side = torch.unique(truth), SCALES[arguments.network].side
    said = []
    with torch.no_grad():
        for data in rows["image"].to_pylist():
            image = prepare_image(data, (side, side), side)
            said.append(net(normalise(image[None]))[0])
    logits = torch.stack(said)
    among = own[logits[:, own].argmax(dim=1)]
    found = {
        "network": arguments.network,
        "images": len(truth),
        "top1": round(float((logits.argmax(dim=1) == truth).float().mean()), 4),
        "classes_here": len(own),
        "top1_among_these": round(float((among == truth).float().mean()), 4),
    }
    say(
        f"{found['network']}: {100 * found['top1']:.1f} % of 1,000 classes, "
        f"{100 * found['top1_among_these']:.1f} % among the {found['classes_here']} here, "
        f"{found['images']} images"
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
