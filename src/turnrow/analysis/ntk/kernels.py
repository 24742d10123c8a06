"""All tangent kernels of a model in one pass over the data: K[i, j, c, d] = <grad f_c(x_i), grad f_d(x_j)>.

The gradients are with respect to what a method trains; `descriptions` says what that is, `factors` where they come from,
`contraction` how they are multiplied. Design and cost: docs/kernels.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import get_args

import numpy as np
from torch import nn

from turnrow.analysis.ntk import caching
from turnrow.analysis.ntk.contraction import Contraction, cheaper
from turnrow.analysis.ntk.descriptions import Description
from turnrow.analysis.ntk.factors import Batch, Outputs, batch_size, ready_for_gradients
from turnrow.analysis.ntk.gram import Gram, Samples
from turnrow.analysis.ntk.layout import Layout
from turnrow.analysis.ntk.passing import FactorPass
from turnrow.analysis.ntk.slices import EntryFeatures, Pick, Space, WeightFeatures, by_slices
from turnrow.analysis.ntk.terms import Term, Vector, Weight
from turnrow.analysis.ntk.token_factors import Load, Remembered
from turnrow.analysis.ntk.token_products import by_tokens
from turnrow.errors import UserError

__all__ = ["Progress", "TangentKernel", "TangentKernels", "tangent_kernels"]

Progress = bool | Callable[[int, int], None]
"""Whether to show a bar on stderr, or what is told how many steps of how many are done."""


@dataclass(frozen=True, eq=False)
class TangentKernel:
    """The tangent kernel of one method."""

    train: np.ndarray
    """(n, n, C, C) float64: of training samples i, j and outputs c, d; symmetric in (i, c) and (j, d)."""
    other: np.ndarray
    """(m, n, C, C) float64: of the other samples with the training samples; m = 0 where there are none."""
    parameters: int
    """How many parameters it is the kernel of."""

    @property
    def flat(self) -> np.ndarray:
        """`train` as a symmetric matrix (n C, n C), the output running fastest."""
        n, _, c, _ = self.train.shape
        return self.train.transpose(0, 2, 1, 3).reshape(n * c, n * c)


@dataclass(frozen=True, eq=False)
class TangentKernels(Mapping[str, TangentKernel]):
    """Kernels by name, as `tangent_kernels` returns them."""

    kernels: Mapping[str, TangentKernel]
    train_outputs: np.ndarray
    """f of the training samples, (n, C) float64: where linearized training starts."""
    other_outputs: np.ndarray
    """f of the others, (m, C)."""

    def __getitem__(self, name: str) -> TangentKernel:
        return self.kernels[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kernels)

    def __len__(self) -> int:
        return len(self.kernels)


def tangent_kernels(
    model: nn.Module,
    batches: Sequence[Batch],
    kernels: Mapping[str, Description],
    outputs: Outputs,
    other_batches: Sequence[Batch] = (),
    *,
    block_bytes: int = 2**31,
    contraction: Contraction = "auto",
    progress: Progress = False,
    cache: str | os.PathLike[str] | None = None,
) -> TangentKernels:
    """Compute the tangent kernels of several methods from one forward and one backward pass per output.

    Every kernel is exact, up to rounding, for padded batches, tied weights, and modules that are called more than once. Before
    the pass the layers' factors are compared with autograd on one batch. A parameter trained whole for which they differ is asked
    one sample at a time, which is slow and as exact.

    Memory: the model, the kernels (8 bytes for each of their numbers), the graph and the factors of one batch, and at most `block_bytes`
    for everything else: three quarters of it hold factors, which go to a temporary file beyond that, and one the gradients and
    products being computed. Smaller blocks cost time. Batches of samples of similar length save both.

    Args:
        model: any module; in evaluation mode meanwhile, afterwards as it was.
        batches: the n training samples: keyword arguments of the model, in tensors with the samples along the first dimension.
        kernels: descriptions by names of your choice.
        outputs: f: from the model and a batch of B samples to (B, C), a number for each class. See `outputs` for some.
        other_batches: m further samples, of which only the kernel with the training samples is wanted.
        block_bytes: see above.
        contraction: how the gradients of weights are multiplied; "auto" takes the cheaper way for each layer.
        progress: True for a bar on stderr, or a function of steps done and steps in all.
        cache: a folder to keep results in. They are found again when model, data, outputs and descriptions are the same to
            the last bit. `outputs` must then be one of this package, or have a `cache_key` of its own.

    Raises:
        UserError: a description does not fit the model, a layer mixes samples, `block_bytes` is too small for one batch,
            or `outputs` does not return (B, C).
    """
    layout = Layout(model)
    batches, other_batches = list(batches), list(other_batches)
    _check_request(batches, kernels, contraction, block_bytes)
    terms = {name: _distinct(name, description.terms(layout)) for name, description in kernels.items()}
    key = None
    if cache is not None:
        key = caching.key_of(model, batches, other_batches, outputs, {name: list(own) for name, own in terms.items()})
        if (found := caching.read(cache, key)) is not None:
            return _from_arrays(found, terms)
    every = [*batches, *other_batches]
    by_key = {key: term for own in terms.values() for key, term in own.items()}
    largest = max(map(batch_size, every))
    with (
        ready_for_gradients(model),
        FactorPass(layout, list(by_key.values()), outputs, block_bytes * 3 // 4, largest) as factors,
    ):
        # Samples can be told apart wrongly only where there are several.
        factors.check(next((batch for batch in every if batch_size(batch) > 1), every[0]))
        with _advancing(progress, len(every) + len(by_key)) as advance:
            for batch in every:
                factors.add(batch)
                advance()
            samples = factors.samples(len(batches))
            grams = {name: Gram(samples) for name in terms}
            wanted = {key: [grams[name] for name, own in terms.items() if key in own] for key in by_key}
            for _ in _contract(factors, samples, wanted, block_bytes // 4, contraction):
                advance()
    done: dict[str, TangentKernel] = {}
    for name, own in terms.items():
        train, other = grams.pop(name).blocks()
        done[name] = TangentKernel(train, other, _size(own))
    f = np.concatenate(factors.f)
    result = TangentKernels(done, f[: samples.train], f[samples.train :])
    if cache is not None and key is not None:
        caching.write(cache, key, _to_arrays(result))
    return result


def _check_request(batches: Sequence[Batch], kernels: Mapping[str, Description], how: str, block_bytes: int) -> None:
    if not kernels:
        raise UserError("there are no kernels to compute: give at least one description, such as {'full': Full()}")
    for name, description in kernels.items():
        if not isinstance(description, Description):
            raise UserError(
                f"kernel {name!r} is a {type(description).__name__}; it must be a description, such as Rows(rows=3)"
            )
    if not batches:
        raise UserError("there are no training batches: give at least one")
    if how not in get_args(Contraction):
        raise UserError(f"contraction is {how!r}; it must be one of {', '.join(get_args(Contraction))}")
    if block_bytes < 1:
        raise UserError(f"block_bytes is {block_bytes}; it must be a positive number of bytes")


def _distinct(name: str, terms: Sequence[Term]) -> dict[str, Term]:
    """The terms by their keys; what two kernels share is computed once."""
    found = {term.key: term for term in terms}
    if len(found) < len(terms):
        raise UserError(f"kernel {name!r} trains something twice; name each layer and parameter once")
    return found


def _size(terms: Mapping[str, Term]) -> int:
    return sum(term.size for term in terms.values())


def _contract(
    factors: FactorPass, samples: Samples, terms: Mapping[str, Sequence[Gram]], room: int, contraction: Contraction
) -> Iterator[str]:
    """Add the kernel of every term, by its key, to the kernels that it is a part of; yield the keys as they are done."""
    space, done = Space(), set()
    picked: dict[str, list[str]] = {}
    for key in terms:
        term = factors.now(key)
        if isinstance(term, Weight) and term.entries is not None:
            picked.setdefault(term.modules[0], []).append(key)
    # Entries come last: where the whole weight is done by slices, they are done with it.
    for key in sorted(terms, key=lambda key: any(key in keys for keys in picked.values())):
        term = factors.now(key)
        if key in done:
            continue
        if isinstance(term, Vector):
            by_slices(factors.vectors(term), samples, terms[key], room, space)
        else:
            load: Load = Remembered(partial(factors.load, term), room // 4)
            tokens = factors.tokens(term)
            how = cheaper(tokens, term.shape, samples) if contraction == "auto" else contraction
            if not any(linear or looked_up for linear, looked_up in tokens):
                pass  # no output depends on this weight
            elif term.entries is not None:  # a product of tokens would be that of all entries
                by_slices(EntryFeatures(load, term.shape, term.entries, factors.like), samples, terms[key], room, space)
            elif how == "tokens":
                by_tokens(load, samples, terms[key], room, term.sign)
            else:
                with_it = (
                    picked.get(term.modules[0], []) if term.parameter is not None and len(term.modules) == 1 else []
                )
                picks = [_pick(factors.now(other), terms[other], factors) for other in with_it]
                features = WeightFeatures(load, term.shape, factors.like)
                by_slices(features, samples, terms[key], room, space, term.sign, picks)
                done.update(with_it)
                yield from with_it
        done.add(key)
        yield key


def _pick(term: Term, grams: Sequence[Gram], factors: FactorPass) -> Pick:
    if not isinstance(term, Weight) or term.entries is None:
        raise TypeError(f"{term.key} is no choice of entries")
    return Pick(term.entries, term.shape, grams, factors.like.device)


# --- on disk -------------------------------------------------------------------------------------------------------------


def _to_arrays(result: TangentKernels) -> dict[str, np.ndarray]:
    arrays = {"train_outputs": result.train_outputs, "other_outputs": result.other_outputs}
    for name, kernel in result.items():
        arrays |= {f"{name}/train": kernel.train, f"{name}/other": kernel.other}
    return arrays


def _from_arrays(arrays: Mapping[str, np.ndarray], terms: Mapping[str, Mapping[str, Term]]) -> TangentKernels:
    kernels = {
        name: TangentKernel(arrays[f"{name}/train"], arrays[f"{name}/other"], _size(own)) for name, own in terms.items()
    }
    return TangentKernels(kernels, arrays["train_outputs"], arrays["other_outputs"])


# --- progress ------------------------------------------------------------------------------------------------------------


@contextmanager
def _advancing(progress: Progress, total: int) -> Iterator[Callable[[], None]]:
    """What to call after each step."""
    done = 0
    if not isinstance(progress, bool):
        told = progress

        def advance() -> None:
            nonlocal done
            done += 1
            told(done, total)

        yield advance
    elif not progress:
        yield lambda: None
    else:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), refresh_per_second=4) as bars:
            task = bars.add_task("tangent kernels", total=total)
            yield lambda: bars.advance(task)
