"""Pretrain the small Llama of this folder: the script that made ``model/``, kept so that it can be made again.

    python examples/small_llama/pretrain.py --data DIR

DIR holds ``train``, ``validation`` and ``test`` files of rows with a column ``text``: here, paragraphs of nine novels of Project Gutenberg
(6.1 million characters), in their order. A byte-level BPE tokenizer is trained on the training split, then a Llama on the same split by a
recipe like any other, and its weights are kept in bfloat16. It knows enough English to be adapted, and fits where tests and demonstrations run.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from turnrow.tasks import read_table, split_files
from turnrow.training import Recipe, train

MODEL = Path(__file__).parent / "model"

VOCABULARY = 4096
POSITIONS = 1024
BLOCK = 512
BEGIN, END = "<s>", "</s>"
FIGURES = ("before", "after", "total_parameters", "steps", "epochs", "seconds_per_step", "versions", "seed")
# The form in which instructions are put to it, by whoever adapts it to them; the base has never seen one.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
    "{% else %}{{ '### Response:\n' + message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
)


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with `VOCABULARY` tokens, trained on `texts`; ``<s>`` before each text, ``</s>`` to end one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0), (END, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def make_model() -> LlamaForCausalLM:
    """A Llama with 4.0 million weights, drawn at random; the embedding is also the output layer."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            intermediate_size=704,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def pretrain(data: Path, output: Path, epochs: float, *, bf16: bool = True, work: Path | None = None) -> dict[str, Any]:
    """Make tokenizer and model, train it, and write both to `output`; returns the figures of the run.

    With `work` the base and the run are kept in that folder, and a run that is there goes on.
    """
    with nullcontext(work) if work else TemporaryDirectory() as scratch:
        base, folder = Path(scratch) / "base", Path(scratch) / "run"
        if not base.exists():
            torch.manual_seed(0)
            make_tokenizer(read_table(split_files(data)["train"])["text"]).save_pretrained(base)
            make_model().save_pretrained(base)
        recipe = Recipe(
            model=str(base),
            task={"name": "language_modelling", "text": "text"},
            data={"folder": str(data)},  # type: ignore[arg-type]
            method={"name": "full"},
            training={
                "learning_rate": 3e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.02,
                "weight_decay": 0.1,
                "adam_beta2": 0.95,
                "num_train_epochs": epochs,
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 8,
                "bf16": bf16,
            },
            max_length=BLOCK,
            output_dir=str(folder),
        )
        result = train(recipe, resume=folder.exists())
        return keep(result.adapter, result.metrics, output)


def keep(trained: str | Path, metrics: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Write the trained model in half precision, its tokenizer and the figures of its run; returns the figures."""
    AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16).save_pretrained(output)
    PreTrainedTokenizerFast.from_pretrained(trained).save_pretrained(output)
    figures = {name: metrics[name] for name in FIGURES}
    (output / "pretraining.json").write_text(json.dumps(figures, indent=2) + "\n")
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder with the splits")
    parser.add_argument("--output", type=Path, default=MODEL, help="default: %(default)s")
    parser.add_argument("--epochs", type=float, default=6, help="default: %(default)s")
    parser.add_argument("--work", type=Path, help="keep the run in this folder, and go on with one that is there")
    parser.add_argument("--float32", action="store_true", help="no mixed precision")
    args = parser.parse_args(argv)
    print(json.dumps(pretrain(args.data, args.output, args.epochs, bf16=not args.float32, work=args.work), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
