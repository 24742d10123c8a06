"""From names to an engine."""

from __future__ import annotations

import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from turnrow.errors import UserError
from turnrow.serving import EngineConfig, Limits, Request


def test_an_engine_is_made_of_names(
    saved_model: Path, adapters: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(adapters("llama")["rows"], tmp_path / "mine")
    (tmp_path / "broken").mkdir()
    config = pickle.loads(pickle.dumps(EngineConfig(str(saved_model), str(tmp_path), limits=Limits(slots=3))))
    with caplog.at_level(logging.WARNING), config.load() as engine:
        assert engine.store.names() == ["mine"]
        assert engine.limits.slots == 3
        assert len(engine.submit(Request([1, 2, 3], adapter="mine", max_tokens=4)).result()[0].token_ids) == 4
    assert "not served, broken: " in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float8"}, "dtype is 'float8'; it must be one of auto, float32"),
        ({"host_bytes": -1}, "host_bytes is -1"),
        ({"adapters": "nowhere"}, "the adapters' folder 'nowhere' does not exist"),
        ({"device": "abacus"}, "device is 'abacus', which cannot be used"),
        ({"model": "no/such/model"}, "model 'no/such/model' cannot be loaded"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    saved_model: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**{"model": str(saved_model), **changes}).check()
