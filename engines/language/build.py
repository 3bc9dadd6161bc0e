"""Puts a language engine together from its settings, and takes it apart again. It serves nothing itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial

import aiohttp
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoConfig

from engines import dtypes
from engines.devices import devices_of, pinned
from engines.errors import SetupError
from engines.language.app import LanguageApp, Parts
from engines.language.embeddings import EmbeddingReceiver, Room
from engines.language.engine import LanguageEngine
from engines.language.handoff import Handoffs, Waits
from engines.language.kv import KVCache, KVLayout
from engines.language.metaserver import Metaserver
from engines.language.metrics import Metrics
from engines.language.model import LanguageModel, ModelFacts
from engines.language.parallel.carrier import Carrier, every
from engines.language.parallel.group import Group
from engines.language.parallel.ranks import Ranks, started
from engines.language.requests import Served
from engines.language.runner import Runner, runner_of
from engines.language.scheduler import Limits
from engines.language.service import Rules, Service
from engines.language.tokenizer import ChatTokenizer
from engines.language.varlen import block_size_for
from engines.settings import LanguageSettings
from engines.store.store import opened
from engines.tls import calls
from engines.transfer import create
from engines.transfer.base import Arena, Transfer, TransferError
from engines.weights import WeightsError


@asynccontextmanager
async def build(settings: LanguageSettings) -> AsyncIterator[LanguageApp]:
    """Load the language model, open the transfers, start the model thread, and end all of them. Raises SetupError."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    async with AsyncExitStack() as stack:
        ranks = await stack.enter_async_context(started(settings))
        model, tokenizer = await _load(settings, ranks)
        facts = model.facts
        layout = layout_of(settings, facts, model.dtype)
        transfers, kv_arena, embedding_arena = await _open(settings, layout, stack)
        # One call lasts as long as a prefill, so there may be many; a kept connection that has gone stale would fail a
        # POST, which nobody may repeat.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))
        arena = stack.enter_context(pinned(kv_arena.buffer, model.device))
        make = partial(step_parts, settings, model, layout, arena)
        cache, runner = ranks.leading(*await ranks.connect(model.device, make))
        await stack.enter_async_context(ranks.watched())
        limits = limits_of(settings, facts, layout)
        engine = LanguageEngine(limits, runner, cache, facts.eos_token_ids)
        engine.start()
        stack.push_async_callback(engine.close)
        metrics = Metrics(CollectorRegistry(), lambda: engine.stats)
        waits = Waits(settings.handoff_timeout, settings.kv_lease)
        metaserver = Metaserver(session, settings.metaserver_timeout, calls(settings))
        carrier = Carrier(transfers[0], ranks.links, ranks.steps.errand)
        handoffs = Handoffs(engine, carrier, (kv_arena, cache), waits, metrics, metaserver)
        stack.push_async_callback(handoffs.close)
        width = facts.embedding_width
        store = await stack.enter_async_context(opened(settings, metrics.registry))
        stack.enter_context(pinned(embedding_arena.buffer, model.device))
        room = Room(settings.embedding_block_tokens, settings.embedding_default_tokens)
        receiver = EmbeddingReceiver(transfers[-1], embedding_arena, width, settings.transfer_timeout, store, room)
        rules = Rules(facts.merge_size, facts.mrope, settings.max_queue, settings.request_timeout)
        service = Service(engine, handoffs, receiver, metrics, rules)
        served = Served(tokenizer, limits, facts.vocab_size)
        parts = Parts(engine, receiver, transfers, carrier, model.report, metrics, store)
        yield LanguageApp(settings, served, service, parts)


def layout_of(settings: LanguageSettings, facts: ModelFacts, dtype: torch.dtype) -> KVLayout:
    """The KV cache that fits --kv-blocks or --kv-bytes. Raises SetupError if that is not one block."""
    size = settings.block_size or block_size_for(settings.attention, dtype, torch.device(settings.device))
    one = KVLayout(facts.num_layers, 1, size, facts.num_kv_heads, facts.head_dim, dtype)
    num_blocks = settings.kv_blocks or int(settings.kv_bytes) // one.nbytes
    if num_blocks < 1:
        raise SetupError(f"--kv-bytes {int(settings.kv_bytes)} is less than one KV block of {one.nbytes} bytes")
    return replace(one, num_blocks=num_blocks)


def limits_of(settings: LanguageSettings, facts: ModelFacts, layout: KVLayout) -> Limits:
    """Raises SetupError when --max-model-len is more than the checkpoint has positions for."""
    longest = settings.max_model_len or facts.max_positions
    if longest > facts.max_positions:
        raise SetupError(f"--max-model-len {longest} is more than the checkpoint's {facts.max_positions} positions")
    return Limits(
        num_blocks=layout.num_blocks,
        block_size=layout.block_size,
        max_model_len=longest,
        max_num_seqs=settings.max_num_seqs,
        max_batched_tokens=settings.max_batched_tokens,
        prefix_cache=settings.prefix_cache,
        chunk_while_decoding=settings.chunk_while_decoding,
    )


async def _load(settings: LanguageSettings, ranks: Ranks) -> tuple[LanguageModel, ChatTokenizer]:
    def load() -> tuple[LanguageModel, ChatTokenizer]:
        return load_model(settings, ranks.group), ChatTokenizer(settings.model)

    try:
        loaded, _ = await every([asyncio.to_thread(load), ranks.load()])
    except (OSError, ValueError) as error:
        raise SetupError(f"--model {settings.model}: {error}") from None
    return loaded  # type: ignore[no-any-return]


def load_model(settings: LanguageSettings, group: Group) -> LanguageModel:
    """The share of a rank. Raises SetupError."""
    if not settings.model.is_dir():
        raise SetupError(f"--model {settings.model} is not a folder")
    if len(devices_of(settings.device)) > 1:
        raise SetupError(
            f"--device {settings.device}: a language engine takes one; --tensor-parallel takes those after it"
        )
    try:
        dtype = dtypes.chosen(settings.dtype, AutoConfig.from_pretrained(settings.model))
        return LanguageModel.load(settings.model, dtype, settings.device, group)
    except (OSError, ValueError, WeightsError) as error:
        raise SetupError(f"--model {settings.model}: {error}") from None


def step_parts(
    settings: LanguageSettings, model: LanguageModel, layout: KVLayout, arena: memoryview
) -> tuple[KVCache, Runner]:
    """What runs the steps of a rank. Raises SetupError: --attention cannot run here."""
    cache = KVCache(layout, arena, settings.device, apart=settings.kv_mirror)
    limits = limits_of(settings, model.facts, layout)
    decoding = (limits.max_num_seqs, limits.max_tokens) if settings.decode_graphs else None
    return cache, runner_of(model, cache, settings.attention, decoding, settings.layers_per_push)


async def _open(
    settings: LanguageSettings, layout: KVLayout, stack: AsyncExitStack
) -> tuple[list[Transfer], Arena, Arena]:
    """The transfer that carries KV first and, where that is another, the one that carries embeddings last."""
    name = settings.transfer
    try:
        transfers = [kv_transfer(settings)]
        if transfers[0].name != name:
            transfers.append(_create(settings, name))
        for transfer in transfers:
            stack.push_async_callback(transfer.close)
        transfers[0].facts = layout.facts()
        kv_arena = transfers[0].allocate("kv", layout.nbytes)
        embedding_arena = transfers[-1].allocate("embeddings", int(settings.embedding_bytes))
        for transfer in transfers:
            await transfer.start()
    except (TransferError, OSError) as error:
        raise SetupError(f"--transfer {name}: {error}") from None
    return transfers, kv_arena, embedding_arena


def kv_transfer(settings: LanguageSettings) -> Transfer:
    """That of --transfer, where it carries KV. Raises TransferError."""
    transfer = _create(settings, settings.transfer)
    return transfer if transfer.carries_kv else _create(settings, "shm")


def _create(settings: LanguageSettings, name: str) -> Transfer:
    return create(
        name,
        host=settings.transfer_bind,
        advertise=settings.transfer_host,
        rdma=settings.rdma,
        storage_path=settings.storage_path if name == settings.transfer else None,
    )
