from __future__ import annotations

import pytest

from turnrow.errors import UserError
from turnrow.training.sizes import parse_bytes, readable_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9),
        ("24 GiB", 24 * 2**30),
        ("1.5g", 15 * 10**8),
        ("512mib", 512 * 2**20),
        ("100", 100),
        ("7B", 7),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "0", "24XB", "5I", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected a size such as 24GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**40, "5120.00 GiB")],
)
def test_sizes_are_shown_short(value: int, expected: str) -> None:
    assert readable_bytes(value) == expected
