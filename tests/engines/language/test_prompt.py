"""Messages in the shape that templates read, literals that stay hidden, and images that take their room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.language.prompt import Guard, Media, PromptError, count_images, expand, num_tokens, readable

PAD = 99


class TestReadable:
    @pytest.mark.parametrize(
        "part",
        [
            {"type": "image_url", "image_url": {"url": "data:,"}},
            {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": "0"},
            {"type": "image"},
        ],
    )
    def test_every_kind_of_image_part_is_an_image(self, part):
        shown = readable({"role": "user", "content": [part, {"type": "text", "text": "x", "extra": 1}]}, "messages[0]")
        assert shown["content"] == [{"type": "image"}, {"type": "text", "text": "x"}]
        assert count_images([shown]) == 1

    def test_text_stays_and_null_becomes_empty(self):
        assert readable({"role": "user", "content": "hi"}, "m")["content"] == "hi"
        assert readable({"role": "assistant", "content": None, "name": "n"}, "m") == {
            "role": "assistant",
            "content": "",
            "name": "n",
        }

    def test_the_arguments_of_a_call_become_an_object(self):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
        shown = readable({"role": "assistant", "tool_calls": [call]}, "m")
        assert shown["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
        assert call["function"]["arguments"] == '{"x": 1}', "the client's body was changed"

    @pytest.mark.parametrize("call", [{"function": {"arguments": "{broken"}}, {"function": None}, "call"])
    def test_other_calls_stay_as_they_are(self, call):
        assert readable({"role": "assistant", "tool_calls": [call]}, "m")["tool_calls"] == [call]

    @pytest.mark.parametrize(
        ("message", "param"),
        [
            ("hello", "messages[2]"),
            ({"content": "x"}, "messages[2]"),
            ({"role": "user", "content": 5}, "messages[2].content"),
            ({"role": "user", "content": [{"type": "text", "text": "x"}, "y"]}, "messages[2].content[1]"),
            ({"role": "user", "content": [{"type": "text"}]}, "messages[2].content[0]"),
            ({"role": "user", "content": [{"type": "video_url", "video_url": {}}]}, "messages[2].content[0]"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, message, param):
        with pytest.raises(PromptError) as raised:
            readable(message, "messages[2]")
        assert raised.value.param == param


class TestExpand:
    def test_each_placeholder_takes_its_images_room(self):
        media = [Media("a", "image", (1, 4, 4)), Media("b", "image", (1, 2, 6)), Media("a", "image", (1, 4, 4))]
        prompt = expand([1, PAD, 2, PAD, PAD, 3], PAD, media, 2)
        assert prompt.token_ids == [1, *[PAD] * 4, 2, *[PAD] * 3, *[PAD] * 4, 3]
        assert [(item.mm_hash, item.offset, item.num_tokens) for item in prompt.items] == [
            ("a", 1, 4),
            ("b", 6, 3),
            ("a", 9, 4),
        ]

    def test_two_tokens_may_stand_around_an_images_own(self):
        prompt = expand([1, 9, 9, 2], 9, [Media("a", "image", (2, 2, 2)), Media("b", "image", (1, 2, 2))], 2, (7, 8))
        assert prompt.token_ids == [1, 7, 9, 9, 8, 7, 9, 8, 2]
        assert [(item.offset, item.num_tokens) for item in prompt.items] == [(2, 2), (6, 1)]

    @pytest.mark.parametrize("ids", [[1, 2], [PAD, PAD]])
    def test_other_numbers_of_placeholders_are_refused(self, ids):
        with pytest.raises(PromptError, match="placeholders for 1 images"):
            expand(ids, PAD, [Media("a", "image", (1, 2, 2))], 2)

    @pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 5), (0, 4, 4), (1, -2, 4)])
    def test_a_broken_grid_is_refused(self, grid):
        with pytest.raises(PromptError, match="whole 2×2 patches"):
            num_tokens(grid, 2)


class TestGuard:
    guard = Guard(("<|a|>", "<|b|>"))

    @given(st.lists(st.sampled_from(["<|a|>", "<|b|>", "x", "<|", "a|>", "é"])).map("".join))
    def test_what_is_hidden_comes_back_in_place(self, text):
        hidden = self.guard.hide(text)
        assert "<|a|>" not in hidden
        assert "<|b|>" not in hidden
        pieces = list(self.guard.split(hidden))
        assert "".join(piece + (literal or "") for piece, literal in pieces) == text
        assert [literal for _, literal in pieces[:-1]].count("<|a|>") == text.count("<|a|>")

    def test_strings_anywhere_in_a_body_are_guarded(self):
        hidden = self.guard.hide({"<|a|>": [("<|b|>", 1, None, True)]})
        assert "<|" not in str(hidden)
        assert next(iter(hidden.values()))[0][1:] == [1, None, True]

    def test_marks_cannot_be_guessed(self):
        assert Guard(("<|a|>",)).hide("<|a|>") != Guard(("<|a|>",)).hide("<|a|>")
