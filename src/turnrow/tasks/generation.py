"""Tasks whose answer is a text that the model writes: the prompt, the answer to learn, and how the model goes on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeGuard

from turnrow.errors import UserError, near_matches
from turnrow.tasks.columns import describe_split, require_columns
from turnrow.tasks.encoding import encode_rows
from turnrow.tasks.padding import IGNORED, LanguageCollator
from turnrow.tasks.prompts import Prompter, check_chat
from turnrow.tasks.task import Task
from turnrow.tasks.templates import Template, parse_templates
from turnrow.tasks.tokens import resolve_max_length

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["GenerationTask", "checked_generation", "refuse_empty", "room_for_prompt", "room_to_go_on"]

# Those of transformers' GenerationConfig that would change what the run hands back, or that the tokenizer decides.
_RESERVED = (
    "max_length", "num_return_sequences", "return_dict_in_generate", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "pad_token_id", "bos_token_id", "transformers_version",
)  # fmt: skip


@dataclass(kw_only=True)
class GenerationTask(Task):
    """A task whose answer is a text: a decoder goes on with a prompt, an encoder-decoder answers it.

    What is scored against never reaches the prompt: a prompt may not name the columns of the answer, and rows to be
    predicted hold the prompt alone.
    """

    mean_loss: ClassVar[bool] = False

    prompt: str | list[str]
    """The prompt, with columns in braces: ``"Summarize: {document}"``. Of several, a row takes the first all of whose columns it
    has a text for. Where a prompt is too long, the longest texts in it are cut, never the template."""
    target: str
    """What is learned as the answer, in the same form."""
    architecture: Literal["decoder", "encoder-decoder"] = "decoder"
    """What kind of model it is: one that goes on with its input, or one that reads it and then writes."""
    chat: bool = False
    """Put the prompt into the form in which the tokenizer writes conversations."""
    system: str | None = None
    """With `chat`: what a conversation begins with."""
    generation: dict[str, Any] = field(default_factory=dict)
    """How the model goes on, in the words of transformers' GenerationConfig, such as ``{max_new_tokens: 60, num_beams: 4}``.
    Greedy unless it says otherwise."""

    default_new_tokens: ClassVar[int] = 128
    """Tokens of an answer where `generation` does not say."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture not in ("decoder", "encoder-decoder"):
            raise UserError(
                f"option 'architecture' must be 'decoder' or 'encoder-decoder', got {self.architecture!r}"
                f"{near_matches(str(self.architecture), ['decoder', 'encoder-decoder'])}"
            )
        if not isinstance(self.chat, bool):
            raise UserError(f"option 'chat' must be true or false, got {self.chat!r}")
        if self.system is not None and not (self.chat and isinstance(self.system, str)):
            raise UserError(
                f"option 'system' is a text that a conversation begins with (chat: true), got {self.system!r}"
            )
        self.generation = {"max_new_tokens": self.default_new_tokens, **checked_generation(self.generation)}
        templates = self._templates
        answers = {*self._target.columns, *self.gold_columns()}
        for template in templates:
            if leaked := answers & set(template.columns):
                raise UserError(
                    f"option 'prompt' names {', '.join(sorted(leaked))}, where the answer stands: the model would read what it is "
                    "to write"
                )

    @property
    def auto_model(self) -> str:
        """The Auto class of the architecture."""
        return "AutoModelForCausalLM" if self.architecture == "decoder" else "AutoModelForSeq2SeqLM"

    @property
    def peft_task_type(self) -> str:
        """peft's name of the architecture."""
        return "CAUSAL_LM" if self.architecture == "decoder" else "SEQ_2_SEQ_LM"

    @abstractmethod
    def gold_columns(self) -> list[str]:
        """Return the columns that an answer is scored against."""

    def columns(self) -> list[str]:
        """Return the columns of the prompt, of the answer to learn, and of what is scored against."""
        return list(dict.fromkeys([*self.input_columns(), *self._target.columns, *self.gold_columns()]))

    def input_columns(self) -> list[str]:
        """The columns without which there is no prompt."""
        return list(self._templates[-1].columns)

    def generates(self, split: str) -> bool:
        """All but the training split is answered by the model."""
        return split != "train"

    def generation_options(self) -> dict[str, Any]:
        """Return the option `generation`, complete."""
        return dict(self.generation)

    def fit(self, train: Dataset) -> None:
        """Check that the training split has the columns; there is nothing to learn."""
        require_columns(train, [*self.input_columns(), *self._target.columns], "train")

    def model_kwargs(self) -> dict[str, Any]:
        """Nothing: the model keeps its own head."""
        return {}

    def encode(
        self, data: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None, *, split: str
    ) -> Dataset:
        """Encode prompts with their answers, or, of a split that is answered by the model, prompts and gold columns.

        `max_length` is for a prompt together with its answer; of an encoder-decoder for each. See `Task.encode`.
        """
        answered = self.generates(split)
        gold = self.gold_columns() if answered and split != "predict" else []
        wanted = [*self.input_columns(), *([] if answered else self._target.columns), *gold]
        require_columns(data, list(dict.fromkeys(wanted)), split)
        prompter = self._prompter(tokenizer, learned=not answered)
        limit = resolve_max_length(tokenizer, max_length)
        if answered and prompter.decoder:
            limit = room_for_prompt(limit, self.generation)

        def encode_row(row: dict[str, Any], number: int) -> dict[str, Any]:
            place = f"{describe_split(data, split)}, row {number + 1}"
            values = self._texts(row, place)
            if answered:
                ids = prompter.prompt(values, limit, place)
                refuse_empty(ids, place)
                return {"input_ids": ids, "attention_mask": [1] * len(ids)}
            ids, answer = prompter.example(values, limit, place)
            if not prompter.decoder:
                return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": answer}
            refuse_empty(ids, place)
            return {
                "input_ids": ids + answer,
                "attention_mask": [1] * (len(ids) + len(answer)),
                "labels": [IGNORED] * len(ids) + answer,
            }

        return encode_rows(data, encode_row, split, keep=gold)

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that pads a batch to its longest row."""
        return LanguageCollator(tokenizer, decoder=self.architecture == "decoder")

    def _prompter(self, tokenizer: PreTrainedTokenizerBase, *, learned: bool) -> Prompter:
        """What writes the prompts and, where they are `learned`, the answers."""
        if self.chat:
            check_chat(tokenizer, "option 'chat' is true")
        return Prompter(
            tokenizer,
            self._templates,
            self._target if learned else None,
            self.architecture == "decoder",
            self.chat,
            self.system,
        )

    def _texts(self, row: Mapping[str, Any], place: str) -> dict[str, str]:
        """The row's values of all columns that the templates name, as they stand there."""
        names = {name for template in (*self._templates, self._target) for name in template.columns}
        return {name: _text(row.get(name), name, place) for name in names}

    # Parsed once: every row asks for them.
    @cached_property
    def _templates(self) -> list[Template]:
        return parse_templates(self.prompt, "prompt")

    @cached_property
    def _target(self) -> Template:
        return Template(self.target, "target")


def room_for_prompt(limit: int, generation: Mapping[str, Any]) -> int:
    """Return how many of `limit` tokens the longest answer leaves to a prompt, or refuse to leave none."""
    answer = generation["max_new_tokens"]
    if limit <= answer:
        raise UserError(
            f"max_length is {limit}, and the answer may take generation.max_new_tokens = {answer} of them, which leaves "
            "nothing for the prompt; raise max_length or lower max_new_tokens"
        )
    return limit - int(answer)


def room_to_go_on(limit: int, positions: int | None, generation: Mapping[str, Any]) -> int:
    """Return the tokens of a prompt of up to `limit` tokens and of the longest answer to it, as far as the model has positions.

    For tasks that learn from a prompt with its answer within `limit`, and let the model go on only with what is predicted.
    """
    answer = int(generation["max_new_tokens"])
    if positions is None:
        return limit + answer
    if positions <= answer:
        raise UserError(
            f"the model has {positions} positions, and an answer that it is asked for may take task.generation.max_new_tokens = {answer} "
            "of them, which leaves nothing for the prompt; lower max_new_tokens"
        )
    return min(limit + answer, positions)


def checked_generation(options: object) -> dict[str, Any]:
    """Return the option `generation`, after a look whether transformers' GenerationConfig takes it (UserError)."""
    from transformers import GenerationConfig

    if not isinstance(options, Mapping):
        raise UserError(f"option 'generation' must be a mapping such as {{max_new_tokens: 60}}, got {options!r}")
    known = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name not in _RESERVED]
    for name, value in options.items():
        if name in _RESERVED:
            raise UserError(f"generation.{name} is decided by the run; leave it out")
        if name not in known:
            raise UserError(
                f"generation has no option {name!r}; it takes those of transformers' GenerationConfig"
                f"{near_matches(str(name), known)}"
            )
        if name in ("max_new_tokens", "num_beams") and not (_is_count(value) and value >= 1):
            raise UserError(f"generation.{name} must be a whole number from 1, got {value!r}")
        if value is None:
            continue
        if name in ("top_k", "no_repeat_ngram_size", "min_new_tokens") and not (_is_count(value) and value >= 0):
            raise UserError(f"generation.{name} must be a whole number from 0, got {value!r}")
        if name in ("temperature", "top_p", "repetition_penalty") and not (_is_number(value) and value > 0):
            raise UserError(f"generation.{name} must be a number above 0, got {value!r}")
        if name == "length_penalty" and not _is_number(value):
            raise UserError(f"generation.{name} must be a number, got {value!r}")
    try:
        GenerationConfig(**options).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"generation is {dict(options)!r}, and transformers says: {' '.join(str(error).split())}"
        ) from error
    return dict(options)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_empty(ids: list[int], place: str) -> None:
    """Refuse a prompt without a single token."""
    if not ids:
        raise UserError(f"{place}: the prompt is empty, so the model would have nothing to go on with; remove the row")


def _text(value: object, column: str, place: str) -> str:
    """The value as it stands in a prompt; a missing one is empty."""
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise UserError(
            f"{place}: column {column!r} must hold a text or a number, got {value!r} ({type(value).__name__})"
        )
    return str(value)
