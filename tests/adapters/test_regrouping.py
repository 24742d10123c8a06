"""A RoAd adapter in another pairing does the same where it only scales, and else is off by what is said."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import RoadConfig
from safetensors.torch import load_file, save_file

from tests.ops.test_pairs import dense
from turnrow import RocoftConfig
from turnrow.adapters import compose, load_adapter, read_adapter, regroup
from turnrow.adapters.algebra.road import Rotation, rotations
from turnrow.cli.main import main
from turnrow.errors import AdapterError, UserError
from turnrow.ops import pairs

KEY = "base_model.model.first.road_"


@pytest.fixture
def road(make_bert, train_a_little, save, tmp_path):
    """`road(variant, group_size)`: a trained adapter with its classifier; `turned=False` sets its angles to zero."""

    def road(variant="road_1", group_size=4, *, turned=True, name="adapter"):
        config = RoadConfig(variant=variant, group_size=group_size, target_modules="all-linear", task_type="SEQ_CLS")
        model = train_a_little(make_bert(), config)
        if not turned:
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "road_theta" in key:
                        parameter.zero_()
        return save(model, tmp_path / name)

    return road


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def scales(write, golden_road, theta, alpha, **settings):
    """The golden adapter with other angles and scales."""
    config, _ = golden_road
    return write(config | settings, {f"{KEY}theta": torch.tensor(theta), f"{KEY}alpha": torch.tensor(alpha)}, "golden")


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
@pytest.mark.parametrize("group_size", [2, 8])
def test_where_nothing_is_turned_the_result_does_the_same_to_the_bit(
    variant, group_size, road, make_bert, logits, tmp_path
):
    folder = road(variant, turned=False)
    found = regroup(folder, group_size, tmp_path / "out")
    assert found.variant == "road_2"
    assert found.residual == 0
    assert {lost for _, lost in found.norms.values()} == {0.0}
    assert read_adapter(found.path).config["group_size"] == group_size
    weights = [load_adapter(make_bert(), f).merge_and_unload().state_dict() for f in (folder, found.path)]
    for name, value in weights[0].items():
        assert torch.equal(weights[1][name], value), name
    assert torch.equal(logits(load_adapter(make_bert(), found.path)), logits(load_adapter(make_bert(), folder)))


@pytest.mark.parametrize(
    ("group_size", "alpha", "expected"),
    [
        (4, [3.0, 3.0], ("road_1", [3.0, 3.0])),  # the pairs (0, 2) and (1, 3) share a scale
        (4, [3.0, 5.0], ("road_2", [3.0, 3.0, 5.0, 5.0])),
        (4, [3.0, -5.0], ("road_2", [3.0, 3.0, -5.0, -5.0])),
        (4, [0.0, 0.0], ("road_1", [0.0, 0.0])),
        (2, [3.0, 5.0], ("road_1", [3.0, 5.0])),  # as it was
    ],
)
def test_golden_scales(group_size, alpha, expected, write, golden_road, tmp_path):
    found = regroup(scales(write, golden_road, [0.0, 0.0], alpha), group_size, tmp_path / "out")
    tensors = tensors_of(found.path)
    assert (found.variant, tensors[f"{KEY}alpha"].tolist()) == expected
    assert not tensors[f"{KEY}theta"].any()


def test_half_a_turn_is_a_scale_below_zero(write, golden_road, tmp_path):
    """The sine of float32's pi is not 0; nor is a turn that float32 cannot tell from none."""
    folder = scales(write, golden_road, [math.pi, -math.pi], [3.0, 3.0])
    tensors = tensors_of(regroup(folder, 4, tmp_path / "out").path)
    assert tensors[f"{KEY}alpha"].tolist() == [-3.0, -3.0]
    save_file(
        {f"{KEY}theta": torch.tensor([1e-6, 0.0]), f"{KEY}alpha": torch.ones(2)}, folder / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match="no pair is the same"):
        regroup(folder, 4, tmp_path / "other")


def test_the_same_group_size_keeps_every_number(road, tmp_path):
    folder = road("road_1")
    found = regroup(folder, 4, tmp_path / "same")
    assert (found.variant, found.residual) == ("road_1", 0)
    mine, others = tensors_of(folder), tensors_of(found.path)
    assert mine.keys() == others.keys()
    assert all(torch.equal(mine[key], others[key]) for key in mine)


@settings(max_examples=60)
@given(
    st.sampled_from(["road_1", "road_2", "road_4"]),
    st.sampled_from([2, 4, 12]),
    st.sampled_from([(True, True), (True, False), (False, True)]),
    st.integers(0, 99),
)
def test_the_smallest_variant_is_the_same_rotation(variant, group_size, equal, seed):
    """`equal` says whether the features of a pair share their angle and their scale, which road_2 may or may not."""
    torch.manual_seed(seed)
    parameters = [torch.randn(pairs.parameter_size(variant, 12), dtype=torch.float64) for _ in range(2)]
    if variant == "road_2":
        shape = (-1, 2, group_size // 2)
        parameters = [
            t.view(shape)[:, :1].expand(t.view(shape).shape).flatten() if one else t
            for t, one in zip(parameters, equal, strict=True)
        ]
    rotation = Rotation(variant, group_size, *parameters)
    smallest = rotation.smallest()
    is_road_1 = variant == "road_1" or (variant == "road_2" and all(equal))
    assert smallest.variant == ("road_1" if is_road_1 else "road_2")
    torch.testing.assert_close(dense(smallest.blocks), dense(rotation.blocks), rtol=1e-12, atol=1e-12)


def test_one_variant_holds_all_modules(write, golden_road, tmp_path):
    config, tensors = golden_road
    key = "base_model.model.second.road_"
    tensors = {f"{KEY}theta": torch.zeros(2), f"{KEY}alpha": torch.tensor([3.0, 3.0])}
    tensors |= {f"{key}theta": torch.zeros(2), f"{key}alpha": torch.tensor([3.0, 5.0])}
    found = regroup(write(config | {"target_modules": ["first", "second"]}, tensors), 4, tmp_path / "out")
    assert found.variant == "road_2"
    assert tensors_of(found.path)[f"{KEY}alpha"].tolist() == [3.0] * 4


# --- not exact ----------------------------------------------------------------------------------------------------


def test_golden_turns_are_refused_with_what_would_be_lost(write, golden_road, tmp_path):
    """Of ||R - I||^2 = 2 (1 - cos 0.3)^2 + 2 sin^2 0.3 + 2 (2 cos 0.4 - 1)^2 + 2 (2 sin 0.4)^2 the sines are lost."""
    lost = math.sqrt(2 * math.sin(0.3) ** 2 + 2 * (2 * math.sin(0.4)) ** 2)
    whole = math.hypot(lost, math.sqrt(2 * (1 - math.cos(0.3)) ** 2 + 2 * (2 * math.cos(0.4) - 1) ** 2))
    folder = write(*golden_road)
    figures = rf"{lost / whole:.1%} of \|\|R - I\|\| would be lost, most in 'first' \({lost:.4g} of {whole:.4g}\)"
    with pytest.raises(
        UserError, match=rf"turns pairs of group_size 2, .*group_size 4 .*{figures}.*--nearest.*turnrow merge"
    ):
        regroup(folder, 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = regroup(folder, 4, tmp_path / "out", nearest=True)
    assert found.norms["first"] == pytest.approx((whole, lost), rel=1e-6)
    tensors = tensors_of(found.path)
    assert not tensors[f"{KEY}theta"].any()
    expected = [math.cos(0.3), math.cos(0.3), 2 * math.cos(0.4), 2 * math.cos(0.4)]
    torch.testing.assert_close(tensors[f"{KEY}alpha"], torch.tensor(expected))


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_the_nearest_is_off_by_what_it_says(variant, road, make_bert, tmp_path):
    folder = road(variant)
    found = regroup(folder, 2, tmp_path / "out", nearest=True)
    before, after = (rotations(read_adapter(f)) for f in (folder, found.path))
    identity = {name: torch.eye(len(dense(r.blocks)), dtype=torch.float64) for name, r in before.items()}
    for name, (norm, lost) in found.norms.items():
        matrix = dense(before[name].blocks)
        assert torch.linalg.matrix_norm(matrix - identity[name]).item() == pytest.approx(norm)
        assert torch.linalg.matrix_norm(matrix - dense(after[name].blocks)).item() == pytest.approx(lost, rel=1e-5)
        torch.testing.assert_close(dense(after[name].blocks).diagonal(), matrix.diagonal(), rtol=1e-6, atol=1e-7)
    assert 0.3 < found.residual < 1
    load_adapter(make_bert(), found.path)
    provenance = read_adapter(found.path).manifest["provenance"]
    assert (provenance["operation"], provenance["from_group_size"], provenance["group_size"]) == ("regroup", 4, 2)
    assert provenance["residual"] == pytest.approx(found.residual)
    mine, others = tensors_of(folder), tensors_of(found.path)
    assert found.saved_modules == ["classifier.bias", "classifier.weight"]
    assert torch.equal(mine["base_model.model.classifier.weight"], others["base_model.model.classifier.weight"])


# --- with the other operations, and from the shell -----------------------------------------------------------------


def test_composing_two_pairings_points_here_and_works_afterwards(road, tmp_path):
    first, second = road("road_1", 4, turned=False, name="first"), road("road_2", 2, name="second")
    with pytest.raises(UserError, match=r"group_size 2 and 4.*turnrow regroup"):
        compose([first, second], tmp_path / "both", saved_modules_of=False)
    moved = regroup(first, 2, tmp_path / "moved").path
    both = compose([moved, second], tmp_path / "both", saved_modules_of=False).path
    one, other, found = (rotations(read_adapter(folder)) for folder in (first, second, both))
    for name, rotation in found.items():
        expected = dense(other[name].blocks) @ dense(one[name].blocks)
        torch.testing.assert_close(dense(rotation.blocks), expected, rtol=1e-6, atol=1e-6)


def test_the_command(road, tmp_path, capsys):
    folder = str(road())
    arguments = ["regroup", folder, "--group-size", "2", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "and 10 more modules" in error
    assert main([*arguments, "--nearest"]) == 0
    out = capsys.readouterr().out
    assert (
        "ROAD adapter (road_2, group_size 2) of 13 modules, and classifier.bias, classifier.weight whole, which leaves out"
        in out
    )
    assert "and 8 more modules" in out
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    arguments[-1] = str(tmp_path / "same")
    assert main([*arguments, "--group-size", "4"]) == 0
    assert "which does the same as before" in capsys.readouterr().out


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [0, 3, -2, True, 2.0, "2", None])
def test_group_sizes_that_are_none(group_size, write, golden_road, tmp_path):
    with pytest.raises(UserError, match=f"group_size is {group_size!r}; it must be an even number, 2 or more"):
        regroup(write(*golden_road), group_size, tmp_path / "out")


def test_a_group_size_that_does_not_divide_the_features_names_modules(road, tmp_path):
    with pytest.raises(
        UserError, match=r"is 16, which does not divide .*'bert\.\S+intermediate\.dense' \(24\).*divides 8"
    ):
        regroup(road(), 16, tmp_path / "out", nearest=True)
    assert not (tmp_path / "out").exists()


def test_other_adapters_are_refused(write, golden_rows, golden_road, make_bert, train_a_little, save, tmp_path):
    rows = save(train_a_little(make_bert(), RocoftConfig(target_modules=["query"])), tmp_path / "rows")
    with pytest.raises(UserError, match="is a ROCOFT adapter: only ROAD adapters turn"):
        regroup(rows, 2, tmp_path / "out")
    with pytest.raises(AdapterError, match="holds 1 NaN or infinite"):
        regroup(scales(write, golden_road, [0.0, math.nan], [1.0, 1.0]), 4, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = json.loads((tmp_path / "golden" / "adapter_config.json").read_text())
    assert config["group_size"] == 2
