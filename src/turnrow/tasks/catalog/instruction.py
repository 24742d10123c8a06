"""Instructions and conversations for instruction tuning."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]

ENTRIES = (
    Entry(
        name="alpaca",
        title="Alpaca: instructions with answers of a language model, cleaned",
        task={"name": "instruction"},
        hub={
            "train": "yahma/alpaca-cleaned::train[:-1000]",
            "validation": "yahma/alpaca-cleaned::train[-1000:-500]",
            "test": "yahma/alpaca-cleaned::train[-500:]",
        },
        source="Taori et al. 2023 (Stanford Alpaca)",
        notes="The hub has a training split alone; its last 1,000 rows are for validation and test.",
    ),
    Entry(
        name="ultrafeedback",
        title="UltraFeedback: conversations with the answer that was preferred",
        task={"name": "instruction", "messages": "messages"},
        hub={
            "train": "HuggingFaceH4/ultrafeedback_binarized::train_sft[:-1000]",
            "validation": "HuggingFaceH4/ultrafeedback_binarized::train_sft[-1000:]",
            "test": "HuggingFaceH4/ultrafeedback_binarized::test_sft",
        },
        source="Cui et al. 2024, ICML; hub: Tunstall et al. 2023 (Zephyr)",
        notes="Takes a tokenizer with a chat template. The column chosen has the same form: task: {name: ultrafeedback, messages: chosen}.",
    ),
)
