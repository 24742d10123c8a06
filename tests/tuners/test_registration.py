"""Importing turnrow makes peft know RoCoFT, replaces the model behind RoAd, and changes nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import turnrow
from turnrow.tuners import RoadModel, RocoftModel, register

TABLES = """
import json
from peft import mapping
from peft.utils.peft_types import PeftType
names = ["CONFIG", "TUNER", "MIXED_MODEL", "PREFIX"]
tables = {n: {str(k.value): str(v) for k, v in getattr(mapping, f"PEFT_TYPE_TO_{n}_MAPPING").items()} for n in names}
print(json.dumps({"tables": tables, "members": [m.value for m in PeftType]}))
"""


def _tables_without_turnrow() -> dict:
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", TABLES], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def test_only_rocoft_and_road_change_in_peft(capsys):
    without = _tables_without_turnrow()
    exec(TABLES, {})  # turnrow is imported here
    with_turnrow = json.loads(capsys.readouterr().out)
    assert with_turnrow["members"] == [*without["members"], "ROCOFT"]
    for name, before in without["tables"].items():
        after = with_turnrow["tables"][name]
        changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
        expected = {
            "CONFIG": {"ROCOFT", "ROAD"},
            "PREFIX": {"ROCOFT"},
            "TUNER": {"ROCOFT", "ROAD"},
            "MIXED_MODEL": {"ROCOFT", "ROAD"},
        }
        assert changed == expected[name]


def test_the_type_is_a_full_member_of_the_enum():
    assert PeftType("ROCOFT") is PeftType["ROCOFT"] is PeftType.ROCOFT
    assert PeftType.ROCOFT == "ROCOFT"
    assert PeftType.ROCOFT.value == "ROCOFT"
    assert PeftType.ROCOFT in list(PeftType)
    assert turnrow.RocoftConfig().peft_type is PeftType.ROCOFT


def test_registering_again_does_no_harm():
    register()
    assert PEFT_TYPE_TO_TUNER_MAPPING["ROCOFT"] is RocoftModel
    assert PEFT_TYPE_TO_TUNER_MAPPING["ROAD"] is RoadModel
    assert PEFT_TYPE_TO_CONFIG_MAPPING["ROAD"] is turnrow.RoadConfig
    assert issubclass(turnrow.RoadConfig, peft.RoadConfig)  # whose own objects are taken too


@pytest.mark.parametrize(
    "config",
    [
        turnrow.RocoftConfig(indices={"a": [1]}, target_modules=["a"]),
        turnrow.RoadConfig(),
        turnrow.RoadConfig(blocks=":50%", train="angle"),
    ],
)
def test_config_files_come_back_as_what_they_were(config, tmp_path):
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
