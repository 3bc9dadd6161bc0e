import torch

from tests.support.pictures import image_file
from tests.support.reference import reference

ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]}]


def test_placeholders_are_as_many_as_the_tower_makes_embeddings() -> None:
    model = reference("qwen2_5_vl")
    inputs = model.inputs(ASK, [image_file(96, 64), image_file(200, 150, seed=1)])
    placeholders = int((inputs["input_ids"] == model.model.config.image_token_id).sum())
    assert placeholders == int(inputs["image_grid_thw"].prod(-1).sum()) // 4
    assert torch.equal(inputs["mm_token_type_ids"].bool(), inputs["input_ids"] == model.model.config.image_token_id)


def test_the_answer_is_greedy_and_depends_on_the_images() -> None:
    model = reference("qwen2_5_vl")
    pictures = [image_file(96, 64), image_file(200, 150, seed=1)]
    answer = model.answer(ASK, pictures, max_tokens=8)
    assert answer == model.answer(ASK, pictures, max_tokens=8)
    assert answer != model.answer(ASK, pictures[::-1], max_tokens=8)
