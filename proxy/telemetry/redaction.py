"""What of a text may stand in a log: no credentials, no query of a URL, no bytes of media, no end of a line. Pure.

It is for words that others have chosen: messages of engines, paths, names in bodies. What a client asked is not for the
log in any form: whoever logs leaves it out, since nobody can tell it from a message.
"""

from __future__ import annotations

import re

_LONGEST = 300  # characters that are kept
_LOOKED_AT = 4 * _LONGEST

_DATA = re.compile(r"\bdata:[^\s,;\"']{0,64}(?:;[^\s,\"']{0,64})?,[^\s\"']*", re.IGNORECASE)
_USER = re.compile(r"\b([a-z][a-z0-9+.-]{1,15}://)[^\s/@\"']+@", re.IGNORECASE)
_QUERY = re.compile(r"\b([a-z][a-z0-9+.-]{1,15}://[^\s?#\"'<>]*)[?#][^\s\"'<>]*", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]+", re.IGNORECASE)
_KEY = re.compile(r"\b(sk|tk|key|token|pat)[-_][A-Za-z0-9_-]{12,}")
_LONG = re.compile(r"[A-Za-z0-9+/=_-]{65,}")  # 64 is a hash in hexadecimal digits
_CONTROL = re.compile(r"[\x00-\x1f\x7f\u2028\u2029]+")


def redacted(text: str) -> str:
    """`text` in one line of at most some hundred characters, with … for what is left out."""
    text = text if len(text) <= _LOOKED_AT else text[:_LOOKED_AT] + "…"
    text = _DATA.sub("data:…", text)
    text = _USER.sub(r"\1…@", text)
    text = _QUERY.sub(r"\1?…", text)
    text = _BEARER.sub(r"\1 …", text)
    text = _KEY.sub(r"\1-…", text)
    text = _LONG.sub(lambda found: found[0][:8] + "…", text)
    text = _CONTROL.sub(" ", text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
