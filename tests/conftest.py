"""What all tests share: no network, fixed seeds, one thread, no display, and tokenizers small enough to read."""

from __future__ import annotations

import os

# Before anything imports the libraries that read them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tests are never timed: a busy machine is no failure.
hypothesis.settings.register_profile("turnrow", deadline=None)
hypothesis.settings.load_profile("turnrow")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

_VOCABULARY = (
    "a the cat dog bird tree house sat ran flew slept on under in to home it was good bad great awful is not very "
    "happy sad film story man woman child eats drinks plays sees hears likes hates red green blue big small old new "
    "one two three . , ! ?"
)
WORDS = _VOCABULARY.split()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tests run side by side in several processes; more threads than cores would only get in each other's way."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def real_data() -> Callable[[str, str], Path]:
    """`real_data("sst2", "test")`: the file of a public data set, where the data lie beside the repository."""

    def path(name: str, split: str) -> Path:
        file = SHARED_DATA / name / f"{split}.jsonl.gz"
        if not file.exists():
            pytest.skip(f"needs the data set {name!r} ({split}) in ../shared/data beside the repository")
        return file

    return path


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of BERT: a token per word of `WORDS`, `[CLS] a [SEP]` and `[CLS] a [SEP] b [SEP]`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {token: number for number, token in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
    )


@pytest.fixture
def tiny_decoder_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of GPT-2: bytes, an end-of-sequence token that it never adds, and no pad token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
