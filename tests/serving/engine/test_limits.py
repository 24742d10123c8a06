"""How much memory an engine takes."""

from __future__ import annotations

import pytest

from tests.serving.serving_models import model_of
from turnrow.errors import UserError
from turnrow.serving import Limits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots is 0; it must be a whole number of at least 1"),
        ({"max_running": True}, "max_running is True"),
        ({"batch_tokens": 8}, "batch_tokens is 8 and max_running 32"),
        ({"page_tokens": 6}, "page_tokens is 6; it must be a multiple of 4"),
    ],
)
def test_limits_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Limits(**settings)


def test_the_cache_is_as_large_as_was_said_and_never_larger_than_can_be_used(llama):
    each = 2 * 2 * 2 * 4 * 4  # keys and values, layers, heads, numbers, bytes
    sizes = Limits(cache_bytes=40 * 16 * each).sizes(llama)
    assert (sizes.pages, sizes.cache_tokens) == (40, 640)
    # 32 answers of the model's 128 positions, and a page more for each
    assert Limits().sizes(llama).pages == 32 * (128 // 16 + 1) + 2
    one = Limits(max_running=1)
    assert one.longest(llama, one.sizes(llama)) == 128


def test_a_request_may_be_as_long_as_the_model_and_the_cache_allow(llama):
    limits = Limits()
    assert limits.longest(llama, limits.sizes(llama)) == 128
    assert Limits(max_length=50).longest(llama, limits.sizes(llama)) == 50
    small = Limits(max_running=4, cache_bytes=4 * 16 * 128)
    assert small.longest(llama, small.sizes(llama)) == 32


def test_a_cache_too_small_for_a_page_each_is_refused():
    with pytest.raises(UserError, match="cache_bytes is 2048, 1 pages of 2,048 bytes; 32 are needed at least"):
        Limits(cache_bytes=2048).sizes(model_of("llama"))
