"""How an engine becomes part of the fleet: listed, asked who it is, fitted in, and alive by its heartbeats."""
