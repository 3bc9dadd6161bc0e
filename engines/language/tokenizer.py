"""Text to tokens and back: chat prompts with the places of their images and videos, and text that streams out token by
token. It sees no pixels, only the grids that say how many tokens each item takes.

What a client writes never becomes an item: tokens that mark media are ordinary text when they stand in a message, a
tool description or a completion prompt. Other special tokens (`<|im_end|>` and the like) mean what they mean to
transformers' processors.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import decoders
from transformers import AutoConfig, AutoTokenizer

from engines.errors import SetupError
from engines.families import family_of, merge_size
from engines.language.prompt import Guard, Media, Prompt, PromptError, expand, lay_out, modalities, readable

# Parameters of `apply_chat_template` that are no business of a request's chat_template_kwargs.
RESERVED = frozenset(
    {
        "conversation",
        "tools",
        "chat_template",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
    }
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "messages"}
)

# Byte-level BPE writes each byte as one printable character: Latin-1's visible ones as themselves, the others from
# U+0100 on.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF = {chr(byte): byte for byte in VISIBLE} | {
    chr(256 + n): byte for n, byte in enumerate(byte for byte in range(256) if byte not in VISIBLE)
}


class ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face folder. Safe to use from several threads at once.

    :raises SetupError: the tokenizer is not byte-level.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        config = AutoConfig.from_pretrained(folder)
        self.merge_size = merge_size(config)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._backend = self._tokenizer.backend_tokenizer
        if not isinstance(self._backend.decoder, decoders.ByteLevel):
            raise SetupError(f"the tokenizer of {folder} is not byte-level; this engine streams byte-level BPE only")
        self._template = chat_template(folder, self._tokenizer)
        added = self._backend.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self._family = family_of(folder, config)
        self._guard = Guard(self._family.media_tokens)
        self.pads = frozenset(map(self._backend.token_to_id, self._family.pads))
        self._rate: float = getattr(config.vision_config, "tokens_per_second", 0) or 0
        self._prefix: list[int] = self._backend.encode("").ids  # a beginning-of-text token, if any

    def encode(self, text: str) -> list[int]:
        """The tokens of a completion prompt."""
        return self._prefix + self._encode(self._guard.hide(text))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        media: Sequence[Media] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt of OpenAI messages. `media` describes their media parts in order, whatever these parts contain.

        `options` are for the template: `add_generation_prompt`, `continue_final_message`, and what the model's own
        template reads.

        :raises PromptError: a part is of an unknown kind, `media` does not match the parts, or the template refuses.
        """
        shown = [readable(message, f"messages[{n}]") for n, message in enumerate(messages)]
        if (found := modalities(shown)) != [part.modality for part in media]:
            raise PromptError(
                f"the messages hold {len(found)} media, but {len(media)} others are described", "messages"
            )
        text, pieces = lay_out(self._render(shown, tools, options or {}), media, self._family)
        return expand(self._encode(text), self.pads, pieces, self.merge_size, self._rate)

    def _render(self, messages: Sequence[Any], tools: Sequence[Any] | None, options: Mapping[str, Any]) -> str:
        if self._template is None:
            raise PromptError("the model has no chat template; use /v1/completions")
        if reserved := sorted(RESERVED & options.keys()):
            raise PromptError(f"{reserved[0]} is not for a chat template", "chat_template_kwargs")
        options = {"add_generation_prompt": not options.get("continue_final_message", False), **options}
        try:
            text: str = self._tokenizer.apply_chat_template(
                self._guard.hide(messages),
                tools=self._guard.hide(tools),
                chat_template=self._template,
                tokenize=False,
                **self._guard.hide(options),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise PromptError(f"the chat template refuses these messages: {error}", "messages") from error
        return text

    def _encode(self, guarded: str) -> list[int]:
        ids: list[int] = []
        for text, literal in self._guard.split(guarded):
            # A literal goes in two halves, neither of them special: the tokenizer's own switch for this is state
            # shared by all threads.
            for piece in (text, literal[:1], literal[1:]) if literal else (text,):
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special or not; none for ids that pad the vocabulary."""
        if (known := self._bytes.get(token_id)) is not None:
            return known
        token = self._backend.id_to_token(token_id)
        found = self._bytes[token_id] = b"" if token is None else bytes_of(token)
        return found

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The whole text at once: what a `Detokenizer` gives in pieces."""
        detokenizer = Detokenizer(self, skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.finish()


class Detokenizer:
    """Turns one sequence's tokens into text as they come.

    A character is handed out when its last byte is here, not before.
    """

    def __init__(self, tokenizer: ChatTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete; may be empty."""
        tokenizer = self._tokenizer
        shown = (i for i in token_ids if not (self._skip and tokenizer.is_special(i)))
        return self._decoder.decode(b"".join(map(tokenizer.token_bytes, shown)))

    def finish(self) -> str:
        """What is left when no token follows: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", final=True)


def bytes_of(token: str) -> bytes:
    """The bytes behind a vocabulary entry.

    One with a character outside the byte alphabet is an added token, and is its own text.
    """
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def chat_template(folder: Path, tokenizer: Any) -> Any:
    """The template that a processor would use: chat_template.json in folders of 2024, else what the tokenizer found."""
    legacy = folder / "chat_template.json"
    if legacy.exists() and not (folder / "chat_template.jinja").exists():
        return json.loads(legacy.read_text())["chat_template"]
    return tokenizer.chat_template
