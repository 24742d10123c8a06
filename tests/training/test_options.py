from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from turnrow.errors import UserError
from turnrow.training.options import check_names, check_options


@dataclass
class Receiver:
    rate: float = 0.1
    steps: int = 1
    names: list[str] | str | None = None
    hidden: str = "x"
    derived: int = field(default=0, init=False)


def test_a_float_written_without_a_dot_is_a_float() -> None:
    """YAML 1.1 reads 2e-3 as text."""
    assert check_options({"rate": "2e-3"}, Receiver, "section") == {"rate": 0.002}


def test_values_keep_their_type_where_several_are_allowed() -> None:
    assert check_options({"names": ["a"]}, Receiver, "section") == {"names": ["a"]}
    assert check_options({"names": "all"}, Receiver, "section") == {"names": "all"}
    assert check_options({"names": None}, Receiver, "section") == {"names": None}


def test_an_unknown_name_is_answered_with_near_ones() -> None:
    with pytest.raises(UserError, match="section has no field 'setps'; did you mean 'steps'"):
        check_options({"setps": 1}, Receiver, "section")


def test_an_unknown_name_without_near_ones_is_answered_with_all() -> None:
    with pytest.raises(UserError, match="section has no field 'zzz'; allowed: rate, steps"):
        check_names({"zzz": 1}, ["rate", "steps"], "section")


def test_a_field_that_is_not_an_argument_is_unknown() -> None:
    with pytest.raises(UserError, match="section has no field 'derived'"):
        check_options({"derived": 1}, Receiver, "section")


def test_a_value_of_another_type_is_named_with_what_is_expected() -> None:
    with pytest.raises(UserError, match=r"section.steps is 'many'; expected int$"):
        check_options({"steps": "many"}, Receiver, "section")
    with pytest.raises(UserError, match=r"section.names is 3; expected (list|str|null)( or (list|str|null)){2}$"):
        check_options({"names": 3}, Receiver, "section")


def test_a_reserved_name_says_why() -> None:
    with pytest.raises(UserError, match="section.hidden cannot be set here: because"):
        check_options({"hidden": "y"}, Receiver, "section", reserved={"hidden": "because"})
