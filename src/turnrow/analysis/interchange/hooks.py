"""Reading and replacing what goes into or comes out of a module, by hooks that any torch module has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from turnrow.analysis.interchange.sites import Site, module_of
from turnrow.errors import UserError

__all__ = ["read_states", "replacing"]

Replace = Callable[[Tensor], Tensor]
"""States (B, T, d) to what the model goes on with, of the same shape."""


def read_states(model: nn.Module, sites: Sequence[Site], batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The states at some sites in one forward pass, without gradients: (B, T, d), or (B, 1, d) where there are no tokens.

    Args:
        model: any model; it runs as it is, with the adapters that are on.
        sites: where.
        batch: its inputs.

    Raises:
        UserError: as `replacing`.
    """
    found: list[Tensor | None] = [None] * len(sites)

    def keep(number: int) -> Replace:
        def read(states: Tensor) -> Tensor:
            found[number] = states.detach().clone()
            return states

        return read

    with torch.no_grad(), replacing(model, sites, [keep(number) for number in range(len(sites))]):
        model(**batch)
    return [states for states in found if states is not None]


@contextmanager
def replacing(model: nn.Module, sites: Sequence[Site], replace: Sequence[Replace]) -> Iterator[None]:
    """In the block, a forward pass of the model goes on at each site with what `replace` makes of its states.

    Raises:
        UserError: at the end of the block, a site was not reached, or several times without saying which call is meant; in it, a site
            has no states of texts.
    """
    hooks = []
    with ExitStack() as stack:
        for site, change in zip(sites, replace, strict=True):
            name, module = module_of(model, site)
            hook = _Hook(site, name, change)
            handle = (
                module.register_forward_pre_hook(hook.on_input, with_kwargs=True)
                if site.where == "input"
                else module.register_forward_hook(hook.on_output)
            )
            stack.callback(handle.remove)
            hooks.append(hook)
        yield
    for hook in hooks:
        hook.check()


class _Hook:
    def __init__(self, site: Site, name: str, replace: Replace) -> None:
        self._site, self._name, self._replace = site, name, replace
        self._calls = 0

    def on_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        # The states come first, by place or by name.
        for place, value in enumerate(args):
            if isinstance(value, Tensor):
                return (*args[:place], self._changed(value), *args[place + 1 :]), kwargs
        for key, value in kwargs.items():
            if isinstance(value, Tensor):
                return args, {**kwargs, key: self._changed(value)}
        raise UserError(f"module {self._name!r} is given no tensor")

    def on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._changed(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self._changed(output[0]), *output[1:])
        if isinstance(output, Mapping):
            key = next((key for key, value in output.items() if isinstance(value, Tensor)), None)
            if key is not None:
                output[key] = self._changed(output[key])  # type: ignore[index]
                return output
        raise UserError(
            f"module {self._name!r} returns no tensor, but a {type(output).__name__}: name a module inside it"
        )

    def _changed(self, states: Tensor) -> Tensor:
        mine = self._site.call is None or self._site.call == self._calls
        self._calls += 1
        if not mine:
            return states
        if states.ndim not in (2, 3) or not states.is_floating_point():
            raise UserError(
                f"the {self._site.where} of module {self._name!r} is {states.dtype} {list(states.shape)}; states must be numbers "
                "(texts, tokens, features) or (texts, features)"
            )
        return self._replace(states if states.ndim == 3 else states[:, None]).view(states.shape)

    def check(self) -> None:
        """What must hold once the forward pass is over."""
        if self._calls == 0 or (self._site.call or 0) >= self._calls:
            raise UserError(
                f"module {self._name!r} ran {self._calls} times, so call {self._site.call or 0} was not reached"
            )
        if self._site.call is None and self._calls > 1:
            raise UserError(
                f"module {self._name!r} ran {self._calls} times in one forward pass: say which with Site(..., call=0)"
            )
