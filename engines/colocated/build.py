"""Puts both engines of one process together, each with its own queue, threads and memory. It serves nothing itself."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from engines.colocated.app import ColocatedApp, over
from engines.colocated.lending import Lender
from engines.encoder import app as encoding
from engines.language import build as language
from engines.register import registered
from engines.serve import running
from engines.settings import ColocatedSettings

log = logging.getLogger(__name__)


@asynccontextmanager
async def build(settings: ColocatedSettings) -> AsyncIterator[ColocatedApp]:
    """Raises SetupError. With --encoder-port the encoder is served, too, as if it were alone."""
    of_encoder = settings.of_encoder()
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(encoding.build(of_encoder))
        of_language = settings.model_copy(update={"embedding_store": ()})  # the encoder looks there already
        app = await stack.enter_async_context(language.build(of_language))
        app.lend = Lender(encoder.encoder).lend
        both = ColocatedApp(app, encoder)
        if settings.encoder_port is not None:
            encoder.registry = over(encoder.registry)  # the metrics of its HTTP are not those of the other's
            both.encoder_url = await stack.enter_async_context(running(encoder, of_encoder))
            await stack.enter_async_context(registered(of_encoder, lambda: encoder.role, both.encoder_url))
            log.info("the encoder serves at %s", both.encoder_url)
        yield both
