"""Tiny random models in float64, padded batches for them, their outputs, and their whole jacobians by torch.func."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from turnrow.analysis.ntk import CausalLabelWords, CentroidHead, ClassifierHead, MaskedLabelWords

VOCABULARY = 30
MASK = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@dataclass(frozen=True, eq=False)
class Case:
    model: nn.Module
    train: list[dict]
    other: list[dict]
    outputs: Callable[[nn.Module, dict], Tensor]


def batch(lengths: Sequence[int], seed: int, *, left: bool = False) -> dict:
    """Padded rows, each with a mask token in it."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        at = slice(max(lengths) - length, None) if left else slice(0, length)
        words = torch.randint(4, VOCABULARY, (length,), generator=generator)
        words[row % length] = MASK
        ids[row, at], mask[row, at] = words, 1
    return {"input_ids": ids, "attention_mask": mask}


def batches(*, left: bool = False) -> tuple[list[dict], list[dict]]:
    return [batch([5, 2, 4], 1, left=left), batch([3, 3], 2, left=left)], [batch([4, 6], 3, left=left)]


def bert() -> Case:
    """Masked-LM head tied to the embeddings."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=12, **SIZES)
    return Case(BertForMaskedLM(config), *batches(), MaskedLabelWords(MASK, [4, 5, [6, 7]]))


def roberta() -> Case:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, num_labels=3, pad_token_id=0, **SIZES)
    return Case(RobertaForSequenceClassification(config), *batches(), ClassifierHead())


def encoder() -> Case:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=12, **SIZES), add_pooling_layer=False)
    train, other = batches()
    return Case(model, train, other, CentroidHead(torch.randn(2, 16, generator=torch.Generator().manual_seed(9))))


def llama() -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=12, num_key_value_heads=1, pad_token_id=0, **SIZES
    )
    return Case(LlamaForCausalLM(config), *batches(), CausalLabelWords([4, 5, 6]))


def gpt2() -> Case:
    """Conv1D, and a head tied to the embeddings; padded on the left."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Case(GPT2LMHeadModel(config), *batches(left=True), CausalLabelWords([4, 5]))


def albert() -> Case:
    """One layer that is called three times."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=8,
        max_position_embeddings=12,
        num_labels=2,
        **{**SIZES, "num_hidden_layers": 3},
    )
    return Case(AlbertForSequenceClassification(config), *batches(), ClassifierHead())


def t5() -> Case:
    """Encoder and decoder; position biases without samples."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    train, other = batches()
    for one in (*train, *other):
        one["decoder_input_ids"] = one["input_ids"][:, :2].clone()
    return Case(T5ForConditionalGeneration(config), train, other, lambda model, b: model(**b).logits[:, -1, [4, 5]])


def mixtral() -> Case:
    """Experts that see the tokens of all samples in an order of their own, in one parameter of three dimensions."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, max_position_embeddings=12, num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=2,
        pad_token_id=0, experts_implementation="eager", **SIZES,
    )  # fmt: skip
    return Case(MixtralForCausalLM(config), *batches(), CausalLabelWords([4, 5]))


ALL = {f.__name__: f for f in (bert, roberta, encoder, llama, gpt2, albert, t5, mixtral)}


@cache
def case(name: str) -> Case:
    """The same random model for all tests; none of them may change it."""
    torch.manual_seed(0)
    made = ALL[name]()
    with torch.no_grad():
        for parameter in made.model.parameters():  # biases start at zero, norms at one
            parameter.add_(0.1 * torch.randn_like(parameter))
    made.model.double().eval()
    for module in made.model.modules():
        if type(module).__name__ in ("LlamaRMSNorm", "MixtralRMSNorm", "T5LayerNorm"):
            module.__class__ = _double(type(module))
    return made


@cache
def _double(norm: type[nn.Module]) -> type[nn.Module]:
    """The same norm, which goes through float32 otherwise and is no function of float64."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return (
            self.weight
            * hidden_states
            * (hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()
        )

    return type(norm.__name__, (norm,), {"forward": forward})


def jacobians(
    model: nn.Module, batches: Sequence[dict], outputs: Callable[[nn.Module, dict], Tensor], names: Sequence[str]
) -> dict[str, Tensor]:
    """By parameter (samples, C, *shape), one sample at a time, by torch.func."""
    parameters = dict(model.named_parameters())
    moving = {name: parameters[name].detach() for name in names}
    rest = {name: p.detach() for name, p in parameters.items() if name not in moving}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for whole in batches:
        for sample in range(len(whole["input_ids"])):
            one = {name: value[sample : sample + 1] for name, value in whole.items()}

            def f(moving: dict[str, Tensor], one: dict = one) -> Tensor:
                return outputs(lambda **kw: torch.func.functional_call(model, {**rest, **moving}, (), kw), one)[0]

            for name, j in torch.func.jacrev(f, chunk_size=1)(moving).items():
                found[name].append(j)
    return {name: torch.stack(values) for name, values in found.items()}


@cache
def all_jacobians(name: str) -> dict[str, Tensor]:
    made = case(name)
    names = [n for n, _ in made.model.named_parameters()]
    return jacobians(made.model, [*made.train, *made.other], made.outputs, names)


def kernel_of(parts: Sequence[Tensor], train: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, n, C, C) and (m, n, C, C) of gradients (samples, C, ...)."""
    j = torch.cat([part.flatten(2) for part in parts], dim=2)
    k = torch.einsum("icp,jdp->ijcd", j, j[:train]).numpy()
    return k[:train], k[train:]


def linear_layers(name: str) -> dict[str, nn.Module]:
    """Those of the base, as a reader of the model would list them."""
    made = case(name).model
    base = made.base_model
    return {
        n: m
        for n, m in made.named_modules()
        if isinstance(m, (nn.Linear, Conv1D)) and any(m is inside for inside in base.modules())
    }


def weight_jacobian(name: str, layer: str) -> Tensor:
    """(samples, C, out, in)."""
    j = all_jacobians(name)[f"{layer}.weight"]
    return j.transpose(2, 3) if isinstance(case(name).model.get_submodule(layer), Conv1D) else j
