"""From a row to the tokens of a prompt and of the answer to it, within a number of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from turnrow.errors import UserError
from turnrow.tasks.templates import Template, choose
from turnrow.tasks.tokens import left_open

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ALPACA_PROMPTS", "Prompter", "check_chat"]

_REQUEST = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_PROMPTS = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    + _REQUEST
    + "### Input:\n{input}\n\n### Response:\n",
    "Below is an instruction that describes a task. " + _REQUEST + "### Response:\n",
)
"""The prompts of Alpaca (Taori et al. 2023), with and without an input, as columns `instruction` and `input`.

LLM-Adapters (Hu et al. 2023) has the same words, indented by the layout of its source; so has ReFT (Wu et al. 2024), whose protocol
RoAd (Liao et al. 2024) follows.
"""


def check_chat(tokenizer: PreTrainedTokenizerBase, reason: str) -> None:
    """Refuse a tokenizer that has no chat template, where `reason` asks for one."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{reason}, but the tokenizer {tokenizer.name_or_path!r} has no chat template; take a model that was tuned for "
            "conversations, set tokenizer.chat_template and save it again, or do without"
        )


@dataclass(frozen=True)
class Prompter:
    """Writes prompts, and answers to them, for one model.

    The tokens of an answer are made apart from those of its prompt, so that a model is trained on exactly the prompt that
    it later goes on with.
    """

    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Template]
    """A row takes the first all of whose columns it has a text for."""
    target: Template | None
    """The answer; None where there is none to learn."""
    decoder: bool
    """Whether the model goes on with its input; an encoder-decoder answers it."""
    chat: bool
    """Whether the prompt is a turn of a conversation, in the tokenizer's own form."""
    system: str | None = None
    """What a conversation begins with."""

    def filled(self, row: Mapping[str, str]) -> str:
        """Return a row's prompt as text, however long it is."""
        return choose(self.prompts, row).fill(row)

    def prompt(self, row: Mapping[str, str], limit: int, place: str) -> list[int]:
        """Return the tokens of a row's prompt, the longest of its texts cut to one length so that they are at most `limit`.

        Raises:
            UserError: even without any text there are more.
        """
        text = choose(self.prompts, row).fit(row, lambda filled: len(self._prompt_ids(filled)) <= limit)
        if text is None:
            raise UserError(
                f"{place}: the prompt takes more than {limit} tokens even without the texts of its columns; raise "
                "max_length, or shorten the template"
            )
        return self._prompt_ids(text)

    def example(self, row: Mapping[str, str], limit: int, place: str) -> tuple[list[int], list[int]]:
        """Return the tokens of a row's prompt and of its answer, which ends in the end-of-sequence token.

        For a decoder both together are at most `limit`, for an encoder-decoder each is. An answer is cut at its end
        only where it would leave the prompt less than half of them; then it has no end token.
        """
        assert self.target is not None
        answer = self.target.fill(row)
        if not answer.strip():
            raise UserError(f"{place}: the answer is blank, so there is nothing to learn from this row; remove it")
        ids = self.answer(row, answer)
        if not self.decoder:
            return self.prompt(row, limit, place), ids[:limit]
        whole = len(self._prompt_ids(self.filled(row)))
        ids = ids[: limit - min(whole, limit // 2)]
        return self.prompt(row, limit - len(ids), place), ids

    def _prompt_ids(self, text: str) -> list[int]:
        if self.chat:
            return self._plain_ids(self._conversation(text))
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        return left_open(self.tokenizer, ids) if self.decoder else ids

    def answer(self, row: Mapping[str, str], answer: str) -> list[int]:
        """Return the tokens of an answer to a row's prompt, with the one that ends it, however many they are."""
        if self.chat:
            question = self.filled(row)
            asked, whole = self._conversation(question), self._conversation(question, answer)
            if not whole.startswith(asked):
                raise UserError(
                    f"the chat template of the tokenizer {self.tokenizer.name_or_path!r} writes a turn otherwise once it is "
                    "answered, so a prompt cannot be told from its answer; leave option 'chat' out and write the turns into "
                    "the prompt"
                )
            return self._plain_ids(whole.removeprefix(asked))
        if not self.decoder:
            return list(self.tokenizer(text_target=answer, verbose=False)["input_ids"])
        end = self.tokenizer.eos_token_id
        return self._plain_ids(answer) + ([] if end is None else [end])

    def _plain_ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _conversation(self, question: str, answer: str | None = None) -> str:
        turns: list[dict[str, Any]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": question})
        if answer is not None:
            turns.append({"role": "assistant", "content": answer})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer is None))
