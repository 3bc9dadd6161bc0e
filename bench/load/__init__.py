"""`triptych bench`: a small load generator for any OpenAI-compatible URL. Starts no server."""
