"""What a client may ask for."""

from __future__ import annotations

import pytest

from turnrow.errors import UserError
from turnrow.serving import QueueFull, Request, Sampling


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; it must be a number from 0 to 100"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0; it must be a number above 0 up to 1"),
        ({"min_p": 2}, "min_p is 2"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number of at least 0"),
        ({"presence_penalty": 3}, "presence_penalty is 3; it must be a number from -2 to 2"),
        ({"frequency_penalty": "1"}, "frequency_penalty is '1'"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"logit_bias": {-1: 2.0}}, "a token of logit_bias is -1"),
        ({"logit_bias": {3: 101}}, r"logit_bias\[3\] is 101; it must be a number from -100 to 100"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_settings_of_sampling_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_ids": []}, "the prompt has no tokens"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be a whole number of at least 1"),
        ({"n": 1000}, "n is 1000; it must be a whole number from 1 to 128"),
        ({"logprobs": 21}, "logprobs is 21; it must be a whole number from 0 to 20"),
        ({"stop": "end"}, "stop is 'end'; it must be a list of up to 16 texts"),
        ({"stop": [""]}, "stop has ''; it must be a text that is not empty"),
        ({"stop_token_ids": ["x"]}, "a token of stop_token_ids is 'x'"),
        ({"timeout_s": 0}, "timeout_s is 0; it must be a number above 0"),
        ({"adapter": None}, "adapter is None; it must be a name"),
    ],
)
def test_requests_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Request(**{"prompt_ids": [1], **settings})


def test_a_full_queue_says_when_to_try_again():
    error = QueueFull(12, 3.4)
    assert error.retry_after == 3.4
    assert str(error) == "12 requests wait already, and no more can: try again in 3 s"
