"""Templates: a text with the names of columns in braces, filled from a row, shortened to fit where it has to."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from turnrow.errors import UserError

__all__ = ["Template", "choose", "greatest_fitting", "parse_templates", "shortened"]


class Template:
    """A text with columns in braces, such as ``"Question: {question}\\nAnswer:"``; ``{{`` and ``}}`` stand for braces.

    Raises:
        UserError: no text, a brace without its partner, a field that is no plain name, or no field at all.
    """

    def __init__(self, text: object, option: str) -> None:
        if not isinstance(text, str):
            raise UserError(f"option {option!r} must be a text with names in braces, got {text!r}")
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as error:
            raise UserError(f"option {option!r} is no template: {error}: {text!r}; write {{{{ for a brace") from None
        for _, name, spec, conversion in pieces:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise UserError(
                    f"option {option!r} names {{{name}}}; in braces stands the name of a column and nothing else"
                )
        self.text = text
        self.columns = tuple(dict.fromkeys(name for _, name, _, _ in pieces if name is not None))
        """The columns that it reads, in their order."""
        if not self.columns:
            raise UserError(f"option {option!r} reads no column: {text!r}; put the name of one in braces")
        self._pieces = [(literal, name) for literal, name, _, _ in pieces]

    def fill(self, row: Mapping[str, str], longest: int | None = None) -> str:
        """Put the row's values in place of the names, each cut to its first `longest` characters."""
        return "".join(
            literal + (shortened(row[name], longest) if name is not None else "") for literal, name in self._pieces
        )

    def fit(self, row: Mapping[str, str], fits: Callable[[str], bool]) -> str | None:
        """Fill, with the longest values cut at their ends to one length so that the whole fits; what the template itself says stays.

        Args:
            row: the values.
            fits: of a filled template.

        Returns:
            The longest such text that fits, or None if none does with all values cut away.
        """
        filled = self.fill(row)
        if fits(filled):
            return filled
        longest = greatest_fitting(max(len(row[name]) for name in self.columns), lambda n: fits(self.fill(row, n)))
        return None if longest is None else self.fill(row, longest)


def shortened(text: str, longest: int | None) -> str:
    """A text, or where it has more than `longest` characters these, without blanks at the new end."""
    return text if longest is None or len(text) <= longest else text[:longest].rstrip()


def greatest_fitting(below: int, fits: Callable[[int], bool]) -> int | None:
    """The greatest number below one that does not fit, of which all smaller ones fit too; None if not even 0 does."""
    if not fits(0):
        return None
    fitting, too_many = 0, below
    while too_many - fitting > 1:
        middle = (fitting + too_many) // 2
        fitting, too_many = (middle, too_many) if fits(middle) else (fitting, middle)
    return fitting


def parse_templates(texts: str | Sequence[str], option: str) -> list[Template]:
    """Parse one template or several, of which a row takes the first all of whose columns it has a text for.

    Raises:
        UserError: see `Template`; or there is none.
    """
    given = [texts] if isinstance(texts, str) else texts
    if not given or not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise UserError(
            f"option {option!r} must be a template such as '{{question}}', or a list of them, got {texts!r}"
        )
    return [Template(text, option) for text in given]


def choose(templates: Sequence[Template], row: Mapping[str, Any]) -> Template:
    """The first template all of whose columns hold a text that is not blank; the last one if none does."""
    return next((t for t in templates if all(str(row[name]).strip() for name in t.columns)), templates[-1])
