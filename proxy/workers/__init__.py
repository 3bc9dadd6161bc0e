"""Several processes on one port: their supervisor, and the memory and words that they share."""
