"""Conversations about an image as tokens: those of the processor, and which of them are learned."""

from __future__ import annotations

from typing import Any

import pytest

from turnrow.errors import UserError
from turnrow.tasks.visual import VisualPrompter, last_answer, read_conversation

from .pictures import picture
from .seeing import CLOSING_TEMPLATE, TEMPLATE, llava_processor

IGNORED = -100
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
TALK = [
    ASKED,
    {"from": "gpt", "value": "a red wall"},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "yes é"},
]


def read(turns: list[dict[str, str]], has_image: bool = True) -> Any:
    return read_conversation(turns, has_image, "conversations", "row 1")


def learned(processor: Any, ids: list[int], labels: list[int]) -> list[str]:
    """The texts of the runs of tokens that are learned."""
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (IGNORED, token)
        runs[-1].append(token) if label != IGNORED else runs.append([])
    return [processor.tokenizer.decode(run) for run in runs if run]


def test_the_mark_of_the_image_becomes_a_part() -> None:
    assert read([ASKED])[0] == {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    behind = read([{"from": "user", "value": "What is it?\n<image>"}])
    assert [part["type"] for part in behind[0]["content"]] == ["text", "image"]
    assert read([{"from": "human", "value": "two\nlines\n"}], False)[0]["content"][0]["text"] == "two\nlines\n"


SYSTEM = {"from": "system", "value": "Be brief. "}


@pytest.mark.parametrize(
    ("template", "turns"),
    [
        (TEMPLATE, TALK[:2]),
        (TEMPLATE, [SYSTEM, *TALK[:2]]),
        (CLOSING_TEMPLATE, TALK),
        (CLOSING_TEMPLATE, [SYSTEM, *TALK]),
    ],
)
def test_tokens_are_those_that_the_processor_makes_itself(template: str, turns: list[dict[str, str]]) -> None:
    processor, image = llava_processor(template), picture()
    conversation = read(turns)
    asked = VisualPrompter(processor).asked(conversation, image, 500, "row 1")
    text = processor.apply_chat_template(conversation[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == processor(text=[text], images=[image])["input_ids"][0]
    assert asked.count(processor.tokenizer.convert_tokens_to_ids("<image>")) == 4


@pytest.mark.parametrize("template", [TEMPLATE, CLOSING_TEMPLATE])
def test_what_is_asked_is_what_was_learned_to_be_gone_on_with(template: str) -> None:
    prompter = VisualPrompter(llava_processor(template))
    ids, labels = prompter.answered(read(TALK), picture(), 500, "row 1")
    for turns in (TALK[:1], TALK[:3]):
        asked = prompter.asked(read(turns), picture(), 500, "row 1")
        assert ids[: len(asked)] == asked
        assert labels[len(asked) - 1] == IGNORED != labels[len(asked)]


def test_answers_alone_are_learned_each_with_an_end() -> None:
    processor = llava_processor()
    ids, labels = VisualPrompter(processor).answered(read(TALK), picture(), 500, "row 1")
    assert learned(processor, ids, labels) == [" a red wall</s>", " yes é</s>"]
    whole = processor.tokenizer.decode(ids)
    assert whole.replace("<image>", "", 3) == (
        "<s>USER: <image>\nWhat is it? ASSISTANT: a red wall</s> USER: Sure? ASSISTANT: yes é</s>"
    )


def test_where_the_template_closes_an_answer_no_end_is_added() -> None:
    processor = llava_processor(CLOSING_TEMPLATE)
    ids, labels = VisualPrompter(processor).answered(read(TALK), picture(), 500, "row 1")
    assert learned(processor, ids, labels) == ["a red wall</turn>", "yes é</turn>"]
    assert processor.tokenizer.eos_token_id not in ids


def test_a_template_that_writes_the_first_token_itself_has_it_once() -> None:
    processor = llava_processor("<s>" + TEMPLATE)
    ids = VisualPrompter(processor).asked(read([ASKED]), picture(), 500, "row 1")
    assert ids.count(processor.tokenizer.bos_token_id) == 1


def test_a_conversation_may_have_no_image() -> None:
    processor = llava_processor()
    turns = read([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], False)
    ids, labels = VisualPrompter(processor).answered(turns, None, 500, "row 1")
    assert learned(processor, ids, labels) == [" Ho</s>"]


@pytest.mark.parametrize("template", [TEMPLATE, CLOSING_TEMPLATE])
def test_what_the_assistant_opens_with_is_read_and_not_learned(template: str) -> None:
    processor, image = llava_processor(template), picture()
    opened = read([{"from": "gpt", "value": "Hello."}, *TALK[:2]])
    ids, labels = VisualPrompter(processor).answered(opened, image, 500, "row 1")
    assert [run.strip() for run in learned(processor, ids, labels)] == [
        "a red wall" + ("</s>" if template == TEMPLATE else "</turn>")
    ]
    asked = VisualPrompter(processor).asked(opened, image, 500, "row 1")
    assert ids[: len(asked)] == asked
    text = processor.apply_chat_template(opened[:-1], tokenize=False, add_generation_prompt=True)
    assert asked == processor(text=[text], images=[image])["input_ids"][0]


def test_what_follows_the_last_answer_is_left_out() -> None:
    processor = llava_processor()
    ids, _ = VisualPrompter(processor).answered(read(TALK[:3]), picture(), 500, "row 1")
    assert processor.tokenizer.decode(ids).endswith("a red wall</s>")


def test_a_last_answer_never_reaches_the_question() -> None:
    prompter = VisualPrompter(llava_processor())
    secret = [*TALK[:3], {"from": "gpt", "value": "the secret"}]
    assert prompter.asked(read(secret), picture(), 500, "row 1") == prompter.asked(
        read(TALK[:3]), picture(), 500, "row 1"
    )
    assert last_answer(read(secret)) == "the secret"
    assert last_answer(read(TALK[:3])) is None


def test_long_conversations_are_cut_at_their_end() -> None:
    prompter = VisualPrompter(llava_processor())
    ids, labels = prompter.answered(read(TALK), picture(), 500, "row 1")
    first = next(n for n, label in enumerate(labels) if label != IGNORED)
    assert prompter.answered(read(TALK), picture(), first + 3, "row 1") == (ids[: first + 3], labels[: first + 3])
    for limit in (first, 9):
        with pytest.raises(
            UserError,
            match=f"row 1: the conversation takes {len(ids)} tokens with its image, of which max_length keeps {limit}",
        ):
            prompter.answered(read(TALK), picture(), limit, "row 1")


def test_an_image_behind_the_answers_is_never_cut() -> None:
    prompter = VisualPrompter(llava_processor())
    turns = read(
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}, ASKED, {"from": "gpt", "value": "a wall"}]
    )
    ids, _ = prompter.answered(turns, picture(), 500, "row 1")
    end = len(ids) - ids[::-1].index(prompter._image_token)
    assert len(prompter.answered(turns, picture(), end, "row 1")[0]) == end
    with pytest.raises(UserError, match="hold no answer, or not the whole image"):
        prompter.answered(turns, picture(), end - 1, "row 1")


def test_a_question_too_long_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"row 1: the conversation takes \d+ tokens with its image, and there is room for 20"
    ):
        VisualPrompter(llava_processor()).asked(read([ASKED]), picture(), 20, "row 1")


@pytest.mark.parametrize(
    ("turns", "has_image", "message"),
    [
        ([{"from": "human", "value": "What?"}], True, "row 1: one <image> must stand in the conversation, since the row has an image, and there are 0"),
        ([{"from": "human", "value": "<image><image>"}], True, "has an image, and there are 2"),
        ([ASKED], False, "no <image> must stand in the conversation, since the row has none, and there are 1"),
        ([{"from": "robot", "value": "Hi"}], False, r"row 1, turn 1: a turn has 'from' \(human, user, gpt, assistant, system\) and a text 'value'"),
        ([{"from": ["human"], "value": "Hi"}], False, "row 1, turn 1"),
        ([{"from": "human", "value": None}], False, "row 1, turn 1"),
        ([ASKED, "Hi"], True, "row 1, turn 2"),
        ([], False, "column 'conversations' must hold a list of turns"),
        ("Hi", False, "must hold a list of turns"),
        (None, False, "must hold a list of turns"),
    ],
)  # fmt: skip
def test_wrong_conversations_are_refused(turns: Any, has_image: bool, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(turns, has_image)


def test_a_conversation_without_a_question_or_an_answer_is_refused() -> None:
    prompter = VisualPrompter(llava_processor())
    for turns in ([ASKED], [{"from": "gpt", "value": "<image> Hi"}, {"from": "human", "value": "Ho"}]):
        with pytest.raises(
            UserError, match="row 1: nothing is answered in this conversation, so there is nothing to learn"
        ):
            prompter.answered(read(turns), picture(), 500, "row 1")
    with pytest.raises(UserError, match="row 1: the conversation holds no question to be answered"):
        prompter.asked(read([{"from": "gpt", "value": "Hi"}], False), None, 500, "row 1")


@pytest.mark.parametrize("blank", ["", " \n", "<image>"])
def test_a_blank_answer_is_refused(blank: str) -> None:
    asked = ASKED if "<image>" not in blank else {"from": "human", "value": "What is it?"}
    turns = read([asked, {"from": "gpt", "value": blank}, *TALK[2:]])
    with pytest.raises(UserError, match="row 1: an answer of the assistant is blank, so there is nothing to learn"):
        VisualPrompter(llava_processor()).answered(turns, picture(), 500, "row 1")


def test_templates_that_do_not_do_are_refused() -> None:
    with pytest.raises(UserError, match="the processor of the model has no chat template"):
        VisualPrompter(llava_processor(None))
    blind = TEMPLATE.replace("<image>", "image")
    with pytest.raises(UserError, match="the chat template of the processor writes '<image>' 0 times for one image"):
        VisualPrompter(llava_processor(blind)).asked(read([ASKED]), picture(), 500, "row 1")
    fickle = "{{ messages | length }}" + TEMPLATE
    with pytest.raises(UserError, match="writes a turn otherwise once others follow it"):
        VisualPrompter(llava_processor(fickle)).answered(read(TALK), picture(), 500, "row 1")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UserError, match="row 1: the chat template of the processor refuses the turns user: roles must alternate"
    ):
        VisualPrompter(llava_processor(strict)).asked(read([ASKED]), picture(), 500, "row 1")
