"""A decoder's tokenizer with words for tokens, and rows of sums to be told."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast


@pytest.fixture
def closing_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama: a token per character, `<s>` before each text, `</s>` to end one, no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
