"""The proxy: an OpenAI-compatible front for encoder, prefill and decode engines. No tensor passes through here."""
