"""From texts to token ids: the length limit, the pad token, and single texts and pairs in batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DEFAULT_MAX_LENGTH", "left_open", "ready_to_pad", "resolve_max_length", "tokenize", "tokenizer_of"]

DEFAULT_MAX_LENGTH = 512
"""Tokens per example where neither the recipe nor the tokenizer says: what BERT-like encoders can take."""

# Tokenizers that were never told a limit report 1e30.
_LARGEST_SANE_LENGTH = 1_000_000


def resolve_max_length(tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, pair: bool = False) -> int:
    """Return the number of tokens, special ones included, at which an example is cut.

    Args:
        tokenizer: its `model_max_length` is the default, unless that is the placeholder of an unset limit; then the
            default is `DEFAULT_MAX_LENGTH`.
        max_length: the wish of the user, or None. It may exceed `model_max_length`, which for models with relative
            positions (T5) is no limit; whether the model has that many positions is for the caller to check.
        pair: whether two texts are encoded together, which takes more special tokens.

    Raises:
        UserError: `max_length` is not a whole number, or leaves no room for a token of the text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length is None:
        limit = tokenizer.model_max_length
        return int(limit) if special < limit <= _LARGEST_SANE_LENGTH else DEFAULT_MAX_LENGTH
    if isinstance(max_length, bool) or not isinstance(max_length, int):
        raise UserError(f"max_length must be a whole number of tokens, got {max_length!r}")
    if max_length <= special:
        raise UserError(
            f"max_length must be larger than the {special} special tokens that the tokenizer adds to each example, "
            f"got {max_length}"
        )
    return max_length


def ready_to_pad(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, after giving it a pad token in place where it has none: its end-of-sequence token.

    Decoders are published without a pad token. A new token would need a new row in the embedding and so change the
    base model; the end-of-sequence token has a row already, and its vector is never used where it pads: the attention
    mask hides it. A model that classifies the last token finds it by `model.config.pad_token_id`, which whoever holds
    the model must set to the `pad_token_id` of the tokenizer returned here.

    Raises:
        UserError: the tokenizer has neither a pad nor an end-of-sequence token.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has neither a pad token nor an end-of-sequence token, so no "
                "batch can be padded; set one (tokenizer.pad_token = ...) and save the tokenizer again"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_of(preparer: Any) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that `Task.preparer` loaded, or that its processor holds; None of an image processor."""
    from transformers import PreTrainedTokenizerBase

    return preparer if isinstance(preparer, PreTrainedTokenizerBase) else getattr(preparer, "tokenizer", None)


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, max_length: int
) -> dict[str, list[Any]]:
    """Encode texts, or pairs of texts, cut to `max_length` tokens; of a pair the longer text is cut first.

    A tokenizer that puts nothing between the texts of a pair (GPT-2) would glue the last word of the first to the first
    word of the second; for these the second text starts with a newline.

    Returns:
        input_ids, attention_mask and, where the tokenizer makes them, token_type_ids: a list per example.
    """
    if pairs is not None and not _marks_pairs(tokenizer):
        pairs = ["\n" + text for text in pairs]
    encoded = tokenizer(
        texts, pairs, truncation="longest_first", max_length=max_length, padding=False, return_attention_mask=True
    )
    return dict(encoded)


def _marks_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)


def left_open(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Return `ids` without the tokens at their end that close a text: after them a decoder would foresee no word of it."""
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {tokenizer.bos_token_id, None}
    end = len(ids)
    while end and ids[end - 1] in closing:
        end -= 1
    return ids[:end]
