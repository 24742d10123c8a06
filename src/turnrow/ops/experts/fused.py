"""Where models keep the experts of a layer as one parameter of three dimensions, and which way round it is stored."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

__all__ = ["FusedWeight", "fused_weights", "holds_other_experts"]

_TRANSPOSED = {
    "AriaGroupedExpertsGemm": True,
    "GraniteMoeHybridParallelExperts": False,
    "GraniteMoeParallelExperts": False,
    "GraniteMoeSharedParallelExperts": False,
    "InklingSharedExperts": False,
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
"""Classes of transformers that do not say themselves which way round their weights are: True for (E, in, out)."""


class FusedWeight:
    """One fused weight of a module, with the names by which layers read their base layer.

    It looks the parameter up at every use, because moving, sharding or loading a model may put another in its place.
    """

    def __init__(self, module: nn.Module, name: str, *, transposed: bool) -> None:
        self.module, self.name, self.transposed = module, name, transposed

    @property
    def weight(self) -> Tensor:
        """The parameter as it is stored: (E, out, in), or (E, in, out) if `transposed`."""
        return getattr(self.module, self.name)

    @property
    def bias(self) -> Tensor | None:
        """The biases of the experts, (E, out), where there are any."""
        return getattr(self.module, f"{self.name}_bias", None)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, out, in)."""
        experts, out_features, in_features = self.matrices().shape
        return experts, out_features, in_features

    def matrices(self, *, values: bool = False) -> Tensor:
        """The weight as (E, out, in), a view.

        Args:
            values: leave autograd out: writing to the result changes the weight, but not its version counter.
        """
        weight = self.weight.data if values else self.weight
        return weight.transpose(1, 2) if self.transposed else weight

    def named_parameters(self, *, recurse: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters by the names of a linear layer, as `torch.nn.Module` has it."""
        for name in ("weight", "bias"):
            parameter = getattr(self, name)
            if isinstance(parameter, nn.Parameter):
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        """As `torch.nn.Module` has it."""
        return (parameter for _, parameter in self.named_parameters())


def fused_weights(module: nn.Module) -> dict[str, FusedWeight]:
    """The fused weights that `module` itself holds, by name; not those of modules inside it.

    They are its floating-point parameters of three dimensions, if it is known which way round they are: from the attribute
    `is_transposed` that transformers gives to such modules, or from the class.
    """
    transposed = getattr(module, "is_transposed", None) if hasattr(module, "has_gate") else None
    if transposed is None:
        transposed = _TRANSPOSED.get(type(module).__name__)
    if transposed is None:
        return {}
    return {
        name: FusedWeight(module, name, transposed=transposed)
        for name, parameter in module.named_parameters(recurse=False)
        # float8 holds scaled values: its elements are not the weights themselves
        if parameter.dim() == 3 and parameter.is_floating_point() and parameter.element_size() >= 2
    }


def holds_other_experts(module: nn.Module) -> bool:
    """Whether `module` holds weights of experts itself, but of a kind that `fused_weights` does not know: quantized, for example."""
    return (
        "Expert" in type(module).__name__
        and not fused_weights(module)
        and any(tensor.dim() >= 2 for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
    )
