"""An encoder and a language engine in one process: the only place that knows both. Neither knows of the other."""
