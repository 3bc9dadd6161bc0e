"""The ways in which a scripted engine fails a call, and what each looks like on the wire.

An engine stays healthy to probes meanwhile: the faults that only requests meet are the ones that proxies get wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import orjson

from bench.scripted import answers
from bench.scripted.server import JSON, Connection, head

AFTER_TOKENS = 5
RETRY_AFTER_S = 1


class Fault(StrEnum):
    RESET = "reset"  # the connection is reset before any answer
    SERVER_ERROR = "500"
    BUSY = "429"
    CLIENT_ERROR = "400"
    HANG = "hang"  # no answer, ever
    GARBAGE = "garbage"  # bytes that are not HTTP
    HTML = "html"  # 200 with a web page
    SHORT = "short"  # a body shorter than its length; a stream that ends in order after some tokens, without [DONE]
    ERROR_EVENT = "error-event"  # 200, then an error where content was due
    CUT = "cut"  # reset after some tokens, or in the middle of a body
    STALL = "stall"  # silence after some tokens, or in the middle of a body


BEFORE_CONTENT = frozenset(Fault) - {Fault.SHORT, Fault.CUT, Fault.STALL}


def fail(fault: Fault, connection: Connection, streamed: Sequence[bytes], body: object) -> None:
    """Give the answer of `fault`. `streamed`: the events that would have been sent, empty for an unstreamed call,
    whose whole answer would have been `body`."""
    match fault:
        case Fault.RESET:
            connection.reset()
        case Fault.HANG:
            pass
        case Fault.GARBAGE:
            connection.raw(b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n")
            connection.close()
        case Fault.HTML:
            connection.respond(200, b"<html><body>Welcome to nginx!</body></html>", "text/html")
        case Fault.SERVER_ERROR | Fault.BUSY | Fault.CLIENT_ERROR:
            status = int(fault)
            again = f"Retry-After: {RETRY_AFTER_S}\r\n" if fault is Fault.BUSY else ""
            connection.respond(status, answers.error("scripted failure", status), extra=again)
        case _ if streamed:
            _break_stream(fault, connection, streamed)
        case _:
            _break_body(fault, connection, orjson.dumps(body))


def _break_stream(fault: Fault, connection: Connection, streamed: Sequence[bytes]) -> None:
    connection.begin()
    if fault is Fault.ERROR_EVENT:
        connection.write(b"data: " + orjson.dumps(answers.error("scripted failure", 500)) + b"\n\n" + answers.DONE)
        connection.end()
        return
    for piece in streamed[: min(AFTER_TOKENS, len(streamed) - 1)]:
        connection.write(piece)
    if fault is Fault.SHORT:
        connection.end()
    elif fault is Fault.CUT:
        connection.cut()


def _break_body(fault: Fault, connection: Connection, data: bytes) -> None:
    if fault is Fault.ERROR_EVENT:
        connection.respond(200, answers.error("scripted failure", 500))
        return
    connection.raw(head(200, JSON, f"Content-Length: {len(data)}\r\n") + data[: len(data) // 2])
    if fault is Fault.SHORT:
        connection.close()
    elif fault is Fault.CUT:
        connection.cut()
