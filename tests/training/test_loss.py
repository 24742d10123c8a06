"""A task's own loss is the model's, wherever that is asked for one."""

from __future__ import annotations

import torch
from transformers import BertForSequenceClassification

from tests.training.conftest import tiny_config
from turnrow.tasks import ClassificationTask
from turnrow.training.loss import use_loss_of


class Halved(ClassificationTask):
    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.nn.functional.cross_entropy(logits, labels)


def test_a_tasks_loss_takes_the_place_of_the_models() -> None:
    model = BertForSequenceClassification(tiny_config(20)).eval()
    inputs = {"input_ids": torch.randint(0, 20, (3, 5)), "labels": torch.tensor([0, 1, 1])}
    before = model(**inputs)
    use_loss_of(ClassificationTask(text="a"), model)
    assert not model._forward_hooks
    use_loss_of(Halved(text="a"), model)
    after = model(**inputs)
    torch.testing.assert_close(after.loss, 0.5 * before.loss)
    torch.testing.assert_close(after.logits, before.logits)
    after.loss.backward()
    assert model.classifier.weight.grad is not None
    assert model(input_ids=inputs["input_ids"]).loss is None
