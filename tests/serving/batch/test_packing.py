"""The tokens of a step and their slots."""

from __future__ import annotations

import torch

from turnrow.serving.batch.packing import PackedStep, Segment

CPU = torch.device("cpu")


def test_a_step_like_the_one_before_is_the_one_before():
    segments = [Segment(0, 1, True), Segment(None, 1, True)]
    first = PackedStep.of(segments, CPU)
    assert PackedStep.of(list(segments), CPU, first) is first
    assert PackedStep.of([*segments, Segment(1, 4, False)], CPU, first) is not first


def test_the_head_is_told_of_last_tokens_alone_if_it_sees_no_others():
    segments = [Segment(0, 3, False), Segment(1, 2, True), Segment(None, 1, True), Segment(0, 1, True)]
    step = PackedStep.of(segments, CPU)
    assert (step.row.tokens, step.head.tokens) == (7, 3)
    both = step.head.of(frozenset({0, 1, 9}))
    assert both is not None
    assert both.tokens is not None
    assert both.tokens.tolist() == [0, 2]
    assert both.slots.tolist() == [1, 0]
    assert PackedStep.of(segments, CPU, head_sees_kept=False).head.tokens == 7


def test_layers_share_a_grouping_where_the_same_adapters_adapt_them():
    step = PackedStep.of([Segment(0, 1, True), Segment(1, 1, True)], CPU)
    assert step.row.of(frozenset({0, 1, 2})) is step.row.of(frozenset({0, 1, 5}))
    assert step.row.of(frozenset({7})) is None
