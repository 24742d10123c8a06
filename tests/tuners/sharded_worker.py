"""One of two processes that train models sharded by FSDP2 or ZeRO-3 beside whole ones. Run by torchrun; writes what it found to a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from tests.tuners.models import build, configure, perturb
from turnrow.adapters import save_adapter
from turnrow.errors import UserError
from turnrow.tuners.rocoft.layer import RocoftLayer

STEPS = 3


def layers(model: nn.Module) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    for layer in layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def of_this_process(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Its half of the batch."""
    return {name: value.chunk(distributed.get_world_size())[distributed.get_rank()] for name, value in inputs.items()}


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Adam would hide gradients that are a multiple of the right ones.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)


def train(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    optimizer = make_optimizer(model)
    losses = []
    for _ in range(STEPS):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def train_by_zero3(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The same training by DeepSpeed, every parameter in pieces."""
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
    config = {
        "train_micro_batch_size_per_gpu": len(inputs["input_ids"]),
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model), config=config)
    losses = []
    for _ in range(STEPS):
        loss = engine(**inputs).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    assert all(not parameter.numel() for parameter in model.parameters())
    return losses


def mean(losses: list[torch.Tensor]) -> list[float]:
    together = torch.stack(losses)
    distributed.all_reduce(together)
    return (together / distributed.get_world_size()).tolist()


def compare(method: str, architecture: str, mesh: DeviceMesh, folder: Path, engine: str = "fsdp2") -> dict[str, Any]:
    """Train one model whole and one sharded, on the same batch, and measure how far they come apart."""
    base, inputs = build(architecture)
    whole = get_peft_model(base, configure(method, base))
    perturb(whole)
    expected = [loss.item() for loss in train(whole, inputs)]

    base, _ = build(architecture)
    sharded = get_peft_model(base, configure(method, base))
    perturb(sharded)
    if engine == "zero3":
        losses = mean(train_by_zero3(sharded, of_this_process(inputs)))
    else:
        shard(sharded, mesh)
        losses = mean(train(sharded, of_this_process(inputs)))
    out = folder / "-".join([method, architecture])
    save_adapter(sharded, out)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(sharded, options=options) if engine == "fsdp2" else None
    if distributed.get_rank() == 0:
        whole.save_pretrained(out / "expected")
        if state is not None:
            sharded.save_pretrained(out / "by torch", state_dict=state)
    with sharded.disable_adapter(), torch.no_grad():
        disabled = sharded(**inputs).logits
    base, _ = build(architecture)
    with torch.no_grad():
        off = (disabled - base(**inputs).logits).abs().max().item()
    return {
        "losses": max(abs(a - b) for a, b in zip(expected, losses, strict=True)),
        "moved": expected[0] - expected[-1],
        "live": sum(layer._live is not None for layer in sharded.modules() if isinstance(layer, RocoftLayer)),
        "off": off,
    }


def refused(action: Any) -> str:
    try:
        action()
    except UserError as error:
        return str(error)
    return ""


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What is said where the values of a sharded weight would be needed."""
    base, inputs = build("llama")
    merged = get_peft_model(base, configure("row", base))
    shard(merged, mesh)
    base, _ = build("llama")
    turned = get_peft_model(base, configure("road_1", base))
    shard(turned, mesh)
    base, _ = build("llama")
    live = get_peft_model(base, configure("row", base))
    perturb(live)
    live(**inputs)
    shard(live, mesh)
    return {
        "merge": refused(merged.merge_adapter),
        "merge road": refused(turned.merge_adapter),
        "live": refused(lambda: live(**inputs)),
    }


def main(folder: Path, engine: str, cases: list[str]) -> None:
    distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    found: dict[str, Any] = {case: compare(*case.split(":"), mesh, folder, engine) for case in cases}
    if engine == "fsdp2":
        found["refusals"] = refusals(mesh)
    (folder / f"found-{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
