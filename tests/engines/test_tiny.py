import hashlib
from pathlib import Path

import pytest

from engines.tiny import HEAD_DIM, make
from tests.support.checkpoints import FAMILIES
from tests.support.pictures import image_file
from tests.support.reference import reference

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_the_same_seed_makes_the_same_weights(tmp_path: Path) -> None:
    one, two, other = (
        make("qwen2_vl", tmp_path / "1"),
        make("qwen2_vl", tmp_path / "2"),
        make("qwen2_vl", tmp_path / "3", 1),
    )
    assert digest(one) == digest(two) != digest(other)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_folder_and_its_answer_depends_on_the_image(family: str) -> None:
    model = reference(family)
    config = model.model.config
    assert 1e6 < sum(parameter.numel() for parameter in model.model.parameters()) < 1e7
    assert getattr(config.text_config, "head_dim", None) in (None, HEAD_DIM)
    assert config.text_config.hidden_size // config.text_config.num_attention_heads == HEAD_DIM
    answers = {model.answer(ASK, [image_file(seed=seed)], max_tokens=24) for seed in range(3)}
    assert len(answers) == 3
    assert all(len(set(answer)) > 3 for answer in answers), "answers that repeat one token cannot tell tokens apart"


def test_the_tokenizer_is_byte_level_and_lossless() -> None:
    tokenizer = reference("qwen3_vl").tokenizer
    text = "naïve ☃ 日本語 👩‍🚀\n\ttabs"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<|image_pad|>") == reference("qwen3_vl").model.config.image_token_id
