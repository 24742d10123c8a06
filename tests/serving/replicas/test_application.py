"""What a file of Ray Serve may say."""

from __future__ import annotations

from typing import Any

import pytest

from turnrow.errors import UserError

pytest.importorskip("ray.serve", reason="needs the extra [ray]")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What an application would have been made of."""
    from turnrow.serving.replicas import application

    found: list[Any] = []
    monkeypatch.setattr(application, "build", lambda *parts, **how: found.append((*parts, how)))
    return found


def test_fields_find_their_place_also_as_texts(built: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from turnrow.serving.replicas.application import app

    monkeypatch.setenv("TURNROW_API_KEY", "sesame")
    app({"model": "m", "adapters": "a", "slots": "7", "check_base": "false", "replicas": "3", "gpus": 0.5})
    config, settings, how = built[0]
    assert (config.model, config.adapters, config.check_base, config.limits.slots) == ("m", "a", False, 7)
    assert (settings.base_name, settings.api_key) == ("m", "sesame")
    assert how == {"replicas": 3, "gpus": 0.5}


REFUSED = [
    ({}, "model is missing"),
    ({"model": "m", "slot": 3}, r"there is no field 'slot'; did you mean 'slots'"),
    ({"model": "m", "slots": "many"}, "slots is 'many'"),
    ({"model": "m", "slots": 0}, "slots is 0"),
    ({"model": "m", "replicas": "two"}, "replicas is 'two'"),
    ({"model": "m", "dtype": "float8"}, "dtype is 'float8'"),
]


@pytest.mark.parametrize(("args", "message"), REFUSED)
def test_what_cannot_be_is_refused(args: dict[str, Any], message: str, built: list[Any]) -> None:
    from turnrow.serving.replicas.application import app

    with pytest.raises(UserError, match=message):
        app(args)
    assert built == []
