"""Outputs read the right place of each sample, padded on either side."""

from __future__ import annotations

import pytest
import torch

from tests.analysis.ntk.models import MASK, batch, case
from turnrow.analysis.ntk import CausalLabelWords, CentroidHead, MaskedLabelWords, mean_pooled
from turnrow.errors import UserError


def alone(batch: dict, row: int) -> dict:
    """A sample without its padding."""
    real = batch["attention_mask"][row].bool()
    return {name: value[row, real][None] for name, value in batch.items()}


def test_masked_label_words_are_read_at_the_mask() -> None:
    model, inputs = case("bert").model, batch([5, 3], 4)
    f = MaskedLabelWords(MASK, [4, [5, 6]])(model, inputs)
    for row in range(2):
        one = alone(inputs, row)
        logits = model(**one).logits[0, one["input_ids"][0].tolist().index(MASK)]
        torch.testing.assert_close(f[row], torch.stack([logits[4], logits[[5, 6]].mean()]))


@pytest.mark.parametrize("left", [False, True])
def test_causal_label_words_are_read_after_the_last_real_token(left: bool) -> None:
    model = case("llama").model
    inputs = batch([5, 3], 4, left=left)
    f = CausalLabelWords([4, 5])(model, inputs)
    for row in range(2):
        torch.testing.assert_close(f[row], model(**alone(inputs, row)).logits[0, -1, [4, 5]])


def test_without_a_mask_the_last_token_is_read() -> None:
    model, ids = case("gpt2").model, torch.tensor([[4, 5, 6], [7, 8, 9]])
    torch.testing.assert_close(
        CausalLabelWords([4, 5])(model, {"input_ids": ids}), model(input_ids=ids).logits[:, -1, [4, 5]]
    )


def test_the_centroid_head_puts_samples_to_the_nearest_centroid() -> None:
    made = case("encoder")
    labels = [0, 1, 0, 1, 1]
    head = CentroidHead.fit(made.model, made.train, labels)
    with torch.no_grad():
        phi = torch.cat([mean_pooled(made.model, one) for one in made.train])
        f = torch.cat([head(made.model, one) for one in made.train])
    torch.testing.assert_close(head.centroids[0], phi[[0, 2]].mean(0))
    distances = torch.cdist(phi, head.centroids)
    assert f.argmax(1).tolist() == distances.argmin(1).tolist()
    # Differences of outputs are half the differences of squared distances.
    torch.testing.assert_close(f[:, 0] - f[:, 1], (distances[:, 1] ** 2 - distances[:, 0] ** 2) / 2)


def test_mean_pooling_leaves_padding_out() -> None:
    model, inputs = case("encoder").model, batch([5, 3], 4)
    torch.testing.assert_close(mean_pooled(model, inputs)[1:], mean_pooled(model, alone(inputs, 1)))


def test_labels_in_a_batch_change_nothing() -> None:
    model, inputs = case("llama").model, batch([3, 3], 4)
    outputs = CausalLabelWords([4])
    torch.testing.assert_close(outputs(model, {**inputs, "labels": torch.tensor([0, 1])}), outputs(model, inputs))


def test_a_sample_without_a_mask_is_refused() -> None:
    inputs = batch([4, 4], 4)
    inputs["input_ids"][1] = 7
    with pytest.raises(UserError, match=r"sample 1 of a batch has 0 tokens 3 \(mask_token_id\)"):
        MaskedLabelWords(MASK, [4])(case("bert").model, inputs)


@pytest.mark.parametrize(
    ("labels", "message"), [([0, 1], "2 labels for 5 samples"), ([0, 2, 0, 2, 2], "no sample has the label 1")]
)
def test_labels_that_do_not_fit_are_refused(labels: list[int], message: str) -> None:
    made = case("encoder")
    with pytest.raises(UserError, match=message):
        CentroidHead.fit(made.model, made.train, labels)
