"""Label words: classes as words of the vocabulary, read off a language model's output at one place of each row.

Schick and Schütze 2021 (arXiv:2001.07676); Gao et al. 2021, LM-BFF (arXiv:2012.15723), section 4: the probability of a class is
the softmax over the label words' logits at the mask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from turnrow.errors import UserError
from turnrow.tasks.padding import IGNORED

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = ["label_classes", "label_word_ids", "label_word_logits"]


def label_word_logits(logits: torch.Tensor, labels: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """Return f = logits[row, place of the mask, words]: the outputs of a prompted classifier, also those of its kernels.

    Args:
        logits: of a masked or causal language model, of shape (rows, tokens, vocabulary). Tokens that a method put before those
            of the row (prompt tuning) are allowed.
        labels: of shape (rows, tokens): a token id at the one place that is read, `IGNORED` elsewhere.
        words: the token ids of the classes' words.

    Returns:
        Of shape (rows, classes).
    """
    import torch

    logits = logits[:, -labels.shape[1] :]
    places = (labels != IGNORED).int().argmax(dim=1)
    rows = torch.arange(len(labels), device=logits.device)
    return logits[rows, places.to(logits.device)][:, torch.as_tensor(list(words), device=logits.device)]


def label_classes(labels: torch.Tensor, words: Sequence[int]) -> torch.Tensor:
    """Return the number of the class that each row of `labels` names, of shape (rows,), int64; see `label_word_logits`."""
    import torch

    named = labels.amax(dim=1)  # token ids are at least 0, and IGNORED is not
    return (named[:, None] == torch.as_tensor(list(words), device=labels.device)).int().argmax(dim=1)


def label_word_ids(tokenizer: PreTrainedTokenizerBase, words: Mapping[str, str], lead: str = "") -> list[int]:
    """Return the token id of each class' word, as it stands in running text.

    Args:
        tokenizer: the model's.
        words: the word of each class.
        lead: what directly precedes the place of the word. If that is not a blank, the word follows without one; otherwise,
            and where a column or nothing precedes it, it is the form after a blank (``Ġgreat``), as in LM-BFF.

    Raises:
        UserError: a word is not one token, is not in the vocabulary, or is the same token as another one's.
    """
    blank = not lead or lead[-1].isspace()
    probe = "a" if blank else lead[-1]
    before = _ids(tokenizer, probe)
    found: dict[int, str] = {}
    for name, word in words.items():
        ids = _ids(tokenizer, f"{probe} {word}" if blank else probe + word)
        pieces = ids[len(before) :] if ids[: len(before)] == before else ids
        if len(pieces) != 1 or ids[: len(before)] != before:
            shown = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(pieces)))
            raise UserError(
                f"label word {word!r} of class {name!r} becomes {shown or 'no token'} in the vocabulary of "
                f"{tokenizer.name_or_path!r}, and must be a single token; choose another word"
            )
        (token,) = pieces
        if token == tokenizer.unk_token_id:
            raise UserError(
                f"label word {word!r} of class {name!r} is not in the vocabulary of {tokenizer.name_or_path!r}; choose another word"
            )
        if token in found:
            raise UserError(
                f"the label words of classes {found[token]!r} and {name!r} are the same token, "
                f"{tokenizer.convert_ids_to_tokens(token)!r}; choose words that differ"
            )
        found[token] = name
    return list(found)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
