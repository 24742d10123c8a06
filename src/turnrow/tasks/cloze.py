"""Templates with a gap: a text with columns in braces and `{mask}`, the place of the word that is asked for."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Callable, Mapping

from turnrow.errors import UserError, near_matches
from turnrow.tasks.templates import greatest_fitting, shortened

__all__ = ["Cloze"]

_MASK = "mask"


def _open(text: str) -> str:
    """Without the punctuation mark that ends it."""
    stripped = text.rstrip()
    return stripped[:-1].rstrip() if stripped and unicodedata.category(stripped[-1]).startswith("P") else stripped


def _lower(text: str) -> str:
    """With a small first letter."""
    return text[:1].lower() + text[1:]


_FORMS: dict[str, Callable[[str], str]] = {"open": _open, "lower": _lower}


class Cloze:
    """A text with columns in braces and one `{mask}`, such as ``"{premise:open}? {mask}, {hypothesis:lower}"``.

    After a colon stands in which form the column's text is put there: ``open`` without the punctuation mark that ends it,
    ``lower`` with a small first letter, so that a sentence can go on. ``{{`` and ``}}`` stand for braces.

    Raises:
        UserError: a brace without its partner, a field that is no plain name, an unknown form, no column, or not one mask.
    """

    def __init__(self, text: object, option: str = "template") -> None:
        if not isinstance(text, str):
            raise UserError(f"option {option!r} must be a text such as '{{sentence}} It was {{mask}}.', got {text!r}")
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"option {option!r} is no template: {error}: {text!r}; write {{{{ for a brace") from None
        for _, name, form, conversion in pieces:
            if name is None:
                continue
            if not name.isidentifier() or conversion or (name == _MASK and form):
                raise UserError(
                    f"option {option!r} names {{{name}}}; in braces stands the name of a column, perhaps with a form such as "
                    "{premise:open}, or mask"
                )
            if form and form not in _FORMS:
                raise UserError(
                    f"option {option!r} asks for the form {form!r} of column {name!r}; forms are {', '.join(_FORMS)}"
                    f"{near_matches(form, _FORMS)}"
                )
        names = [name for _, name, _, _ in pieces if name is not None]
        if names.count(_MASK) != 1:
            raise UserError(
                f"option {option!r} must have {{mask}} once, where the label word stands, and has it {names.count(_MASK)} "
                f"times: {text!r}"
            )
        self.text = text
        self.columns = tuple(dict.fromkeys(name for name in names if name != _MASK))
        """The columns that it reads, in their order."""
        if not self.columns:
            raise UserError(f"option {option!r} reads no column: {text!r}; put the name of one in braces")
        self._pieces = [(literal, name, form or "") for literal, name, form, _ in pieces]
        self._gap = next(place for place, (_, name, _) in enumerate(self._pieces) if name == _MASK)

    @property
    def lead(self) -> str:
        """What the template itself says directly before the mask."""
        return self._pieces[self._gap][0]

    @property
    def ends_with_mask(self) -> bool:
        """Whether nothing but blanks follows the mask."""
        return not any(literal.strip() or name for literal, name, _ in self._pieces[self._gap + 1 :])

    def fill(self, row: Mapping[str, str], longest: int | None = None) -> tuple[str, str]:
        """Put the row's values in place of the names, each cut to its first `longest` characters.

        Returns:
            The text before the mask, without blanks at its end, and that behind it.
        """
        filled = []
        for literal, name, form in self._pieces:
            value = "" if name in (None, _MASK) else row[str(name)]
            if form:
                value = _FORMS[form](value)
            filled.append((literal, shortened(value, longest)))
        before = "".join(literal + value for literal, value in filled[: self._gap]) + filled[self._gap][0]
        return before.rstrip(), "".join(literal + value for literal, value in filled[self._gap + 1 :])

    def fit(self, row: Mapping[str, str], fits: Callable[[str, str], bool]) -> tuple[str, str] | None:
        """Fill, with the longest values cut at their ends to one length so that the whole fits; the template stays.

        Args:
            row: the values.
            fits: of the texts before and behind the mask.

        Returns:
            The longest such texts that fit, or None if none do with all values cut away.
        """
        whole = self.fill(row)
        if fits(*whole):
            return whole
        longest = greatest_fitting(max(len(row[name]) for name in self.columns), lambda n: fits(*self.fill(row, n)))
        return None if longest is None else self.fill(row, longest)
