"""How much of a cluster each replica takes."""

from __future__ import annotations

import pytest

from turnrow.errors import UserError
from turnrow.serving import EngineConfig
from turnrow.serving.replicas.running import Placement

ANY, CPU = EngineConfig("model"), EngineConfig("model", device="cpu")
SHARES = [
    (Placement(2), ANY, {"CPU": 8}, (4, 0)),
    (Placement(3), ANY, {"CPU": 8}, (2, 0)),
    (Placement(4), ANY, {"CPU": 2}, (0.5, 0)),
    (Placement(2), ANY, {"CPU": 8, "GPU": 2}, (4, 1)),
    (Placement(2), CPU, {"CPU": 8, "GPU": 2}, (4, 0)),
    (Placement(2, cpus=1, gpus=0.5), ANY, {"CPU": 8, "GPU": 1}, (1, 0.5)),
]


@pytest.mark.parametrize(("placement", "config", "cluster", "share"), SHARES)
def test_replicas_share_what_there_is(
    placement: Placement, config: EngineConfig, cluster: dict[str, float], share: tuple[float, float]
) -> None:
    assert placement.resources(config, cluster) == share


def test_more_than_there_is_is_refused_with_the_option_to_change() -> None:
    with pytest.raises(
        UserError, match=r"4 replicas of 1 GPU each need more than the 2 that there are: .*--replica-gpus"
    ):
        Placement(4).resources(ANY, {"CPU": 8, "GPU": 2})


@pytest.mark.parametrize(
    ("values", "message"),
    [({"replicas": 0}, "replicas is 0"), ({"replicas": 2, "cpus": -1}, "cpus is -1"), ({"replicas": 2, "gpus": float("nan")}, "gpus is nan")],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement(**values)  # type: ignore[arg-type]
