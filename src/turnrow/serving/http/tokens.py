"""Single tokens as OpenAI's API shows them beside their log-probabilities: a text, and the bytes that it stands for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["TokenText", "TokenTexts"]

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenText:
    """A token."""

    text: str
    """Where the bytes are no whole characters, ``bytes:\\x..`` for each."""
    data: bytes
    is_special: bool
    """It is no part of an answer's text."""


class TokenTexts:
    """What the tokens of a tokenizer are; each is looked at once.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._added = frozenset(tokenizer.get_added_vocab().values())
        self._kind = _kind(tokenizer)
        self._known: dict[int, TokenText] = {}

    def __getitem__(self, token_id: int) -> TokenText:
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._look(token_id)
        return known

    def _look(self, token_id: int) -> TokenText:
        token = self._tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self._tokenizer) else None
        if token is None:  # models have more rows than tokens, to fill up
            return TokenText(f"<{token_id}>", b"", True)
        data = self._bytes(token_id, token)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        return TokenText(text, data, token_id in self._special)

    def _bytes(self, token_id: int, token: str) -> bytes:
        if token_id in self._special or token_id in self._added:
            return token.encode()
        if self._kind == "bytes" and all(character in _BYTES for character in token):
            return bytes(_BYTES[character] for character in token)
        if self._kind == "pieces":
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("\u2581", " ").encode()
        return self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False).encode()


def _kind(tokenizer: Any) -> str:
    """How tokens are written: by bytes in the manner of GPT-2, in pieces of SentencePiece, or in another way."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return "other"
    described = decoder.__getstate__().decode()
    if '"ByteLevel"' in described:
        return "bytes"
    return "pieces" if '"ByteFallback"' in described or "\u2581" in described else "other"


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2 writes a byte that is no visible character of Latin-1 as one of the characters from 256 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _bytes_of_characters()
