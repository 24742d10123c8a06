"""Whether the parameters of adapters are still what they were: asked before every forward, so it must cost next to nothing."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

__all__ = ["ParameterWatch"]


class ParameterWatch:
    """Looks at some thousand parameters without a loop in Python over them.

    Args:
        places: dictionaries that hold parameters, each with the keys to look at.
    """

    def __init__(self, places: Sequence[tuple[dict[str, Any], list[str]]]) -> None:
        # One key is named twice, so that what comes out is a tuple however many there are.
        self._readers = [(operator.itemgetter(keys[0], *keys), holder) for holder, keys in places]
        self._seen = list(chain.from_iterable(read(holder) for read, holder in self._readers))
        one_of_each: dict[str, Tensor] = {}
        for holder, keys in places:
            one_of_each.update((key, holder[key]) for key in keys)
        self._one_of_each = list(one_of_each.values())
        self.trained = any(parameter.requires_grad for parameter in self._seen)
        """Whether any of them is trained: then its values can change unseen, through `.data`."""
        # An alias counts versions with its parameter. Made one after the other they lie side by side in memory, where
        # the parameters lie anywhere: most of the time would go into waiting for memory.
        self._aliases = [parameter.detach() for parameter in self._seen]
        self._versions = _versions(self._aliases)

    def unchanged(self) -> bool:
        """Whether all are in their places, none was written to and none is trained."""
        if self.trained or any(
            parameter.requires_grad for parameter in self._one_of_each
        ):  # peft switches whole adapters
            return False
        try:
            now = [read(holder) for read, holder in self._readers]
        except KeyError:
            return False
        same = all(map(operator.is_, chain.from_iterable(now), self._seen))
        return same and self._versions == _versions(self._aliases)


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(operator.attrgetter("_version"), tensors))
    except RuntimeError:  # tensors made in inference mode count no versions
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]
