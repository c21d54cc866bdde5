"""What decides the weights of a training reaches neither the bitstream nor the codec at work."""

from __future__ import annotations

import pytest

from tests.root import ROOT
from tests.test_import_order import graph_of, imports, modules, reached

AT_WORK = ("mantis_core.bitstream", "mantis_core.codec", "mantis_core.baselines")
STUDENT = tuple(
    f"mantis_core.networks.{name}" for name in ("client", "server", "bottleneck", "conditioning")
)
NEVER = {
    **{
        f"mantis_core.training.{name}": AT_WORK
        for name in (
            "stage1",
            "loop",
            "recipe",
            "losses",
            "means",
            "meter",
            "optim",
            "hits",
            "asking",
        )
    },
    "mantis_core.training.teacher": AT_WORK + STUDENT,
}
GRAPH = graph_of(imports(ROOT), set(modules(ROOT)))


@pytest.mark.parametrize("module", NEVER)
def test_what_decides_weights_reaches_no_other_code(module: str) -> None:
    found = {f"{name}." for name in reached(module, GRAPH)}
    assert found
    wanted = tuple(f"{name}." for name in NEVER[module])
    assert sorted(name for name in found if name.startswith(wanted)) == []


def test_the_bitstream_reaches_symbols_and_errors_alone() -> None:
    own = "mantis_core.bitstream"
    names = {other for name in modules(ROOT) if name.startswith(f"{own}.") for other in GRAPH[name]}
    ours = {name for name in names if name.startswith("mantis_core.")}
    assert {name for name in ours if not name.startswith(own)} <= {
        "mantis_core.symbols",
        "mantis_core.errors",
    }
