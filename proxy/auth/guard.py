"""The door: whose request this is, what that key may still do, and how soon it may be tried again. Reads no body.

    credential ─▶ X-API-Key, else the bearer token
        none                             401
        wrong                            401, and a strike for the address
        wrong too often from there       429 for whatever has not been right from there before
        more than the key may            429 until when there is more

A key of ours is never told to an engine.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import TracebackType

from proxy.auth.keys import Key, Keys
from proxy.auth.quota import Quota, Refusal
from proxy.auth.strikes import Networks, Strikes, address
from proxy.errors import Forbidden, InvalidKey, RateLimited, TriedTooOften, Unauthorized
from proxy.http.message import Headers
from proxy.http.server import Request
from proxy.openai import Identity

_ADMIN = ""  # no key has this name
_ASKED = "this needs the admin key, in X-API-Key or as a bearer token"
_HOPS = 512  # letters of X-Forwarded-For that are read: those of the nearest proxies
_PLACES = 64  # addresses that a key is known to come from
_BUSY_S = 1.0  # where nobody knows when a place becomes free


@dataclass(frozen=True, slots=True)
class Rights:
    """What flags and files say of keys. None is open to all."""

    keys: Keys | None = None
    admin: str | None = None
    register: str | None = None  # of engines: to register with heartbeats, and to drain who is registered
    proxies: Networks = ()  # whose X-Forwarded-For is believed
    forward: bool = False  # clients' own credentials are for engines
    trust_client: bool = False
    salt: str = ""
    tenant_header: str = "authorization"


class Caller:
    """Who sends a request, and what it takes of its limits. `with` gives back its place."""

    __slots__ = ("_charged", "_clock", "_key", "_quota", "_took", "name", "tenant")

    def __init__(self, key: Key | None, quota: Quota | None, clock: Callable[[], float]) -> None:
        """`quota`: None where nothing is limited."""
        self._key = key
        self._quota = quota
        self._clock = clock
        self._charged = self._took = 0  # tokens
        self.name = "" if key is None else key.name
        self.tenant = "" if key is None else key.tenant

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._quota is not None and self._key is not None:
            self._quota.leave(self._key, self._took - self._charged, self._clock())

    def names(self, model: str) -> None:
        """The request is for `model`. Raises Forbidden."""
        if self._key is not None and not self._key.allows(model):
            what = f"the model {model!r}" if model else "a request that names no model"
            raise Forbidden(f"this key is not for {what}", param="model")

    def takes(self, tokens: int) -> None:
        """The request takes so many tokens, as far as that can be predicted."""
        if self._quota is not None and self._key is not None:
            self._quota.spend(self._key, tokens, self._clock())
            self._charged = self._took = tokens

    def took(self, tokens: int) -> None:
        """It has taken so many, of prompt and answer."""
        self._took = tokens

    def may_see(self, model: str) -> bool:
        """Whether `model` is one of those that the key is for."""
        return self._key is None or self._key.allows(model)


class Guard:
    """One for the whole process."""

    def __init__(self, rights: Rights, quota: Quota, clock: Callable[[], float]) -> None:
        self.rights = rights
        self._quota = quota
        self._clock = clock
        self._strikes = Strikes()
        self._places: dict[str, OrderedDict[str, None]] = {}  # where each key has been right, by its name
        self._anybody = Caller(None, None, clock)
        self._plain = Identity(trust_client=rights.trust_client)

    def __repr__(self) -> str:
        return f"<Guard {self.rights.keys!r} {self._strikes!r}>"

    def go_by(self, rights: Rights) -> None:
        """Other rights for the requests that come. Those in flight end as they began."""
        self.rights, self._plain = rights, Identity(trust_client=rights.trust_client)
        names = {_ADMIN, *(rights.keys or ())}
        self._places = {name: places for name, places in self._places.items() if name in names}

    def known(self, request: Request) -> Caller:
        """Who sends `request`, which counts for nothing. Raises InvalidKey, TriedTooOften."""
        keys = self.rights.keys
        if keys is None:
            return self._anybody
        return Caller(self._key(request, keys), None, self._clock)

    def admitted(self, request: Request) -> Caller:
        """Who sends `request`, with a place of its own until its `with` ends. Raises InvalidKey, TriedTooOften,
        RateLimited."""
        keys = self.rights.keys
        if keys is None:
            return self._anybody
        key = self._key(request, keys)
        if not key.limited:
            return Caller(key, None, self._clock)
        refusal = self._quota.enter(key, self._clock())
        if refusal is not None:
            raise _limited(refusal)
        return Caller(key, self._quota, self._clock)

    @property
    def locked(self) -> bool:
        """Whether changes of the fleet need a key."""
        return self.rights.admin is not None or self.rights.register is not None

    def admin(self, request: Request, *, engines: bool = False) -> None:
        """Whoever sends `request` may change the fleet, where a key is needed for that; `engines`: theirs will do, as
        it does for all where there is no other. Raises Unauthorized, TriedTooOften; Forbidden for what a page of
        another site has a browser send, where no key would keep it from that."""
        if not self.locked:
            _check_site(request.headers)
            return
        admin, register = self.rights.admin, self.rights.register
        asked = [key for key in ((admin, register) if engines or admin is None else (admin,)) if key is not None]
        given = _credential(request.headers)
        if not given:
            raise Unauthorized(_ASKED)
        right = any(hmac.compare_digest(given.encode(), key.encode()) for key in asked)
        where = self._look(request, _ADMIN if right else None)
        if not right:
            self._strikes.wrong(where, self._clock())
            raise Unauthorized(_ASKED)
        self._right(where, _ADMIN)

    def forwarded(self, headers: Headers, ours: bool) -> bool:
        """Whether engines may get the Authorization of a request, which needs a key of `ours`, or none."""
        return self.rights.forward and (not ours or "x-api-key" in headers)

    def identity(self, headers: Mapping[str, str], caller: Caller) -> Identity:
        """Whose media a request's are."""
        rights = self.rights
        if caller.tenant:
            return Identity(f"{rights.salt}\0\0{caller.tenant}".encode(), rights.trust_client)
        if not rights.salt:
            return self._plain
        # A key's name stands behind what no header can say: nobody tells that of another key.
        tenant = headers.get(rights.tenant_header.lower()) or f"\0\0{caller.name}"
        return Identity(f"{rights.salt}\0{tenant}".encode(), rights.trust_client)

    # ---- credentials

    def _key(self, request: Request, keys: Keys) -> Key:
        credential = _credential(request.headers)
        if not credential:
            raise InvalidKey("this needs an API key, as a bearer token or in X-API-Key")
        key = keys.find(credential)
        where = self._look(request, None if key is None else key.name)
        if key is None:
            self._strikes.wrong(where, self._clock())
            raise InvalidKey("no such API key")
        self._right(where, key.name)
        return key

    def _look(self, request: Request, name: str | None) -> str:
        """Where `request` comes from. Raises TriedTooOften if nothing from there is looked at now, but for the key with
        `name` if it has been right there: others may share the address with whoever guesses."""
        proxies = self.rights.proxies
        forwarded = request.headers.get("x-forwarded-for", "")[-_HOPS:] if proxies else ""
        where = address(request.peer, forwarded, proxies)
        wait = self._strikes.wait(where, self._clock()) if self._strikes else 0.0
        if wait and (name is None or where not in self._places.get(name, ())):
            raise TriedTooOften("too many wrong keys from this address", wait)
        return where

    def _right(self, where: str, name: str) -> None:
        places = self._places.get(name)
        if places is None:
            places = self._places[name] = OrderedDict()
        if where in places:
            return
        places[where] = None
        if len(places) > _PLACES:
            places.popitem(last=False)


def _check_site(headers: Headers) -> None:
    """Browsers say whose page a call is from: most of them in Sec-Fetch-Site, all in Origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    ours = origin is None or origin.partition("://")[2] == headers.get("host")
    if not (ours if site is None else site in ("same-origin", "none")):
        raise Forbidden("pages of other sites may change nothing here", code="other_site")


def _credential(headers: Headers) -> str:
    given = headers.get("x-api-key")
    if given is None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
    return given


def _limited(refusal: Refusal) -> RateLimited:
    what = f"{refusal.most} at once" if refusal.limit == "concurrent" else f"{refusal.most}"
    return RateLimited(f"this key's limit is reached: {refusal.limit} {what}", refusal.seconds or _BUSY_S)
