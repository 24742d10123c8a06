from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from PIL import Image

from turnrow.errors import UserError
from turnrow.tasks import need_pillow, plain_columns, read_table
from turnrow.tasks.images import FILES, has_image, image_files, open_image

from .pictures import picture, png, write_png


def opened(data: Dataset, folder: str | None = None) -> list[tuple[int, int, int]]:
    files = image_files(data, "image", "test", folder)
    assert files.column_names == [FILES]
    images = [open_image(cell) for cell in files[FILES]]
    assert {image.mode for image in images} == {"RGB"}
    return [image.getpixel((0, 0)) for image in images]  # type: ignore[misc]


@pytest.mark.parametrize("form", ["path", "bytes", "hub", "memory"])
def test_an_image_is_read_in_whatever_form_it_comes(tmp_path: Path, form: str) -> None:
    cells: dict[str, Any] = {
        "path": [write_png(tmp_path, "red"), write_png(tmp_path, "blue")],
        "bytes": [png("red"), png("blue")],
        "hub": [{"bytes": png("red"), "path": "0.png"}, {"bytes": png("blue"), "path": None}],
        "memory": [picture("red"), picture("blue")],
    }
    data = Dataset.from_list([{"image": cell, "label": 0} for cell in cells[form]])
    assert opened(data) == [(255, 0, 0), (0, 0, 255)]
    assert opened(data.select([1]).with_format("torch")) == [(0, 0, 255)]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_other_modes_become_rgb(mode: str) -> None:
    data = Dataset.from_list([{"image": picture("blue", mode=mode)}]) if mode != "CMYK" else None
    if data is None:
        held = io.BytesIO()
        picture("blue", mode=mode).save(held, "JPEG")
        data = Dataset.from_list([{"image": held.getvalue()}])
    (pixel,) = opened(data)
    assert len(pixel) == 3


@pytest.mark.parametrize(("mode", "form"), [("I;16", "PNG"), ("I;16", "TIFF"), ("I;16B", "TIFF")])
def test_sixteen_bits_of_grey_become_eight(mode: str, form: str) -> None:
    held = io.BytesIO()
    image = Image.new(mode, (4, 3))
    for place, value in enumerate([0, 300, 30000, 65535]):
        image.putpixel((place, 0), value)
    image.save(held, form)
    read = open_image({"bytes": held.getvalue(), "path": None})
    assert [read.getpixel((place, 0)) for place in range(4)] == [(0,) * 3, (1,) * 3, (117,) * 3, (255,) * 3]


def test_a_photograph_is_turned_as_its_camera_was() -> None:
    held = io.BytesIO()
    image = picture("red", size=(12, 9))
    exif = image.getexif()
    exif[0x0112] = 6  # orientation: the top of the picture is at its right
    image.save(held, "JPEG", exif=exif)
    assert open_image({"bytes": held.getvalue(), "path": None}).size == (9, 12)


def test_a_palette_with_transparent_colours_is_read() -> None:
    held = io.BytesIO()
    picture("blue", mode="P").save(held, "PNG", transparency=b"\x00\x7f\xff")
    assert open_image({"bytes": held.getvalue(), "path": None}).getpixel((0, 0)) == (0, 0, 255)


def test_a_column_may_have_the_name_of_what_comes_of_it() -> None:
    data = Dataset.from_list([{FILES: png("red")}])
    assert open_image(image_files(data, FILES, "test", None)[FILES][0]).size == (12, 9)


def test_relative_paths_begin_in_the_folder_that_is_named(tmp_path: Path) -> None:
    write_png(tmp_path / "pictures", "green")
    data = Dataset.from_list([{"image": "green.png"}])
    assert opened(data, str(tmp_path / "pictures")) == [(0, 255, 0)]
    with pytest.raises(
        UserError, match="split 'test', row 1: the image 'green.png' cannot be read: there is no such file"
    ):
        opened(data)


def test_relative_paths_are_found_beside_the_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_png(tmp_path / "data" / "pictures", "green")
    file = tmp_path / "data" / "test.jsonl"
    file.write_text(json.dumps({"image": "pictures/green.png"}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert opened(read_table(str(file))) == [(0, 255, 0)]
    # What is there from the current folder comes first.
    write_png(tmp_path / "pictures", "red", "green.png")
    assert opened(read_table(str(file))) == [(255, 0, 0)]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (None, "row 2: column 'image' has no image"),
        ({"bytes": None, "path": None}, "row 2: column 'image' has no image"),
        (
            {"bytes": b"no image", "path": None},
            "row 2: the image of 8 bytes cannot be read: cannot identify image file",
        ),
        (
            {"bytes": None, "path": "nowhere.png"},
            "row 2: the image 'nowhere.png' cannot be read: there is no such file",
        ),
    ],
)
def test_images_that_cannot_be_read_are_named_with_their_row(cell: Any, message: str) -> None:
    data = Dataset.from_list([{"image": {"bytes": png(), "path": None}}, {"image": cell}])
    with pytest.raises(UserError, match=f"split 'test', {message}"):
        opened(data)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_thirty_two_bits_of_grey_are_refused(mode: str) -> None:
    held = io.BytesIO()
    Image.new(mode, (4, 3)).save(held, "TIFF")
    data = Dataset.from_list([{"image": {"bytes": held.getvalue(), "path": None}}])
    with pytest.raises(
        UserError, match="row 1: the image of .* bytes cannot be read: its pixels have 32 bits, .*8 or 16 bits"
    ):
        opened(data)


def test_an_image_that_is_far_too_large_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = Dataset.from_list([{"image": {"bytes": png(size=(30, 30)), "path": None}}])
    with pytest.raises(
        UserError, match="row 1: the image of .* bytes cannot be read: Image size .900 pixels. exceeds limit"
    ):
        opened(data)


def test_a_file_with_words_for_numbers_is_named() -> None:
    cell = {"bytes": b"P2 2 1 255 12 white", "path": None, "place": "split 'test', row 1"}
    with pytest.raises(UserError, match=r"^split 'test', row 1: the image of 19 bytes cannot be read: "):
        open_image(cell)


def test_a_damaged_file_is_named_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(png("red", size=(300, 300))[:-60])
    files = image_files(Dataset.from_list([{"image": str(path)}]), "image", "test", None)
    with pytest.raises(UserError, match=r"^split 'test', row 1: the image '.*cut.png' cannot be read: "):
        open_image(files[FILES][0])


@pytest.mark.parametrize("chosen", [[2, 0, 1], [1, 2]])
def test_a_damaged_file_is_named_with_its_row_among_those_that_were_chosen(chosen: list[int]) -> None:
    images = [png("blue"), png("red", size=(300, 300))[:-60], png("green")]
    data = Dataset.from_list([{"image": {"bytes": held, "path": None}} for held in images])
    files = image_files(data.select(chosen), "image", "train", None)
    assert [cell["bytes"] for cell in files[FILES]] == [images[number] for number in chosen]
    row = chosen.index(1)
    with pytest.raises(UserError, match=rf"^split 'train', row {row + 1}: the image of [\d,]+ bytes cannot be read: "):
        open_image(files[FILES][row])


def test_no_byte_of_an_image_is_copied() -> None:
    import pyarrow

    held = [png("red") + bytes(1_000_000), png("blue")]
    data = Dataset.from_list([{"image": cell} for cell in held])
    before = pyarrow.total_allocated_bytes()
    files = image_files(data, "image", "test", None)
    assert pyarrow.total_allocated_bytes() - before < 100_000
    assert [cell["bytes"] for cell in files[FILES]] == held


def test_a_column_of_something_else_is_refused() -> None:
    with pytest.raises(UserError, match="split 'test': column 'image' must hold images .* and holds Value"):
        opened(Dataset.from_list([{"image": 7}]))


def test_a_missing_image_may_be_allowed(tmp_path: Path) -> None:
    for cells in ([None, write_png(tmp_path, "red")], [None, png()]):
        files = image_files(
            Dataset.from_list([{"image": cell} for cell in cells]), "image", "test", None, optional=True
        )
        assert [has_image(cell) for cell in files[FILES]] == [False, True]
        assert open_image(files[FILES][1]).size == (12, 9)


def test_images_are_left_out_of_what_json_holds() -> None:
    row = {
        "memory": picture(),
        "bytes": b"1",
        "hub": {"bytes": b"1", "path": None},
        "list": [b"1"],
        "a": 1,
        "b": ["c"],
        "d": {"e": "f"},
    }
    assert plain_columns(Dataset.from_list([row])) == ["a", "b", "d"]


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    need_pillow()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; pip install 'turnrow\[vision\]'"):
        need_pillow()
