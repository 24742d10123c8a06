"""Put a saved adapter in the place of a loaded one while the model runs: all values at once, in the same tensors.

The tensors stay where they are, so what `torch.compile` made of the model stays valid, and so does a CUDA graph. Everything is read
and checked before the first value is written, and the old values are kept until the last one is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_against_weights, check_finite, compare_prints
from turnrow.adapters.fingerprint import WeightPrint, fingerprint, fingerprint_of_values, named_weights
from turnrow.adapters.loadable import loadable_config
from turnrow.adapters.reading import read_adapter
from turnrow.errors import AdapterError, UserError, near_matches
from turnrow.tuners._dense import is_plain_tensor, is_sharded
from turnrow.tuners._loaded import as_held, difference_in_shape, tensors_of
from turnrow.tuners._mixed_batch import MixedBatchLayer
from turnrow.tuners._transition import one_at_a_time
from turnrow.tuners.gate import SwapGate
from turnrow.tuners.rocoft.layer import RocoftLayer
from turnrow.tuners.swappable import peft_model_in, tuner_of, ways_in

__all__ = ["hotswap_adapter"]


def hotswap_adapter(
    model: nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", *, check_base: bool = True
) -> None:
    """Put the adapter in `path` in the place of a loaded one of the same shape, without compiling anew.

    Afterwards the model computes bit for bit what it would with this adapter loaded by `turnrow.adapters.load_adapter`, and
    its `peft_config` is that of this adapter. Of the same shape are adapters of one method, with the same mode, or variant and
    group size, of the same modules, and with tensors of the same shapes: other rows, columns or entries, but as many.

    Guaranteed:

    * Nothing of the model is touched before everything is read and checked. An error, or Ctrl-C, leaves it with the old adapter,
      or with the new one, whole.
    * With a gate (`turnrow.swap_gate`) the swap waits for the calls that are running in other threads, and calls that begin
      meanwhile wait for the swap: each computes with the old adapter or with the new one, wholly. Without a gate the caller
      sees to it that nothing runs.
    * Every tensor stays the same object at the same address, so that nothing that was compiled is compiled anew.

    A forward and its backward are two calls. Swap between training steps: a backward pass that finds its adapter swapped is
    an error of autograd. What an optimizer remembers of the old adapter, and gradients, are left as they are.

    Args:
        model: a PeftModel, or what `torch.compile` returned for it.
        path: the folder of the new adapter.
        adapter_name: the loaded adapter; need not be active.
        check_base: compare the base weights with the fingerprint in ``turnrow.json``, as `turnrow.adapters.load_adapter` does.

    Raises:
        AdapterError: as `turnrow.adapters.load_adapter`; the new adapter has another shape (the first difference is named).
        UserError: `model` is no such model, has no adapter of this name, has adapters merged, is sharded or offloaded, or has a
            gate that does not guard what was compiled.
    """
    peft_model = peft_model_in(model)
    gate = tuner_of(peft_model).swap_gate
    _check_guarded(model, gate)
    loaded = _loaded_config(peft_model, adapter_name)
    layers = _layers(peft_model)
    tensors = tensors_of(peft_model, adapter_name)
    _check_writable(layers, tensors, adapter_name)

    adapter = read_adapter(path)
    check_finite(adapter)
    values = as_held(adapter)
    config = _config_of(adapter, values, loaded, tensors, adapter_name)
    _check_against_base(adapter, peft_model, layers, check_base=check_base)

    with torch.inference_mode(False), torch.no_grad():
        # In memory, on the device and in the dtype of their places, before anyone has to wait.
        new = [torch.empty_like(held).copy_(values[key]) for key, held in tensors.items()]
        with nullcontext() if gate is None else gate.alone(), one_at_a_time():
            _exchange(peft_model, adapter_name, config, list(tensors.values()), new, layers.values())


# --- checks: nothing is touched --------------------------------------------------------------------------------------


def _layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    return {n: module for n, module in model.get_base_model().named_modules() if isinstance(module, BaseTunerLayer)}


def _loaded_config(model: PeftModel, adapter_name: str) -> PeftConfig:
    if adapter_name not in model.peft_config:
        raise UserError(
            f"no adapter {adapter_name!r} is loaded{near_matches(adapter_name, model.peft_config)}; loaded are "
            f"{', '.join(map(repr, model.peft_config))}"
        )
    return model.peft_config[adapter_name]


def _check_guarded(model: nn.Module, gate: SwapGate | None) -> None:
    if gate is not None and not all(gate.guards(way) for way in ways_in(model)):
        raise UserError(
            "the model was compiled after its gate was put up, so calls of it would not wait for a swap: call "
            "turnrow.swap_gate() with the compiled model, too"
        )


def _check_writable(layers: Mapping[str, BaseTunerLayer], tensors: Mapping[str, Tensor], adapter_name: str) -> None:
    for name, layer in layers.items():
        if layer.merged:
            raise UserError(
                f"adapter {layer.merged_adapters[0]!r} is merged into the weight of {name!r}, so a swap would change nothing there: call "
                "unmerge_adapter() first"
            )
        base: Any = layer.get_base_layer()
        if isinstance(base, nn.Module) and is_sharded(base):
            raise UserError(
                f"{name!r} is sharded over several processes (FSDP or ZeRO-3): load the adapter on all of them"
            )
    elsewhere = next((key for key, tensor in tensors.items() if not is_plain_tensor(tensor)), None)
    if elsewhere is not None:
        raise UserError(
            f"{elsewhere!r} of adapter {adapter_name!r} is sharded or offloaded, so it cannot be written in its place: load the model "
            "without a device_map that offloads it, or load the adapter anew"
        )


def _config_of(
    adapter: AdapterFile,
    values: Mapping[str, Tensor],
    loaded: PeftConfig,
    tensors: Mapping[str, Tensor],
    adapter_name: str,
) -> PeftConfig:
    """The config of the new adapter, which has the shape of the loaded one."""
    difference = difference_in_shape(adapter, values, loaded, tensors)
    if difference is not None:
        raise AdapterError(
            f"the adapter in {adapter.path} cannot take the place of {adapter_name!r}: {difference}. Only an adapter of the same "
            "shape can; one of another is loaded beside it, by PeftModel.load_adapter(path, adapter_name=...)"
        )
    config = loadable_config(adapter)
    # How this model was made, not the file, says so: peft adds the head of the task to the modules it holds whole.
    for field in ("inference_mode", "modules_to_save", "train"):
        if hasattr(loaded, field):
            setattr(config, field, getattr(loaded, field))
    return config


def _check_against_base(
    adapter: AdapterFile, model: PeftModel, layers: Mapping[str, BaseTunerLayer], *, check_base: bool
) -> None:
    base: nn.Module = model.get_base_model()
    weights = named_weights(base) | {name: layer.get_base_layer() for name, layer in layers.items()}
    check_against_weights(adapter, weights, type(base).__name__)
    if not check_base:
        return

    def take(name: str, own: Mapping[str, Tensor]) -> WeightPrint | None:
        with one_at_a_time():  # a forward may put the adapter into the weight at this moment
            return _print_of(weights.get(name), layers.get(name), own)

    compare_prints(adapter, take)


def _print_of(weight: Any, layer: BaseTunerLayer | None, own: Mapping[str, Tensor]) -> WeightPrint | None:
    """The fingerprint of a base weight, which may hold the old adapter at this moment."""
    if weight is None:
        return None
    found = fingerprint(weight, own)
    values = layer.original_values() if isinstance(layer, RocoftLayer) else None
    if found is None or values is None:
        return found
    return fingerprint_of_values(values, own, transposed=found.transposed)


# --- the swap --------------------------------------------------------------------------------------------------------


def _exchange(
    model: PeftModel,
    adapter_name: str,
    config: PeftConfig,
    tensors: list[Tensor],
    new: list[Tensor],
    layers: Iterable[BaseTunerLayer],
) -> None:
    """Write the new values, or leave the old ones."""
    tuner, configs = tuner_of(model), model.peft_config
    old, old_config = [tensor.detach().clone() for tensor in tensors], configs[adapter_name]
    with _devices_at_rest(tensors), ExitStack() as replacing:
        tuner.forget_batch()
        for layer in layers:
            if isinstance(layer, MixedBatchLayer):
                replacing.enter_context(layer.replacing(adapter_name))
        try:
            _write(tensors, new)
            configs[adapter_name] = config
        except BaseException:
            _put_back(tensors, old)
            configs[adapter_name] = old_config
            raise


def _write(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        with torch.inference_mode() if tensor.is_inference() else nullcontext():
            tensor.copy_(value)


def _put_back(tensors: list[Tensor], old: list[Tensor]) -> None:
    while True:
        try:
            _write(tensors, old)
        except KeyboardInterrupt:  # another one: half of each adapter would be worse than waiting
            continue
        return


@contextmanager
def _devices_at_rest(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Nothing is queued on the devices of `tensors` before and after: each thread may have a queue of its own there."""
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    for device in devices:
        torch.accelerator.synchronize(device)
    try:
        yield
    finally:
        for device in devices:
            torch.accelerator.synchronize(device)
