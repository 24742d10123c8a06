"""Conversations: what is learned of them, what is asked, and what is left out of long ones."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from turnrow.errors import UserError
from turnrow.tasks.conversations import answered_conversation, asked_conversation, read_turns

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    told = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return told if system is None else [{"role": "system", "content": system}, *told]


@pytest.fixture
def tokenizer(closing_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    closing_tokenizer.chat_template = CHAT
    return closing_tokenizer


def test_all_that_the_assistant_says_is_learned_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = answered_conversation(tokenizer, turns("hi", "hö", "more", "ok", system="be kind"), 200, "row 1")
    whole = "<system>be kind</s>\n<user>hi</s>\n<assistant>hö</s>\n<user>more</s>\n<assistant>ok</s>\n"
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode([label for label in labels if label != -100]) == "hö</s>\nok</s>\n"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_what_is_learned_is_what_a_template_that_marks_it_says(tokenizer: PreTrainedTokenizerFast) -> None:
    # transformers' own masks, of a template with generation blocks.
    marked = CHAT.replace(
        "<{{ m['role'] }}>{{ m['content'] }}</s>\n",
        "<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>\n{% endgeneration %}"
        "{% else %}{{ m['content'] }}</s>\n{% endif %}",
    )
    spoken = turns("hi", "hey", "more", "ok")
    ids, labels = answered_conversation(tokenizer, spoken, 200, "row 1")
    theirs: Any = tokenizer.apply_chat_template(
        spoken, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert ids == theirs["input_ids"]
    assert [int(label != -100) for label in labels] == theirs["assistant_masks"]


def test_what_follows_the_last_answer_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = turns("hi", "hey", "more")
    assert answered_conversation(tokenizer, spoken, 200, "") == answered_conversation(tokenizer, spoken[:2], 200, "")


def test_the_answer_that_is_asked_for_is_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = asked_conversation(tokenizer, turns("hi", "hey", "more", "SECRET"), 200, "row 1")
    assert tokenizer.decode(ids) == "<user>hi</s>\n<assistant>hey</s>\n<user>more</s>\n<assistant>"
    assert ids == asked_conversation(tokenizer, turns("hi", "hey", "more"), 200, "row 1")


def test_of_a_long_conversation_the_oldest_exchanges_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = turns("one", "1", "two", "2", "three", "3", system="s")
    ids, labels = answered_conversation(tokenizer, spoken, 70, "row 1")
    assert (
        tokenizer.decode(ids) == "<system>s</s>\n<user>two</s>\n<assistant>2</s>\n<user>three</s>\n<assistant>3</s>\n"
    )
    assert tokenizer.decode([label for label in labels if label != -100]) == "2</s>\n3</s>\n"
    asked = asked_conversation(tokenizer, spoken, 40, "row 1")
    assert tokenizer.decode(asked) == "<system>s</s>\n<user>three</s>\n<assistant>"


@pytest.mark.parametrize("opening", [["hello"], ["hello", ""]])
def test_what_the_assistant_opens_with_is_read_and_not_learned(
    tokenizer: PreTrainedTokenizerFast, opening: list[str]
) -> None:
    opened = [*({"role": "assistant", "content": content} for content in opening), *turns("hi", "hey")]
    ids, labels = answered_conversation(tokenizer, opened, 200, "row 1")
    written = "".join(f"<assistant>{content}</s>\n" for content in opening)
    assert tokenizer.decode(ids) == f"{written}<user>hi</s>\n<assistant>hey</s>\n"
    assert tokenizer.decode([label for label in labels if label != -100]) == "hey</s>\n"
    asked = asked_conversation(tokenizer, opened, 200, "row 1")
    assert ids[: len(asked)] == asked
    assert labels[len(asked) - 1] == -100 != labels[len(asked)]


def test_an_opening_is_the_oldest_of_a_long_conversation(tokenizer: PreTrainedTokenizerFast) -> None:
    opened = [{"role": "assistant", "content": "h" * 50}, *turns("hi", "hey")]
    assert answered_conversation(tokenizer, opened, 40, "") == answered_conversation(tokenizer, opened[1:], 40, "")
    assert asked_conversation(tokenizer, opened, 40, "") == asked_conversation(tokenizer, opened[1:], 40, "")


def test_several_answers_stay_with_their_question(tokenizer: PreTrainedTokenizerFast) -> None:
    first, second = (
        [{"role": "user", "content": question}, *({"role": "assistant", "content": answer} for answer in answers)]
        for question, answers in (("one", ["1", "I"]), ("two", ["2", "II"]))
    )
    ids, labels = answered_conversation(tokenizer, first + second, 70, "row 1")
    assert tokenizer.decode(ids) == "<user>two</s>\n<assistant>2</s>\n<assistant>II</s>\n"
    assert tokenizer.decode([label for label in labels if label != -100]) == "2</s>\nII</s>\n"


def test_of_several_answers_that_are_too_long_together_the_last_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = [*turns("hi", "a" * 80), {"role": "assistant", "content": "yes"}]
    ids, labels = answered_conversation(tokenizer, spoken, 60, "row 1")
    assert tokenizer.decode(ids) == "<user>hi</s>\n<assistant>" + "a" * 21 + "</s>\n<assistant>yes</s>\n"
    assert tokenizer.decode([label for label in labels if label != -100]) == "yes</s>\n"
    assert len(ids) == 60


def test_of_a_long_message_the_end_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, labels = answered_conversation(tokenizer, turns("q" * 100, "yes"), 50, "row 1")
    assert len(ids) == 50
    assert tokenizer.decode(ids) == "<user>" + "q" * 26 + "</s>\n<assistant>yes</s>\n"
    assert (
        tokenizer.decode(asked_conversation(tokenizer, turns("q" * 100), 30, ""))
        == "<user>" + "q" * 11 + "</s>\n<assistant>"
    )
    # Both are long: each gets half, and the answer then has no end.
    ids, labels = answered_conversation(tokenizer, turns("q" * 100, "a" * 100), 60, "row 1")
    assert tokenizer.decode(ids) == "<user>" + "q" * 11 + "</s>\n<assistant>" + "a" * 30
    assert labels == [-100] * 30 + ids[30:]


def test_where_two_messages_are_long_both_are_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    spoken = [{"role": "system", "content": "s" * 90}, *turns("q" * 100)]
    asked = tokenizer.decode(asked_conversation(tokenizer, spoken, 50, "row 1"))
    assert asked == "<system>" + "s" * 10 + "</s>\n<user>" + "q" * 10 + "</s>\n<assistant>"


def test_what_never_fits_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="row 3: the conversation takes more than 15 tokens even without its messages"):
        asked_conversation(tokenizer, turns("hi"), 15, "row 3")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "row 1: column 'messages' must hold a list of messages, got \\[\\]"),
        (None, "must hold a list of messages, got None"),
        ("hi", "must hold a list of messages, got 'hi'"),
        (["hi"], "row 1, message 1: a message is an object with the texts 'role' and 'content', got 'hi'"),
        ([{"role": "user", "content": None}], "message 1: a message is an object"),
        ([{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}], "message 2: a message is an object"),
    ],
)
def test_what_are_no_messages_is_refused(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_turns(value, "messages", "row 1")


def test_conversations_without_an_answer_or_a_question_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for unanswered in (turns("hi"), [{"role": "assistant", "content": "hey"}]):
        with pytest.raises(UserError, match="row 1: nothing is answered in this conversation"):
            answered_conversation(tokenizer, unanswered, 100, "row 1")
    with pytest.raises(UserError, match="row 1: an answer of the assistant is blank"):
        answered_conversation(tokenizer, turns("hi", " "), 100, "row 1")
    for nothing in ([{"role": "assistant", "content": "hey"}], [{"role": "system", "content": "s"}]):
        with pytest.raises(UserError, match="row 1: the conversation holds no message to be answered"):
            asked_conversation(tokenizer, nothing, 100, "row 1")


def test_an_empty_message_is_one(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.decode(asked_conversation(tokenizer, turns(""), 100, "")) == "<user></s>\n<assistant>"


def test_what_a_template_refuses_is_reported_with_its_row(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    )
    with pytest.raises(UserError, match="row 7: the chat template .* refuses the turns system, user: System role not"):
        asked_conversation(tokenizer, turns("hi", system="s"), 100, "row 7")


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    # As templates do that drop the thoughts of all answers but the last.
    tokenizer.chat_template = CHAT.replace("{{ m['content'] }}", "{{ m['content'] if loop.last else 'x' }}")
    with pytest.raises(UserError, match="writes a turn otherwise once others follow it"):
        answered_conversation(tokenizer, turns("hi", "hey", "more", "ok"), 100, "row 1")
