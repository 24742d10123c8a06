"""TRL's trainers take our configs: what they train is the adapter, and the base is there bit for bit where they ask for it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow import RoadConfig, RocoftConfig
from turnrow.tasks import make_task

trl = pytest.importorskip("trl", reason="needs the extra [trl]")

# TRL asks transformers by names that it has changed since.
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>"
    "{% endgeneration %}{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALKS = Dataset.from_list(
    [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in (("hi", "hey"), ("bye", "so long"), ("who?", "me"), ("ä", "ö"))
    ]
)
PREFERRED = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": "hi"}],
            "chosen": [{"role": "assistant", "content": "hey"}],
            "rejected": [{"role": "assistant", "content": "no"}],
        }
    ]
    * 4
)
CONFIGS = {
    "rows": lambda: RocoftConfig(mode="row", r=2, task_type="CAUSAL_LM"),
    "columns": lambda: RocoftConfig(mode="column", r=2, task_type="CAUSAL_LM"),
    "rotations": lambda: RoadConfig(variant="road_1", group_size=2, task_type="CAUSAL_LM"),
}
ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: n for n, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=CHAT
    )


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=128, **sizes, **ends))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 12)[None]).logits


def check(trainer: Any, folder: Path) -> None:
    """The adapter has learned, the base has not, and what is saved is what was trained."""
    trained = logits(trainer.model)
    with trainer.model.disable_adapter():
        untrained = logits(trainer.model)
    assert torch.equal(untrained, logits(base()))
    assert not torch.allclose(trained, untrained, atol=1e-5)
    trainer.save_model(str(folder))
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), folder)), trained)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("config", CONFIGS)
def test_sft_trains_the_adapter_with_the_loss_of_our_task(
    config: str, packing: bool, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    args = trl.SFTConfig(
        output_dir=str(tmp_path), assistant_only_loss=True, packing=packing, max_length=64, **ARGUMENTS
    )
    trainer = trl.SFTTrainer(
        model=base(), args=args, train_dataset=TALKS, processing_class=tokenizer, peft_config=CONFIGS[config]()
    )
    trainer.train()
    check(trainer, tmp_path / "adapter")
    # At the first step the adapter is the identity, so the loss is the base's.
    task = make_task("instruction", messages="messages")
    encoded = task.encode(TALKS, tokenizer, 64, split="test")
    batch = task.collator(tokenizer)(list(encoded))
    with torch.no_grad():
        kept = task.reduce_logits(base()(**batch).logits, batch["labels"])
    loss = task.metrics(kept.numpy(), batch["labels"].numpy(), encoded)["loss"]
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
def test_dpo_compares_with_the_base(config: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = trl.DPOTrainer(
        model=base(),
        args=trl.DPOConfig(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=PREFERRED,
        processing_class=tokenizer,
        peft_config=CONFIGS[config](),
    )
    trainer.train()
    check(trainer, tmp_path / "adapter")
    first, second = (entry["loss"] for entry in trainer.state.log_history[:2])
    # The model is its own reference at first, of which the loss is log 2; then it prefers what was chosen.
    assert first == pytest.approx(math.log(2), rel=1e-5)
    assert second < first


# Of a user who does not say so, and has no GPU.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_page_of_the_documentation_runs(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base().save_pretrained("base")
    tokenizer.save_pretrained("base")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    for name in ("sft", "dpo"):
        assert Path("runs", name, "adapter", "adapter_model.safetensors").is_file()
