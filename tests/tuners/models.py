"""Tiny random models of every architecture family, each with inputs that give a loss, and the list of method cases."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftConfig
from torch import nn

from turnrow import RoadConfig, RocoftConfig

VOCABULARY = 64


def _ids(batch: int = 2, length: int = 10) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def roberta(hidden: int = 16, intermediate: int = 24) -> tuple[nn.Module, dict]:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, intermediate_size=intermediate,
        max_position_embeddings=40, num_labels=3,
    )  # fmt: skip
    return RobertaForSequenceClassification(config), {"input_ids": _ids(), "labels": torch.tensor([0, 2])}


def llama(hidden: int = 16, intermediate: int = 24) -> tuple[nn.Module, dict]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=intermediate, max_position_embeddings=40,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def gpt2() -> tuple[nn.Module, dict]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=40, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config), {"input_ids": _ids(), "labels": _ids()}


def falcon() -> tuple[nn.Module, dict]:
    """Adds to the outputs of its linear layers in place."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, parallel_attn=True,
        new_decoder_architecture=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return FalconForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def t5() -> tuple[nn.Module, dict]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config), {"input_ids": _ids(), "labels": _ids(length=6)}


def bart() -> tuple[nn.Module, dict]:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=40,
    )  # fmt: skip
    return BartForConditionalGeneration(config), {"input_ids": _ids(), "labels": _ids(length=6)}


def vit() -> tuple[nn.Module, dict]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 2])}


def llava() -> tuple[nn.Module, dict]:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1, vision_feature_layer=-1)
    image = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids = torch.cat([torch.full((1, 4), 1), _ids(1, 6)], dim=1)  # four patches, then words
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": image, "labels": ids}


ARCHITECTURES: dict[str, Callable[..., tuple[nn.Module, dict]]] = {
    f.__name__: f for f in (roberta, llama, gpt2, falcon, t5, bart, vit, llava)
}


def mixtral() -> tuple[nn.Module, dict]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=40, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return MixtralForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def qwen2_moe() -> tuple[nn.Module, dict]:
    """Has a shared expert beside the fused ones, with a gate of one output feature."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=40, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
        shared_expert_intermediate_size=24,
    )  # fmt: skip
    return Qwen2MoeForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def gpt_oss() -> tuple[nn.Module, dict]:
    """Stores its experts' weights as (in, out), and their biases."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, max_position_embeddings=40, num_local_experts=4, num_experts_per_tok=2, eos_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    return GptOssForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def llama4() -> tuple[nn.Module, dict]:
    """Multiplies all experts at once, (in, out), and does not say which way round they are."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=24, intermediate_size_mlp=24, max_position_embeddings=40, num_local_experts=4, num_experts_per_tok=1,
        interleave_moe_layer_step=1, attention_chunk_size=32,
    )  # fmt: skip
    return Llama4ForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


def jetmoe() -> tuple[nn.Module, dict]:
    """Has experts in its attention too, one module for each weight, and does not say which way round they are."""
    from transformers import JetMoeConfig, JetMoeForCausalLM

    config = JetMoeConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8, intermediate_size=24,
        max_position_embeddings=40, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return JetMoeForCausalLM(config), {"input_ids": _ids(), "labels": _ids()}


MIXTURES: dict[str, Callable[..., tuple[nn.Module, dict]]] = {f.__name__: f for f in (mixtral, qwen2_moe, gpt_oss)}
OTHER_MIXTURES: dict[str, Callable[..., tuple[nn.Module, dict]]] = {f.__name__: f for f in (llama4, jetmoe)}


def build(architecture: str, sizes: dict[str, int] | None = None, **to: torch.dtype) -> tuple[nn.Module, dict]:
    """The same random weights at every call. `sizes` are those of the function; `dtype` casts model and floating-point inputs."""
    torch.manual_seed(0)
    model, inputs = (ARCHITECTURES | MIXTURES | OTHER_MIXTURES)[architecture](**(sizes or {}))
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero in transformers: give them something to lose
            parameter.add_(0.02 * torch.randn_like(parameter))
    if to:
        model = model.to(**to)
        inputs = {k: v.to(**to) if v.is_floating_point() else v for k, v in inputs.items()}
    return model.eval(), inputs


ROCOFT: dict[str, Callable[..., PeftConfig]] = {
    "row": lambda **kw: RocoftConfig(r=3, mode="row", **kw),
    "column": lambda **kw: RocoftConfig(r=3, mode="column", **kw),
    "row-indices": lambda **kw: RocoftConfig(mode="row", indices=[7, 1], **kw),
    "column-indices": lambda **kw: RocoftConfig(mode="column", indices=[5, 11, 2], **kw),
    "row+column": lambda **kw: RocoftConfig(r=3, mode="row+column", **kw),
    "row+column-indices": lambda **kw: RocoftConfig(
        mode="row+column", indices={"row": [7, 1], "column": [5, 0, 2]}, bias="none", **kw
    ),
    "entry": lambda **kw: RocoftConfig(mode="entry", density=0.1, **kw),
    "row-bias": lambda **kw: RocoftConfig(r=2, bias="rocoft_only", **kw),
    "column-all-biases": lambda **kw: RocoftConfig(r=2, mode="column", bias="all", **kw),
}
ROAD: dict[str, Callable[..., PeftConfig]] = {
    "road_1": lambda **kw: RoadConfig(variant="road_1", group_size=4, **kw),
    "road_1-neighbours": lambda **kw: RoadConfig(variant="road_1", group_size=2, **kw),
    "road_2": lambda **kw: RoadConfig(variant="road_2", group_size=8, **kw),
    "road_2-blocks": lambda **kw: RoadConfig(variant="road_2", group_size=4, blocks="1::2", **kw),
    "road_4": lambda **kw: RoadConfig(variant="road_4", group_size=4, **kw),
}
METHODS = ROCOFT | ROAD


def configure(method: str, model: nn.Module, **fields) -> PeftConfig:
    """The configuration of `method` for every linear layer of `model` but the output layer, which may be small and odd."""
    from transformers.pytorch_utils import Conv1D

    linear = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    heads = {"lm_head", "classifier", "classifier.out_proj"}
    return METHODS[method](target_modules=linear - heads, **fields)


def has_biases(architecture: str) -> bool:
    return architecture not in ("llama", "t5", "falcon")


def perturb(model: nn.Module, size: float = 0.05) -> None:
    """Give the adapter random values, as training would."""
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "rocoft_" in name or "road_" in name:
                parameter.add_(size * torch.randn_like(parameter))


def output(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all base tensors as they are in memory, by name without what peft puts into names."""
    return {
        name.replace("base_model.model.", "").replace("base_layer.", ""): tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if "rocoft_" not in name and "road_" not in name
    }


def identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_close_by_name(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert first.keys() == second.keys()
    assert first
    for name in first:
        torch.testing.assert_close(first[name], second[name], msg=lambda m, name=name: f"{name}: {m}", **tolerance)
