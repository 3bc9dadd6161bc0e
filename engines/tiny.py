"""Makes tiny checkpoints with random weights, in the ordinary Hugging Face folder form.

For demos and tests: a few million parameters, fixed seeds, a byte-level tokenizer, chat template and processor files,
so that any engine that serves the real family serves the folder too. The head dimension is 64, which is what the CPU
attention kernels of other engines ask for. Nothing is downloaded and nothing is trained: the text is noise, but always
the same noise.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

HIDDEN, HEAD_DIM, HEADS, KV_HEADS, LAYERS = 256, 64, 4, 2, 4
MAX_POSITIONS = 8192
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TILE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")  # of families that see images in tiles
PRINTABLE = range(0x20, 0x7F)
LOUD = re.compile(r"\.(q_proj|k_proj|q_norm|k_norm|v_proj|o_proj|down_proj)\.weight$")

# The prompt format of the Qwen-VL families: each message between im_start and im_end, each media part a pad token
# between vision markers. Of others, the same but for what stands for an image.
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
TILE_TEMPLATE = {QWEN_IMAGE: "<IMG_CONTEXT>\n", QWEN_VIDEO: "<video>\n"}
CHAT_TEMPLATE = """\
{%- macro parts(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' or 'video' in part -%}<|vision_start|><|video_pad|><|vision_end|>
{%- elif 'text' in part -%}{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- for tool in tools -%}{{ tool | tojson }}{{ '\\n' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + parts(message.content or '') + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def byte_tokens() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes, in byte order."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {byte: chr(byte) for byte in visible}
    table |= {byte: chr(256 + n) for n, byte in enumerate(b for b in range(256) if b not in table)}
    tokens = [table[byte] for byte in range(256)]
    assert set(tokens) == set(alphabet), "the byte-level alphabet of tokenizers changed"
    return tokens


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """One token per byte, plus the special tokens of the family."""
    tiled = family == "internvl"
    names = SPECIAL_TOKENS + TILE_TOKENS if tiled else SPECIAL_TOKENS
    roles = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    template = CHAT_TEMPLATE
    for qwens, theirs in TILE_TEMPLATE.items() if tiled else ():
        template = template.replace(qwens, theirs)
    vocab = {token: byte for byte, token in enumerate(byte_tokens())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in names])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(names),
        chat_template=template,
        extra_special_tokens=dict(zip(roles, TILE_TOKENS, strict=True)) if tiled else {},
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def special(token: str) -> int:
    return 256 + (SPECIAL_TOKENS + TILE_TOKENS).index(token)


def shared_config() -> dict[str, Any]:
    return {
        "image_token_id": special("<|image_pad|>"),
        "video_token_id": special("<|video_pad|>"),
        "vision_start_token_id": special("<|vision_start|>"),
        "vision_end_token_id": special("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def text_config(
    layers: int, mrope_section: list[int], rope: Mapping[str, Any] | None = None, **extra: Any
) -> dict[str, Any]:
    rope = rope or {}
    return {
        "vocab_size": 256 + len(SPECIAL_TOKENS),
        "hidden_size": HIDDEN,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": mrope_section, **rope},
        "bos_token_id": special("<|endoftext|>"),
        "eos_token_id": special("<|im_end|>"),
        "pad_token_id": special("<|endoftext|>"),
        **extra,
    }  # fmt: skip


def qwen2_vl(layers: int) -> PreTrainedModel:
    vision = {"depth": 3, "embed_dim": 128, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 14}
    config = Qwen2VLConfig(text_config=text_config(layers, [8, 12, 12]), vision_config=vision, **shared_config())
    return Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl(layers: int) -> PreTrainedModel:
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "patch_size": 14, "window_size": 56,
        "fullatt_block_indexes": [1], "out_hidden_size": HIDDEN, "tokens_per_second": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text_config(layers, [8, 12, 12]), vision_config=vision, **shared_config())
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl(layers: int) -> PreTrainedModel:
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 2, "patch_size": 16,
        "out_hidden_size": HIDDEN, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 2],
    }  # fmt: skip
    text = text_config(layers, [12, 10, 10], head_dim=HEAD_DIM, rope={"mrope_interleaved": True})
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **shared_config()))


def internvl(layers: int) -> PreTrainedModel:
    vision = {
        "num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 112, "layer_scale_init_value": 1.0,
    }  # fmt: skip
    text = text_config(layers, [])
    text |= {"model_type": "qwen2", "vocab_size": text["vocab_size"] + len(TILE_TOKENS)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    config = InternVLConfig(
        text_config=text, vision_config=vision, image_token_id=special("<IMG_CONTEXT>"), tie_word_embeddings=False
    )
    return InternVLForConditionalGeneration(config)


FAMILIES: Mapping[str, Callable[[int], PreTrainedModel]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
}
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}


def randomise(model: PreTrainedModel, seed: int) -> None:
    """Weights that make every token depend on everything before it.

    The usual initialisation (normal, 0.02) leaves a tiny model repeating one token whatever the image, which no test
    could tell from a lost embedding. Here matrices are scaled by their fan-in, and in the language model the residual
    stream starts small, attention is sharp and its output counts: answers of 48 tokens hold some 30 different ones
    instead of 10. Bytes outside printable ASCII and the special tokens get small output rows, so that answers are
    readable and seldom end early.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.add_(noise * 0.1)
            else:
                parameter.copy_(noise / math.sqrt(math.prod(parameter.shape[1:])))
            if "language_model" in name and LOUD.search(name):
                parameter.mul_(2)
        model.get_input_embeddings().weight.mul_(0.3 * math.sqrt(HIDDEN))
        head = model.get_output_embeddings().weight
        head.mul_(2)
        quiet = [token for token in range(head.shape[0]) if token not in PRINTABLE]
        head[quiet] *= 0.25


def processor_files(family: str, config: Any) -> dict[str, dict[str, Any]]:
    if family == "internvl":
        return {
            "preprocessor_config.json": tiling(config),
            "processor_config.json": {"image_seq_length": 16},
            "video_preprocessor_config.json": framing(config),
        }
    patch_size = config.vision_config.patch_size
    image = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": PROCESSORS[family],
        "patch_size": patch_size,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": (2 * patch_size) ** 2 * 4, "longest_edge": (2 * patch_size) ** 2 * 1024},
        "image_mean": [0.48145466, 0.4578275, 0.40821073] if family != "qwen3_vl" else [0.5, 0.5, 0.5],
        "image_std": [0.26862954, 0.26130258, 0.27577711] if family != "qwen3_vl" else [0.5, 0.5, 0.5],
    }
    video_type = "Qwen3VLVideoProcessor" if family == "qwen3_vl" else "Qwen2VLVideoProcessor"
    video = {**image, "video_processor_type": video_type}
    del video["image_processor_type"]
    return {"preprocessor_config.json": image, "video_preprocessor_config.json": video}


def tiling(config: Any) -> dict[str, Any]:
    height, width = config.vision_config.image_size
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
        "size": {"height": height, "width": width},
        "crop_to_patches": True,
        "min_patches": 1,
        "max_patches": 6,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def framing(config: Any) -> dict[str, Any]:
    height, width = config.vision_config.image_size
    return {
        "video_processor_type": "InternVLVideoProcessor",
        "size": {"height": height, "width": width},
        "num_frames": 8,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def make(family: str, out: Path, seed: int = 0, layers: int = LAYERS) -> Path:
    """Write a checkpoint folder; the same arguments always give the same bytes of weights.

    :raises KeyError: `family` is none of `FAMILIES`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FAMILIES[family](layers).to(torch.float32).eval()
    randomise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=special("<|endoftext|>"), eos_token_id=[special("<|im_end|>"), special("<|endoftext|>")],
        pad_token_id=special("<|endoftext|>"), do_sample=False,
    )  # fmt: skip
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    make_tokenizer(family).save_pretrained(partial)
    for name, content in processor_files(family, model.config).items():
        (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out
