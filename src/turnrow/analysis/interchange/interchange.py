"""Interchange interventions on a model: a base input runs on with parts of its states taken from source inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from turnrow.analysis.interchange.equation import exchanged, rows_of
from turnrow.analysis.interchange.hooks import read_states, replacing
from turnrow.analysis.interchange.maps import Map
from turnrow.analysis.interchange.sites import Places, Positions, Site, places
from turnrow.errors import UserError
from turnrow.ops.subspace import Subspace

__all__ = ["Batch", "Interchange", "Intervention", "Part", "SourceStates"]

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Part:
    """What one source gives at a site."""

    source: int = 0
    """Which of the sources."""
    rows: Subspace | None = None
    """Which rows of the map, as a list or a slice such as ``":50%"``; None is all."""
    positions: Positions | None = None
    """Which tokens of the source, as many as the site names of the base; None: those that the site names."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """What is exchanged at one site."""

    site: Site
    map: Map
    parts: tuple[Part, ...] = (Part(),)
    """Of different rows each."""


@dataclass(frozen=True, eq=False)
class SourceStates:
    """The states of a source at the sites of an `Interchange`, and the inputs that they are of."""

    batch: Batch
    states: list[Tensor]
    """(B, T, d), one a site."""


class Interchange:
    """Interventions on a model, at one site or several.

    Args:
        model: any model of torch whose inputs are given by name. It is neither changed nor frozen.
        interventions: what is exchanged, and where. With several sites the later ones replace what the earlier ones led to.

    Raises:
        UserError: two parts of an intervention have a row in common.
    """

    def __init__(self, model: nn.Module, interventions: Sequence[Intervention]) -> None:
        if not interventions:
            raise UserError("there is nothing to exchange: give at least one intervention")
        for one in interventions:
            rows_of([part.rows for part in one.parts], one.map.size)
        self.model = model
        self.interventions = tuple(interventions)
        self.maps = nn.ModuleList({id(one.map): one.map for one in interventions}.values())
        """Each map once."""

    def states_of(self, source: Batch) -> SourceStates:
        """Run the model on a source, as the model is now, and keep its states at the sites.

        What `__call__` does with a source that is a batch. States kept before serve where the model runs otherwise for
        sources than for the base, for example with an adapter on.
        """
        return SourceStates(source, read_states(self.model, [one.site for one in self.interventions], source))

    def __call__(self, base: Batch, *sources: Batch | SourceStates) -> Any:
        """The model's output for `base` with what is exchanged.

        Args:
            base: inputs of the model.
            sources: inputs of as many texts each, or their states.

        Raises:
            UserError: a part names a source that is not there; numbers of texts, tokens or features do not fit.
        """
        wanted = max(part.source for one in self.interventions for part in one.parts) + 1
        if len(sources) != wanted:
            raise UserError(f"there are {len(sources)} sources; the interventions take {wanted}")
        held = [one if isinstance(one, SourceStates) else self.states_of(one) for one in sources]
        changes = [_Exchange(number, one, base, held) for number, one in enumerate(self.interventions)]
        with replacing(self.model, [one.site for one in self.interventions], changes):
            return self.model(**base)


class _Exchange:
    """Replaces the states of the base at one site."""

    def __init__(self, number: int, intervention: Intervention, base: Batch, sources: Sequence[SourceStates]) -> None:
        self._number, self._intervention, self._base, self._sources = number, intervention, base, sources

    def __call__(self, states: Tensor) -> Tensor:
        site = self._intervention.site
        at = _places(site, site.positions, self._base, states)
        b = states[at[0].to(states.device), at[1].to(states.device)]  # (n, d)
        parts = [(self._taken(part, at[0]).to(b.device), part.rows) for part in self._intervention.parts]
        replaced = exchanged(b, parts, self._intervention.map)
        return states.index_put(tuple(one.to(states.device) for one in at), replaced)

    def _taken(self, part: Part, texts: Tensor) -> Tensor:
        site, source = self._intervention.site, self._sources[part.source]
        states = source.states[self._number]
        positions = site.positions if part.positions is None else part.positions
        at = _places(site, positions, source.batch, states)
        if at[0].tolist() != texts.tolist():
            counts = texts.bincount().tolist(), at[0].bincount().tolist()
            raise UserError(
                f"the base gives {counts[0]} tokens of its texts at {site.module!r}, source {part.source} {counts[1]}: there must be as many"
            )
        return states[at[0].to(states.device), at[1].to(states.device)]


def _places(site: Site, positions: Positions, batch: Batch, states: Tensor) -> Places:
    # Where there is one state a text, a mask of tokens says nothing of it.
    of_tokens = batch if states.shape[1] > 1 else {name: v for name, v in batch.items() if name != site.mask}
    return places(positions, of_tokens, (states.shape[0], states.shape[1]), site.mask)
