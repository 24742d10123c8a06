"""What layers over dense weights can do, those over quantized ones can too: mixed batches, re-selection, mixed models."""

from __future__ import annotations

import pytest
import torch
from peft import RoadConfig, get_peft_model

from tests.tuners.mixed import BASE, alone, batch_of, mixed
from tests.tuners.models import ROAD, ROCOFT, build, configure, identical, output, perturb
from tests.tuners.quantized_models import BACKENDS, SIZES, build_quantized, packed
from turnrow.tuners.rocoft import RocoftConfig
from turnrow.tuners.rocoft.reselection import reselect, unite

every_backend = pytest.mark.parametrize("backend", BACKENDS)


@every_backend
@pytest.mark.parametrize("family", [ROCOFT, ROAD], ids=["rocoft", "road"])
def test_every_sample_of_a_batch_comes_out_as_alone(backend, family):
    base, _ = build_quantized("roberta", backend)
    dense, _ = build("roberta", SIZES)
    first, *others = family
    model = get_peft_model(base, configure(first, dense), adapter_name=first)
    for method in others:
        model.add_adapter(method, configure(method, dense))
    perturb(model, 0.2)
    names = [*family, BASE, first]
    inputs = batch_of(model.eval(), len(names))
    expected = alone(model, inputs, names)
    torch.testing.assert_close(mixed(model, inputs, names), expected, rtol=1e-3, atol=1e-3)


@every_backend
def test_what_reselection_settles_stays(backend):
    model, inputs = build_quantized("roberta", backend)
    before = packed(model)
    model = get_peft_model(model, RocoftConfig(r=2, target_modules=["query", "dense"]))
    perturb(model)
    expected = output(model, inputs)
    reselect(model, None, strategy="cycle")
    torch.testing.assert_close(output(model, inputs), expected)
    unite(model)
    torch.testing.assert_close(output(model, inputs), expected)
    with pytest.warns(UserWarning, match="merging has rounded"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert identical(packed(model), before)


@every_backend
def test_two_methods_in_a_mixed_model_merge_and_come_off_again(backend):
    base, inputs = build_quantized("roberta", backend)
    before, reference = packed(base), output(base, inputs)
    targets = ["query", "value"]
    model = get_peft_model(base, RoadConfig(target_modules=targets, group_size=4), adapter_name="turn", mixed=True)
    model.add_adapter("rows", RocoftConfig(target_modules=targets))
    model.set_adapter(["turn", "rows"])
    perturb(model, 0.05)
    adapted = output(model, inputs)
    with pytest.warns(UserWarning, match="merging has rounded"):
        model.merge_adapter()
    torch.testing.assert_close(output(model, inputs), adapted, rtol=0, atol=5e-2)
    model.unmerge_adapter()
    assert identical(packed(model), before)
    assert torch.equal(output(model, inputs), adapted)
    assert torch.equal(output(model.unload(), inputs), reference)
