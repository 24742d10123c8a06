"""The rows, columns or entries that hold most of a given change of a weight: the inverse of training only those.

Of all changes of r rows (or r columns, or n entries) the one nearest to a given matrix in the Frobenius norm copies the r of
greatest norm and leaves the others out. For rows and columns together no closed form is known; here rows are taken first, then the
columns of greatest norm in what the rows leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from turnrow.ops import columns
from turnrow.ops.union import Change

__all__ = ["best_columns", "best_entries", "best_rows", "best_rows_and_columns", "residual"]


def best_rows(matrix: Tensor, r: int | None) -> Change:
    """The r rows of greatest norm of a matrix (out, in), ascending, fewer where fewer are not zero; None takes all of those."""
    index = _greatest(torch.linalg.vector_norm(matrix, dim=1), r)
    return Change(row=(matrix.index_select(0, index), index)) if len(index) else Change()


def best_columns(matrix: Tensor, r: int | None) -> Change:
    """The same of columns."""
    index = _greatest(torch.linalg.vector_norm(matrix, dim=0), r)
    return Change(column=(matrix.index_select(1, index), index)) if len(index) else Change()


def best_rows_and_columns(matrix: Tensor, r: int) -> Change:
    """r rows, and r columns of what they leave."""
    of_rows = best_rows(matrix, r)
    if of_rows.row is None:
        return of_rows
    rest = columns.others(of_rows.row[1], len(matrix))
    return Change(row=of_rows.row, column=best_columns(matrix.index_select(0, rest), r).column)


def best_entries(matrix: Tensor, n: int) -> Change:
    """The n entries of greatest magnitude, ascending, fewer where fewer are not zero."""
    index = _greatest(matrix.abs().flatten(), n)
    return Change(entry=(matrix.flatten()[index], index)) if len(index) else Change()


def residual(matrix: Tensor, change: Change) -> float:
    """Frobenius norm of what the change leaves out of the matrix it was taken from."""
    rest = matrix.clone()
    if change.entry is not None:
        rest.view(-1)[change.entry[1]] = 0
    if change.row is not None:
        rest[change.row[1]] = 0
    if change.column is not None:
        rest[:, change.column[1]] = 0  # also in changed rows, where it is zero already
    return torch.linalg.vector_norm(rest).item()


def _greatest(norms: Tensor, count: int | None) -> Tensor:
    """The numbers of the greatest norms, ascending, none that is zero; of equals the first."""
    order = norms.sort(descending=True, stable=True).indices
    if count is not None:
        order = order[:count]
    return order[norms[order] > 0].sort().values
