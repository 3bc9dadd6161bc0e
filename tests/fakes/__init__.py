"""Scripted engines over real sockets. They compute nothing: each does what its script says, well or badly."""
