"""Pictures and the page are complete files that need nothing else."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from tests.analysis.ntk.models import case
from turnrow.analysis.ntk import (
    Columns,
    Full,
    Rows,
    draw_distances,
    draw_kernels,
    draw_spectra,
    kernel_figures,
    tangent_kernels,
    write_report,
)
from turnrow.errors import UserError

LABELS = ["no", "yes", "no", "yes", "no"]


@pytest.fixture(scope="module")
def kernels():
    made = case("roberta")
    return tangent_kernels(
        made.model, made.train, {"full": Full(), "rows": Rows(), "<columns>": Columns()}, made.outputs
    )


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_written_in_the_format_of_the_name(tmp_path: Path, kernels, ending: str) -> None:
    drawn = [
        draw_kernels(kernels, LABELS, tmp_path / f"heat.{ending}"),
        draw_spectra(kernels, tmp_path / f"spectra.{ending}"),
        draw_distances({"rows": {"p = 1": 0.1, "p = 2": 0.2}, "LoRA": {"p = 1": 0.3}}, tmp_path / f"bars.{ending}"),
    ]
    for path, picture in zip(["heat", "spectra", "bars"], drawn, strict=True):
        assert (tmp_path / f"{path}.{ending}").read_bytes() == picture
        if ending == "png":
            assert picture.startswith(b"\x89PNG")
        else:
            assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert len(list(tmp_path.iterdir())) == 3


def test_the_page_holds_figures_and_pictures(tmp_path: Path, kernels) -> None:
    write_report(tmp_path / "kernels.html", kernels, LABELS, title="Few & small")
    text = (tmp_path / "kernels.html").read_text()
    assert len(re.findall(r'src="data:image/png;base64,[A-Za-z0-9+/=]{1000,}"', text)) == 3
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "Few &amp; small" in text
    assert "&lt;columns&gt;" in text
    figures = kernel_figures(kernels, LABELS, "full")
    assert figures["full"]["p = 1"] == 0
    assert f"{figures['rows']['p = 2']:.3f}" in text
    assert f"{kernels['rows'].parameters:,}" in text


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, kernels) -> None:
    with pytest.raises(UserError, match="cannot be 'pmg'; it must be png or svg; did you mean 'png'"):
        draw_spectra(kernels, tmp_path / "spectra.pmg")
    with pytest.raises(UserError, match="but there are 3 labels"):
        draw_kernels({"full": np.eye(5)}, [0, 1, 1])
    with pytest.raises(UserError, match="reference is 'ful', which is none of the kernels; did you mean 'full'"):
        write_report(tmp_path / "page.html", kernels, LABELS, reference="ful")
    for draw in (draw_spectra, draw_distances, lambda nothing: draw_kernels(nothing, [])):
        with pytest.raises(UserError, match="give at least one"):
            draw({})
    assert not list(tmp_path.iterdir())
