"""What adapters may be called, and where they may lie."""

from __future__ import annotations

import pytest

from turnrow.errors import UserError
from turnrow.serving.store.names import check_name, folder_inside


@pytest.mark.parametrize("name", ["a", "French-v2.1", "x_1", "0", "a" * 128])
def test_plain_names_are_allowed(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "..", ".hidden", "a/b", "../a", "a\\b", "a b", "é", "a\n", "-x", "a" * 129, None, 3, "a\0"]
)
def test_names_that_could_mean_a_path_or_nothing_are_refused(name):
    with pytest.raises(UserError, match="it must be 1 to 128 letters, digits"):
        check_name(name)


def test_the_name_of_the_base_is_taken():
    with pytest.raises(UserError, match="no adapter can be called 'base'"):
        check_name("base")


@pytest.mark.parametrize("place", ["..", "../other", "a/../../other", "/etc", ".", ""])
def test_folders_outside_of_the_root_are_refused(tmp_path, place):
    root = tmp_path / "adapters"
    root.mkdir()
    with pytest.raises(UserError, match="is no folder inside of the adapters' folder"):
        folder_inside(root, place)


def test_a_link_does_not_lead_out_of_the_root(tmp_path):
    (root := tmp_path / "adapters").mkdir()
    (outside := tmp_path / "secret").mkdir()
    (root / "way").symlink_to(outside)
    (root / "real").mkdir()
    (root / "alias").symlink_to(root / "real")
    with pytest.raises(UserError, match="is no folder inside"):
        folder_inside(root, "way")
    assert folder_inside(root, "alias") == (root / "real").resolve()


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"], ids=["too long", "NUL"])
def test_what_is_no_path_is_said(tmp_path, name):
    with pytest.raises(UserError, match="is no path of a folder: "):
        folder_inside(tmp_path, name)
