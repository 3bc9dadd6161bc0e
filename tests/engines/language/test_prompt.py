"""Messages in the shape that templates read, literals that stay hidden, and images that take their room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.families import FAMILIES
from engines.language.prompt import Guard, Media, Piece, PromptError, expand, lay_out, modalities, num_tokens, readable

PAD = 99


class TestReadable:
    @pytest.mark.parametrize(
        ("part", "modality"),
        [
            ({"type": "image_url", "image_url": {"url": "data:,"}}, "image"),
            ({"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 2, 2]}, "uuid": "0"}, "image"),
            ({"type": "image"}, "image"),
            ({"type": "video_url", "video_url": {"url": "data:,"}}, "video"),
            ({"type": "video_embeds", "video_embeds": {"video_grid_thw": [2, 2, 2]}, "uuid": "0"}, "video"),
        ],
    )
    def test_every_kind_of_media_part_is_an_image_or_a_video(self, part, modality):
        shown = readable({"role": "user", "content": [part, {"type": "text", "text": "x", "extra": 1}]}, "messages[0]")
        assert shown["content"] == [{"type": modality}, {"type": "text", "text": "x"}]
        assert modalities([shown, {"content": "text"}, shown]) == [modality] * 2

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
            ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "messages[2].content[0]"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, message, param):
        with pytest.raises(PromptError) as raised:
            readable(message, "messages[2]")
        assert raised.value.param == param


CAT, DOG = Media("cat", "image", (1, 4, 4)), Media("dog", "image", (1, 2, 6))
FILM = Media("film", "video", (2, 2, 4), (0.25, 10.0), 0.5)
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"


class TestLayOut:
    def test_a_placeholder_stays_where_the_family_asks_for_no_more(self):
        text = f"a{IMAGE}b{VIDEO}{IMAGE}c"
        laid = lay_out(text, [CAT, FILM, DOG], FAMILIES["qwen2_5_vl"])
        assert laid == (text, [Piece(CAT, CAT.grid), Piece(FILM, FILM.grid), Piece(DOG, DOG.grid)])

    def test_each_step_of_a_video_stands_by_itself_with_its_time(self):
        text, pieces = lay_out(f"a{VIDEO}b", [FILM], FAMILIES["qwen3_vl"])
        step = f"seconds><|vision_start|>{VIDEO}<|vision_end|>"
        assert text == f"a<0.2 {step}<10.0 {step}b"
        assert pieces == [Piece(FILM, (1, 2, 4), 0), Piece(FILM, (1, 2, 4), 1)]

    def test_each_frame_in_tiles_has_its_number(self):
        text, pieces = lay_out("a<IMG_CONTEXT>\n<video>\nb", [CAT, FILM], FAMILIES["internvl"])
        own = "<img><IMG_CONTEXT></img>"
        assert text == f"a{own}\nFrame1: {own}\nFrame2: {own}\nb"
        assert [piece.step for piece in pieces] == [0, 0, 1]

    @pytest.mark.parametrize(
        ("text", "media"),
        [("", [CAT]), (IMAGE * 2, [CAT]), (VIDEO, [CAT]), (IMAGE + VIDEO, [FILM, CAT])],
        ids=["none", "more", "another kind", "another order"],
    )
    def test_other_placeholders_are_refused(self, text, media):
        with pytest.raises(PromptError, match=f"placeholders for {len(media)} images and videos"):
            lay_out(text, media, FAMILIES["qwen3_vl"])

    def test_a_video_that_does_not_tell_its_times_is_refused(self):
        with pytest.raises(PromptError, match="1 timestamps for a video of 2 steps"):
            lay_out(VIDEO, [Media("film", "video", (2, 2, 4), (0.25,))], FAMILIES["qwen3_vl"])


class TestExpand:
    def test_each_pad_takes_its_pieces_room(self):
        pieces = [Piece(media, media.grid) for media in (CAT, DOG, CAT)]
        prompt = expand([1, PAD, 2, PAD, PAD, 3], {PAD}, pieces, 2)
        assert prompt.token_ids == [1, *[PAD] * 4, 2, *[PAD] * 3, *[PAD] * 4, 3]
        assert [(item.mm_hash, item.offset, item.num_tokens) for item in prompt.items] == [
            ("cat", 1, 4),
            ("dog", 6, 3),
            ("cat", 9, 4),
        ]

    def test_pieces_of_a_video_share_its_rows(self):
        pieces = [Piece(FILM, (1, 2, 4), 0), Piece(FILM, (1, 2, 4), 1)]
        first, second = expand([1, PAD, 2, PAD], {PAD, 7}, pieces, 2).items
        assert (first.offset, first.row, first.num_tokens, first.num_rows) == (1, 0, 2, 4)
        assert (second.offset, second.row, second.num_tokens, second.num_rows) == (4, 2, 2, 4)

    def test_the_steps_of_a_video_are_as_far_apart_as_it_says(self):
        (film,) = expand([PAD], {PAD}, [Piece(FILM, FILM.grid)], 2, rate=4).items
        assert (film.interval, film.num_tokens) == (2.0, 4)
        assert expand([PAD], {PAD}, [Piece(CAT, CAT.grid)], 2, rate=4).items[0].interval == 1
        with pytest.raises(PromptError, match="second_per_grid_ts"):
            expand([PAD], {PAD}, [Piece(Media("film", "video", (1, 2, 2)), (1, 2, 2))], 2, rate=4)

    def test_media_beyond_any_context_are_refused_before_they_take_memory(self):
        huge = Media("cat", "image", (1, 1 << 20, 1 << 20))
        with pytest.raises(PromptError, match="274877906944 tokens fit into no context"):
            expand([PAD], {PAD}, [Piece(huge, huge.grid)], 2)

    @pytest.mark.parametrize("ids", [[1, 2], [PAD, PAD]])
    def test_other_numbers_of_pads_are_refused(self, ids):
        with pytest.raises(PromptError, match="placeholder tokens for 1 pieces"):
            expand(ids, {PAD}, [Piece(CAT, CAT.grid)], 2)

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
