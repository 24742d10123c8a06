"""A question and a context too long for the model: rows of the question with overlapping windows of the context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from turnrow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Frame", "Window", "window_slices"]


@dataclass(frozen=True)
class Window:
    """One row for the model."""

    input_ids: list[int]
    token_type_ids: list[int] | None
    """Where the tokenizer makes them."""
    context_start: int
    """Where the tokens of the context begin."""
    null: int
    """The place of the token that stands for 'no answer here'."""


@dataclass(frozen=True)
class Frame:
    """What a tokenizer puts before, between and after the tokens of a question and of a context.

    The token for 'no answer here' is the class token. A tokenizer without one (decoders, T5) has its end-of-sequence token
    there, which is put after the context if the tokenizer does not do so: in a decoder it alone sees the whole row.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[int, int, int, int, int] | None
    """The token type of each part, question and context included; None where the tokenizer makes none."""
    null_token: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Look at how `tokenizer` joins a pair.

        Raises:
            UserError: it does not know the place of a token in the text, or has neither class nor end-of-sequence token.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} does not tell where its tokens stand in the text, so no answer "
                "could be cut out of it; use the fast tokenizer of the model (tokenizer.json)"
            )
        null = tokenizer.eos_token_id if tokenizer.cls_token_id is None else tokenizer.cls_token_id
        if null is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has neither a class token nor an end-of-sequence token to stand "
                "for 'no answer in this window'; set one (tokenizer.cls_token = ...) and save the tokenizer again"
            )
        joined = tokenizer("a", "a")
        parts = _parts(joined.sequence_ids(0))
        ids = list(joined["input_ids"])
        before, between, after = (tuple(ids[parts[place]]) for place in (0, 2, 4))
        types = joined.get("token_type_ids")
        if not between:
            # Or the last word of the question would be glued to the first of the context.
            between = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])
        if null not in (*before, *between, *after):
            after = (*after, null)
        return cls(before, between, after, None if types is None else _types(types, parts), null)

    def room(self, max_length: int) -> int:
        """Tokens of question and context together in a row of `max_length`."""
        return max_length - len(self.before) - len(self.between) - len(self.after)

    def window(self, question: Sequence[int], context: Sequence[int]) -> Window:
        """Join the tokens of a question and of a window of a context."""
        parts = (self.before, question, self.between, context, self.after)
        ids = [token for part in parts for token in part]
        types = None
        if self.types is not None:
            types = [kind for part, kind in zip(parts, self.types, strict=True) for _ in part]
        start = len(self.before) + len(question) + len(self.between)
        if self.null_token in self.before:
            null = self.before.index(self.null_token)
        elif self.null_token in self.between:
            null = len(self.before) + len(question) + self.between.index(self.null_token)
        else:
            null = start + len(context) + self.after.index(self.null_token)
        return Window(ids, types, start, null)


def window_slices(length: int, room: int, overlap: int) -> Iterator[slice]:
    """Windows of up to `room` of `length` tokens, neighbours with `overlap` in common, half a window at most.

    The last one ends with the text, so it may be shorter. Of no tokens there is one window, which is empty.
    """
    step = room - min(overlap, room // 2)
    start = 0
    while True:
        yield slice(start, min(start + room, length))
        if start + room >= length:
            return
        start += step


def _parts(sequence_ids: Sequence[int | None]) -> list[slice]:
    """Where the five parts of a joined pair lie: special tokens, first text, special tokens, second text, special tokens."""
    first, second = ([place for place, owner in enumerate(sequence_ids) if owner == sequence] for sequence in (0, 1))
    ends = [first[0], first[-1] + 1, second[0], second[-1] + 1, len(sequence_ids)]
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _types(types: Sequence[int], parts: Sequence[slice]) -> tuple[int, int, int, int, int]:
    before, question, between, context, after = (types[part][0] if types[part] else 0 for part in parts)
    return before, question, between, context, after
