"""Answers found in a text that a model wrote: numbers, letters of options, labels.

The rules, the same for every model and data set:

- **Where.** After the last of the markers in the text, such as ``####`` or ``the answer is`` (case does not matter); in all of
  the text if it has none.
- **Number.** The last number of the first line there that has one, so that what follows the sentence of the answer is no part
  of it; without a marker, the last number of the text. None if there is no number.
- **Letter.** The first option letter after the marker that stands by itself, ``C``, ``(C)``, ``C)``, ``C.``; without a marker, the last one
  of the text. A capital, unless it is in brackets, so that the article *a* is no answer; an ``A`` before a lower-case word is the
  article too, but before ``is``, ``as``, ``because``, ``since``, ``and`` and ``or``. None if there is none.
- **Label.** The label there that stands by itself, in any case. None if there is none, or if there are several: a text that
  says ``true`` and ``false`` says nothing.

A number is written in the digits 0 to 9:

- commas group digits and are dropped: ``1,000``, ``12,34,567``; a comma is never a decimal point;
- a point begins decimals: ``0.5``, ``.5``; one that ends a sentence does not;
- ``3/4``, ``1,000/4`` and ``¾`` are fractions, ``1 1/2``, ``1-1/2`` and ``1½`` mixed numbers where the fraction is less than one; a fraction by
  zero is no number;
- ``6e4``, ``6 x 10^4`` and ``6×10^4`` are powers of ten, between 10^-300 and 10^300;
- a minus that touches its number, or the number's currency sign, is a sign (``-5``, ``−5``, ``-½``, ``-$5``, ``$-5``), unless what stands
  before it is a word, a number or a closing bracket (``7-5``, ``7 -5``, ``COVID-19``);
- currency signs, percent signs and units are dropped: ``$5``, ``5 €``, ``25%`` is 25, ``5kg`` is 5;
- digits within a word or an exponent are no number: ``CO2``, ``m^2``.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from fractions import Fraction

from turnrow.errors import UserError

__all__ = [
    "after_marker",
    "check_markers",
    "extract_label",
    "extract_letter",
    "extract_number",
    "named_labels",
    "numbers",
    "written",
]

# A model that repeats itself may write a number of any length, and 1e999999999 would fill the memory.
_LONGEST = 300

_VULGAR = re.compile("[¼½¾⅐-⅞]")
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}(?![0-9])|[0-9]+)"
_PLAIN = rf"{_WHOLE}(?:\.[0-9]+)?|(?<![A-Za-z])\.[0-9]+"
_NUMBER = re.compile(
    rf"""
    (?<![\w^])(?<![0-9]\.)                               # not within a word, a number or an exponent
    (?P<sign>(?<![0-9)\]}}%]\s)(?<![\w)\]}}%])-)?
    (?P<currency>[$£€¥₹]\s?)?
    (?P<inner>(?<=[$£€¥₹])-)?
    (?:
        (?:(?P<whole>{_WHOLE})[ -])?(?P<over>{_WHOLE})\s?/\s?(?P<under>{_WHOLE})(?![0-9]|\.[0-9])
      | (?P<plain>{_PLAIN})
        (?:[eE](?P<e>[+-]?[0-9]+)|\s?[x×*]\s?10\s?\^\s?\{{?(?P<power>[+-]?[0-9]+)\}}?)?
    )
    """,
    re.VERBOSE,
)


def numbers(text: str) -> list[Fraction]:
    """Return the numbers in a text, in their order, by the rules of this module."""
    text = text.replace("−", "-")
    text = _VULGAR.sub(_spelled, text)
    found = (_value(match) for match in _NUMBER.finditer(text))
    return [value for values in found for value in values]


def extract_number(text: str, markers: Sequence[str] = ()) -> Fraction | None:
    """Return the number that a text gives as its answer; None if it gives none."""
    rest, marked = after_marker(text, markers)
    for part in rest.splitlines() if marked else [rest]:
        if found := numbers(part):
            return found[-1]
    return None


def extract_letter(text: str, letters: str = "ABCDE", markers: Sequence[str] = ()) -> str | None:
    """Return the letter of the option that a text chooses, as a capital; None if it chooses none."""
    rest, marked = after_marker(text, markers)
    capitals, small = letters.upper(), letters.lower()
    # Apostrophes belong to a word: "A's", "D'Arcy".
    alone = rf"(?<![\w'’])(?!A +(?!(?:is|as|because|since|and|or)\b)[a-z])([{capitals}])(?![\w'’])"
    found = re.findall(rf"\(\s*([{capitals}{small}])\s*\)|{alone}", rest)
    return next(filter(None, found[0 if marked else -1])).upper() if found else None


def extract_label(text: str, labels: Iterable[str], markers: Sequence[str] = ()) -> str | None:
    """Return the one of `labels` that a text names; None if it names none, or several."""
    rest, _ = after_marker(text, markers)
    found = named_labels(rest, labels)
    return found.pop() if len(found) == 1 else None


def named_labels(text: str, labels: Iterable[str]) -> set[str]:
    """Return those of `labels` that stand in a text by themselves, in any case."""
    known = {label.casefold(): label for label in labels}
    # The longest first, or "New" would be found in "New York".
    either = "|".join(re.escape(label) for label in sorted(known, key=len, reverse=True))
    return {known[name] for name in re.findall(rf"(?<!\w)(?:{either})(?!\w)", text.casefold())}


def check_markers(markers: object) -> None:
    """Refuse an option 'markers' that is no list of texts."""
    if not isinstance(markers, list | tuple) or not all(isinstance(marker, str) and marker for marker in markers):
        raise UserError(f"option 'markers' must be a list of texts such as ['the answer is'], got {markers!r}")


def after_marker(text: str, markers: Sequence[str]) -> tuple[str, bool]:
    """Return what follows the last of `markers` in a text, and True; the whole text, and False, if it has none."""
    ends = [match.end() for marker in markers for match in re.finditer(re.escape(marker), text, re.IGNORECASE)]
    return (text[max(ends) :], True) if ends else (text, False)


def written(value: Fraction) -> str:
    """Write a number as people do: ``18``, ``9.8``, and as a fraction where decimals do not end, ``11/6``."""
    rest = value.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    if rest != 1:
        return str(value)
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = f"{abs(value.numerator * 10**places // value.denominator):0{places + 1}d}"
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    return ("-" if value < 0 else "") + whole + ("." + decimals if decimals else "")


def _spelled(vulgar: re.Match[str]) -> str:
    """``½`` as ``1/2``, with a blank between it and a whole number, but none between it and its sign."""
    signed = vulgar.string.endswith("-", 0, vulgar.start())
    return ("" if signed else " ") + unicodedata.normalize("NFKC", vulgar[0]).replace("⁄", "/")


def _value(match: re.Match[str]) -> list[Fraction]:
    """The number of a match; two where a whole number stands before a fraction that is no part of it; none if it is none."""
    if len(match[0]) > _LONGEST:
        return []
    sign = -1 if match["sign"] or match["inner"] else 1
    if match["under"] is None:
        exponent = int(match["e"] or match["power"] or 0)
        if abs(exponent) > _LONGEST:
            return []
        return [sign * Fraction(match["plain"].replace(",", "")) * Fraction(10) ** exponent]
    over, under = _grouped(match["over"]), _grouped(match["under"])
    whole = [] if match["whole"] is None else [Fraction(_grouped(match["whole"]))]
    if under == 0:
        return [sign * value for value in whole]
    if whole and over < under:
        return [sign * (whole[0] + Fraction(over, under))]
    return [sign * value for value in [*whole, Fraction(over, under)]]


def _grouped(digits: str) -> int:
    return int(digits.replace(",", ""))
