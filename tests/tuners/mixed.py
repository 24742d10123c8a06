"""Models with several adapters, and what each sample of a batch should come out as: the same sample alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from tests.tuners.models import VOCABULARY, build, configure, perturb

BASE = "__base__"


def several(
    architecture: str, methods: Sequence[str], *, size: float = 0.2, task: str | None = None, **to
) -> PeftModel:
    """A model with an adapter of each method, called by the method's name, with random values."""
    model, _ = build(architecture, **to)
    plain = copy.deepcopy(model)  # what a configuration is made for
    first, *others = methods
    model = get_peft_model(model, configure(first, plain, task_type=task), adapter_name=first)
    for method in others:
        model.add_adapter(method, configure(method, plain, task_type=task))
    perturb(model, size)
    return model.eval()


def batch_of(model: nn.Module, samples: int) -> dict[str, torch.Tensor]:
    """Inputs of that many samples, all different."""
    generator = torch.Generator().manual_seed(3)

    def ids(length: int) -> torch.Tensor:
        return torch.randint(3, VOCABULARY, (samples, length), generator=generator)

    if model.config.model_type == "vit":
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=generator)}
    inputs = {"input_ids": ids(9)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids(5)
    return inputs


def mixed(model: PeftModel, inputs: dict, names: Sequence[str]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, adapter_names=list(names)).logits


def alone(model: PeftModel, inputs: dict, names: Sequence[str]) -> torch.Tensor:
    """Each sample by itself, its adapter being the active one."""
    return torch.cat(
        [
            with_adapter(model, name, lambda one=one: model(**one).logits)
            for name, one in zip(names, _samples(inputs), strict=True)
        ]
    )


def with_adapter(model: PeftModel, name: str, call):
    """The result of `call` while `name` is active, without gradients."""
    with torch.no_grad():
        if name == BASE:
            with model.disable_adapter():
                return call()
        model.set_adapter(name)
        return call()


def _samples(inputs: dict) -> list[dict]:
    count = len(next(iter(inputs.values())))
    return [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(count)]
