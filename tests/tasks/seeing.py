"""A processor in the manner of LLaVA-1.5's: a token per byte, `<s>` before a text, `</s>` to end one, four tokens an image."""

from __future__ import annotations

from typing import Any

# Images first and then the text, as LLaVA-1.5's own template has it; nothing closes an answer.
TEMPLATE = (
    "{% for turn in messages %}{% if turn['role'] != 'system' %}{{ turn['role'].upper() + ': ' }}{% endif %}"
    "{% for part in turn['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in turn['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Every turn between tokens of its own, as ChatML has it.
CLOSING_TEMPLATE = (
    "{% for turn in messages %}{{ '<turn>' + turn['role'] + '\n' }}"
    "{% for part in turn['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)


def llava_processor(template: str | None = TEMPLATE) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(["<s>", "</s>", *letters])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    text = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    text.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<image>", "<turn>", "</turn>")])
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=text, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template,
    )  # fmt: skip
