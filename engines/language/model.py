"""The language half of a vision-language checkpoint: transformers' own text model and head, with our attention. It
loads no tensor of the vision tower, keeps no KV, and samples nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationConfig

from engines import weights
from engines.errors import SetupError
from engines.families import family_of, merge_size
from engines.language import attention
from engines.language.parallel.group import Alone, Group
from engines.language.parallel.sharding import refuse_unequal, shard


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rest of the engine needs to know of a checkpoint. `deepstack_levels` is 0 for families without; without
    `mrope` a token's position is its index."""

    family: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int
    merge_size: int
    mrope: bool
    deepstack_levels: int
    image_token_id: int
    eos_token_ids: tuple[int, ...]

    @property
    def embedding_width(self) -> int:
        """Columns of an item's embedding: the main one first, then one per deepstack level."""
        return self.hidden_size * (1 + self.deepstack_levels)

    def shared_by(self, ranks: int) -> ModelFacts:
        """The facts of one rank's share."""
        return replace(self, num_heads=self.num_heads // ranks, num_kv_heads=self.num_kv_heads // ranks)

    @classmethod
    def read(cls, folder: Path) -> ModelFacts:
        """Facts from the configuration files alone.

        :raises SetupError: this engine cannot serve the model; the message says why.
        """
        config = AutoConfig.from_pretrained(folder)
        family = family_of(folder, config)
        text = config.text_config
        levels = len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
        refuse_unsupported(folder, text, levels)
        return cls(
            family=config.model_type,
            num_layers=text.num_hidden_layers,
            num_heads=text.num_attention_heads,
            num_kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            hidden_size=text.hidden_size,
            vocab_size=text.vocab_size,
            max_positions=text.max_position_embeddings,
            merge_size=merge_size(config),
            mrope=family.mrope,
            deepstack_levels=levels,
            image_token_id=config.image_token_id,
            eos_token_ids=eos_token_ids(folder, text),
        )


def refuse_unsupported(folder: Path, text: Any, levels: int) -> None:
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise SetupError(
            f"{folder} uses sliding-window attention, which this engine has not; set use_sliding_window to false"
        )
    if levels >= text.num_hidden_layers:
        raise SetupError(f"{folder} has {levels} deepstack levels for {text.num_hidden_layers} layers")
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise SetupError(f"{folder} scales its rotary embedding by the longest sequence of a batch (rope_type {rope})")


def eos_token_ids(folder: Path, text: Any) -> tuple[int, ...]:
    """The ids that end a text: the generation config's, as `generate` has it, else the model's."""
    ids = None
    if (folder / "generation_config.json").exists():
        ids = GenerationConfig.from_pretrained(folder).eos_token_id
    if ids is None:
        ids = getattr(text, "eos_token_id", None)
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, Iterable) else (int(ids),)


class LanguageModel(nn.Module):
    """A text model and its head, or one rank's share of them. `facts` describes it, `report` tells which tensors were
    read."""

    facts: ModelFacts
    report: weights.LoadReport

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = AutoModel.from_config(config.text_config, attn_implementation=attention.NAME)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)

    @classmethod
    def load(
        cls, folder: Path | str, dtype: torch.dtype = torch.float32, device: str = "cpu", group: Group | None = None
    ) -> LanguageModel:
        """Read the language tensors of a Hugging Face folder, or what this rank of the `group` needs of them.

        :raises SetupError: the model is of another kind, or the ranks cannot share it.
        :raises engines.weights.WeightsError: tensors are missing or misshapen.
        """
        folder = Path(folder)
        facts = ModelFacts.read(folder)
        config, group = AutoConfig.from_pretrained(folder), group or Alone()
        refuse_unequal(config.text_config, group.size)
        model = weights.on_meta(lambda: cls(config))
        model.facts = facts.shared_by(group.size)
        model.report = weights.load(model, folder, "language", dtype, device, cuts=shard(model, group))
        return model

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings, `[T]` → `[T, hidden]`; fresh memory that the caller may write to."""
        hidden: torch.Tensor = self.model.embed_tokens(token_ids)
        return hidden

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        step: attention.Step,
        deepstack: Sequence[Deepstack],
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Packed embeddings `[T, hidden]` at `positions` `[3, T]` → the logits of `rows`, `[len(rows), vocab]`.

        `rows` may name the last row of a sequence's share of the step, no others: the last layer spares the rest.

        The layers are driven here, not by transformers' `forward`, which would build masks and finish every row of
        the last layer: without that a four-layer model's prefill is 1.3 times as fast.
        """
        hidden = hidden[None]
        rotary = self.model.rotary_emb(hidden, positions[:, None] if self.facts.mrope else positions[:1])
        *layers, last = self.model.layers
        for index, layer in enumerate(layers):
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary, step=step)
            for extra in deepstack:
                extra.add(hidden[0], index)
        attended, _ = last.self_attn(
            hidden_states=last.input_layernorm(hidden), attention_mask=None, position_embeddings=rotary, step=step
        )
        kept = hidden[0].index_select(0, rows) + attended[0].index_select(0, rows)
        kept = kept + last.mlp(last.post_attention_layernorm(kept))
        logits: torch.Tensor = self.lm_head(self.model.norm(kept))
        return logits


@dataclass(frozen=True, slots=True)
class Deepstack:
    """An item's deeper vision features, `[rows, levels, hidden]`: level i is added to its rows after layer i."""

    first: int
    levels: torch.Tensor

    def add(self, hidden: torch.Tensor, layer: int) -> None:
        rows, count, _ = self.levels.shape
        if layer < count:
            hidden[self.first : self.first + rows] += self.levels[:, layer]
