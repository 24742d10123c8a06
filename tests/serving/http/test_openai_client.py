"""The official client, answered as the engine alone would answer, in the forms that the client knows."""

from __future__ import annotations

import asyncio
import math

import pytest

from turnrow.serving import BASE, Request, Sampling

pytest.importorskip("fastapi", reason="needs the extra [serve]")
openai = pytest.importorskip("openai", reason="needs the official client")

PROMPT = "Call me Ishmael"
GREEDY = {"temperature": 0, "max_tokens": 12}
MODELS = ["base", "rows", "road1", "lora"]


@pytest.fixture
def client(shared):
    with shared.client(openai.OpenAI) as client:
        yield client


@pytest.fixture
def alone(shared):
    """`alone(text, adapter=...)`: the engine's own answers."""

    def ask(prompt, **settings):
        ids = shared.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
        settings.setdefault("sampling", Sampling(temperature=0))
        settings.setdefault("max_tokens", 12)
        return shared.engine.submit(Request(ids, **settings)).result(30)

    return ask


@pytest.mark.parametrize("model", MODELS)
def test_completions_are_those_of_the_engine(client, alone, model):
    done = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    (expected,) = alone(PROMPT, adapter=model)
    assert done.choices[0].text == expected.text
    assert done.choices[0].finish_reason == "length"
    assert done.choices[0].logprobs is None
    assert (done.object, done.model) == ("text_completion", model)
    assert done.usage.to_dict() == {"prompt_tokens": 15, "completion_tokens": 12, "total_tokens": 27}
    assert ("adapter" in done.system_fingerprint) == (model != BASE)


def test_adapters_differ_so_that_the_right_one_is_seen(client):
    texts = {client.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text for model in MODELS}
    assert len(texts) == len(MODELS)


def test_the_base_answers_to_its_own_name_too(client):
    done = [client.completions.create(model=name, prompt=PROMPT, **GREEDY) for name in ("base", "org/tiny-llama")]
    assert done[0].choices[0].text == done[1].choices[0].text
    assert done[1].model == "org/tiny-llama"


@pytest.mark.parametrize("model", MODELS)
def test_chats_are_put_by_the_template(client, alone, model):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "who "}, {"type": "text", "text": "are you"}]},
    ]
    done = client.chat.completions.create(model=model, messages=messages, temperature=0, max_completion_tokens=9)
    (expected,) = alone("[system]be brief[user]who are you[assistant]", adapter=model, max_tokens=9)
    assert done.choices[0].message.content == expected.text
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.tool_calls is None
    assert done.object == "chat.completion"
    assert done.usage.prompt_tokens == 44


def test_a_chat_that_sets_no_length_goes_on_to_the_end_of_the_context(client, shared):
    done = client.chat.completions.create(model="rows", messages=[{"role": "user", "content": "hi"}], temperature=0)
    assert done.usage.total_tokens == shared.engine.max_length
    assert done.choices[0].finish_reason == "length"


@pytest.mark.parametrize("model", ["base", "road1"])
def test_streams_say_the_same_in_pieces(client, model):
    whole = client.completions.create(model=model, prompt=PROMPT, **GREEDY)
    chunks = list(
        client.completions.create(
            model=model, prompt=PROMPT, **GREEDY, stream=True, stream_options={"include_usage": True}
        )
    )
    *pieces, last = chunks
    assert len(pieces) > 3
    assert "".join(chunk.choices[0].text for chunk in pieces) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in pieces)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert len({chunk.id for chunk in chunks}) == 1


def test_streamed_chats_begin_with_the_role_and_end_with_the_reason(client):
    asked = {"model": "lora", "messages": [{"role": "user", "content": "hi"}], **GREEDY}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert chunks[-1].choices[0].delta.content is None
    assert all(chunk.object == "chat.completion.chunk" and chunk.usage is None for chunk in chunks)


def test_no_stream_ends_within_a_character(client, shared):
    text = "\u00e9\u4e16\U0001f600" * 2
    bias = {str(token): 0 for token in shared.tokenizer(text)["input_ids"]}
    pieces = [
        chunk.choices[0].text
        for chunk in client.completions.create(
            model="base", prompt=text, max_tokens=60, stream=True, seed=3, logit_bias=dict.fromkeys(bias, 50)
        )
    ]
    assert any(ord(character) > 127 and character != "\ufffd" for piece in pieces for character in piece)
    whole = client.completions.create(
        model="base", prompt=text, max_tokens=60, seed=3, logit_bias=dict.fromkeys(bias, 50)
    )
    assert "".join(pieces) == whole.choices[0].text


def test_many_clients_at_once_get_what_they_would_get_alone(shared, alone):
    async def ask():
        async with shared.client(openai.AsyncOpenAI) as client:

            async def one(number):
                model = MODELS[number % 4]
                if number % 2:
                    done = await client.completions.create(model=model, prompt=f"{PROMPT} {number}", **GREEDY)
                    return done.choices[0].text
                stream = await client.completions.create(
                    model=model, prompt=f"{PROMPT} {number}", **GREEDY, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, range(16)))

    texts = asyncio.run(ask())
    for number, text in enumerate(texts):
        assert text == alone(f"{PROMPT} {number}", adapter=MODELS[number % 4])[0].text


def test_prompts_may_be_texts_or_tokens_one_or_many(client, shared):
    texts = [PROMPT, "It was a"]
    tokens = [shared.tokenizer(text)["input_ids"] for text in texts]
    each = [client.completions.create(model="rows", prompt=text, **GREEDY).choices[0].text for text in texts]
    for prompt in (texts, tokens):
        done = client.completions.create(model="rows", prompt=prompt, **GREEDY)
        assert [choice.text for choice in done.choices] == each
        assert [choice.index for choice in done.choices] == [0, 1]
        assert done.usage.prompt_tokens == sum(map(len, tokens))
        assert done.usage.completion_tokens == 24
    assert client.completions.create(model="rows", prompt=tokens[0], **GREEDY).choices[0].text == each[0]


def test_seeds_give_the_same_answers_and_each_of_n_another(client, alone):
    asked = {"model": "road1", "prompt": PROMPT, "max_tokens": 8, "seed": 11, "n": 3, "temperature": 0.9}
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == 3
    expected = alone(PROMPT, adapter="road1", max_tokens=8, n=3, sampling=Sampling(temperature=0.9, seed=11))
    assert [c.text for c in first.choices] == [answer.text for answer in expected]
    assert client.completions.create(**asked | {"seed": 12}).choices[0].text != first.choices[0].text


def test_choices_of_many_prompts_are_numbered_through_also_in_streams(client):
    asked = {"model": "lora", "prompt": [PROMPT, "It was a"], "max_tokens": 6, "seed": 2, "n": 2}
    whole = client.completions.create(**asked)
    each = [client.completions.create(**asked | {"prompt": prompt}).choices for prompt in asked["prompt"]]
    assert [choice.text for choice in whole.choices] == [choice.text for own in each for choice in own]
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]


def said(tokens: list[str]) -> str:
    """The text of tokens, some of which are bytes that are no whole characters."""
    parts = [
        bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if token.startswith("bytes:") else token.encode()
        for token in tokens
    ]
    return b"".join(parts).decode("utf-8", "replace").rstrip("\ufffd")


SETTINGS = [
    ({"top_p": 0.7}, {}),
    ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {}),
    ({}, {"top_k": 3}),
    ({}, {"min_p": 0.5, "repetition_penalty": 1.7}),
    ({"logit_bias": {"40": 100}}, {}),
]


@pytest.mark.parametrize(("fields", "extra"), SETTINGS)
def test_settings_reach_the_engine(client, alone, fields, extra):
    done = client.completions.create(
        model="rows", prompt=PROMPT, max_tokens=10, seed=5, temperature=1.3, **fields, extra_body=extra
    )
    wanted = {**fields, **extra}
    if "logit_bias" in wanted:
        wanted["logit_bias"] = {40: 100}
    sampling = Sampling(temperature=1.3, seed=5, **wanted)
    expected = alone(PROMPT, adapter="rows", max_tokens=10, sampling=sampling)[0].text
    assert done.choices[0].text == expected
    plain = alone(PROMPT, adapter="rows", max_tokens=10, sampling=Sampling(temperature=1.3, seed=5))[0].text
    assert expected != plain


def test_top_k_of_minus_one_is_all(client):
    asked = {"model": "base", "prompt": PROMPT, "seed": 1, "max_tokens": 6}
    assert (
        client.completions.create(**asked, extra_body={"top_k": -1}).choices[0].text
        == client.completions.create(**asked).choices[0].text
    )


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_and_tokens_end_an_answer_and_are_no_part_of_it(client, shared, alone, stream):
    letters = shared.tokenizer("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    bias = dict.fromkeys(letters, 60)
    whole = alone(PROMPT, adapter="rows", sampling=Sampling(temperature=0.9, seed=4, logit_bias=bias))[0]
    assert whole.text.isalpha()
    stop = whole.text[5:8]
    asked = {"model": "rows", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "seed": 4, "logprobs": 0}
    asked |= {"stream": stream, "logit_bias": {str(token): value for token, value in bias.items()}}

    def ask(**more):
        done = client.completions.create(**asked, **more)
        chunks = list(done) if stream else [done]
        shown = [token for chunk in chunks for token in chunk.choices[0].logprobs.tokens]
        return "".join(chunk.choices[0].text for chunk in chunks), shown, chunks[-1].choices[0].finish_reason

    before = whole.text[: whole.text.find(stop)]
    for given in (stop, ["never to be seen", stop]):
        text, shown, reason = ask(stop=given)
        assert (text, reason) == (before, "stop")
        assert "".join(shown) == text  # and no token that belongs to the stop string alone
    place = whole.token_ids.index(whole.token_ids[6])
    text, shown, reason = ask(extra_body={"stop_token_ids": [whole.token_ids[6]]})
    assert reason == "stop"
    assert len(shown) == place
    assert text == "".join(shown)


def test_log_probabilities_of_completions_are_in_the_old_form(client, alone):
    done = client.completions.create(model="road1", prompt=PROMPT, **GREEDY, logprobs=3)
    (expected,) = alone(PROMPT, adapter="road1", logprobs=3)
    found = done.choices[0].logprobs
    assert found.token_logprobs == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)
    assert any(token.startswith("bytes:") for token in found.tokens)
    assert said(found.tokens) == done.choices[0].text.rstrip("\ufffd")
    assert found.text_offset[0] == 0
    for offset, token in zip(found.text_offset, found.tokens, strict=True):
        assert token.startswith("bytes:") or done.choices[0].text[offset:].startswith(token)
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert len(top) == 3
        assert max(top.values()) == top[token] == logprob
    alone_in_it = client.completions.create(model="road1", prompt=PROMPT, **GREEDY, logprobs=0).choices[0].logprobs
    assert [list(top) for top in alone_in_it.top_logprobs] == [[token] for token in found.tokens]


def test_the_token_that_was_chosen_is_always_among_the_top(client):
    done = client.completions.create(
        model="base", prompt=PROMPT, max_tokens=40, temperature=0.2, seed=1, logprobs=1
    ).choices[0]
    assert {len(top) for top in done.logprobs.top_logprobs} == {1, 2}
    assert all(token in top for token, top in zip(done.logprobs.tokens, done.logprobs.top_logprobs, strict=True))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_chats_are_in_the_new_form(client, alone, stream):
    asked = {"model": "lora", "messages": [{"role": "user", "content": "hi"}], **GREEDY}
    done = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=stream)
    chunks = list(done) if stream else [done]
    found = [one for chunk in chunks if (own := chunk.choices[0].logprobs) for one in own.content]
    (expected,) = alone("[user]hi[assistant]", adapter="lora", logprobs=2)
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in expected.logprobs], abs=1e-5)
    data = b"".join(bytes(one.bytes) for one in found)
    assert data.decode("utf-8", "replace").rstrip("\ufffd") == expected.text.rstrip("\ufffd")
    assert said([one.token for one in found]) == expected.text.rstrip("\ufffd")
    for one in found:
        assert [top.logprob for top in one.top_logprobs] == sorted((t.logprob for t in one.top_logprobs), reverse=True)
        assert one.top_logprobs[0].token == one.token
        assert len(one.top_logprobs) == 2
        assert math.exp(one.logprob) <= 1
    without = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs.content
    assert all(one.top_logprobs == [] for one in without)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt(client, shared, stream):
    texts = [PROMPT, "It was a"]
    plain = client.completions.create(model="rows", prompt=texts, **GREEDY)
    for prompt in (texts, [shared.tokenizer(text)["input_ids"] for text in texts]):
        done = client.completions.create(model="rows", prompt=prompt, **GREEDY, echo=True, stream=stream)
        found = ["", ""]
        for choice in [choice for chunk in done for choice in chunk.choices] if stream else done.choices:
            found[choice.index] += choice.text
        assert found == [text + choice.text for text, choice in zip(texts, plain.choices, strict=True)]


def test_models_lists_the_base_and_every_adapter(client):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {"base", "rows", "road1", "lora", "poison"}
    assert models["rows"].parent == "base"
    assert models["base"].parent is None
    assert models["base"].root == "org/tiny-llama"
    assert client.models.retrieve("road1").id == "road1"
    assert client.models.retrieve("org/tiny-llama").id == "base"
    with pytest.raises(openai.NotFoundError, match="no model 'road7'"):
        client.models.retrieve("road7")
