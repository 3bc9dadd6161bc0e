"""Which media URLs clients may name: schemes, hosts, addresses, folders. Pure: nothing is resolved, opened or fetched.

A URL is read so narrowly that no two readers can take it for two hosts: no credentials, no backslash, no blank, no
letter outside ASCII in a host, and of an address only its one usual spelling (`127.0.0.1`; not `2130706433`, `0x7f.1`
or `0177.0.0.1`, all of which the system's resolver takes for it).

Addresses that are not of the open Internet: IANA's special-purpose registries (RFC 6890 and its updates), those that
carry such an IPv4 address inside (RFC 4291, 6052), and those at which clouds answer their own machines.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import PurePosixPath
from typing import Literal, TypeAlias
from urllib.parse import quote, unquote

from proxy.errors import BadRequest, ForbiddenMedia

Network: TypeAlias = IPv4Network | IPv6Network
Mode: TypeAlias = Literal["refuse", "engines", "fetch"]

SCHEMES = ("data", "http", "https", "file")

_LONGEST = 8192  # characters of a URL
_HTTP = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<path>[/?][^\x00-\x20\x7f\\#]*)?(?:\#[^\x00-\x20\x7f\\]*)?",
    re.IGNORECASE,
)
_FILE = re.compile(r"file://(?:localhost)?(?P<path>/[^\x00-\x1f\x7f\\?#]*)", re.IGNORECASE)
_NUMBER = re.compile(r"0x[0-9a-f]*|[0-9]+", re.IGNORECASE)
_UNQUOTED = "/?%:@!$&'()*+,;=~-._[]"

_PRIVATE_4 = tuple(
    IPv4Network(net)
    for net in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
        *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # Azure's own services, seen from its machines
    )
)
_PUBLIC_6 = IPv6Network("2000::/3")
_PRIVATE_6 = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_CARRIERS = tuple(map(IPv6Network, ("::ffff:0:0/96", "64:ff9b::/96")))  # of an IPv4 address in the last 32 bits

# Names that no public host has (RFC 6761, 6762, 8375; ICANN on .internal), besides those without a dot.
_PRIVATE_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa")


@dataclass(frozen=True, slots=True)
class Remote:
    """A URL over HTTP: `origin` as `scheme://host[:port]`, `path` with its query, quoted as it goes over the wire."""

    origin: str
    path: str


@dataclass(frozen=True, slots=True)
class Local:
    """A file, by its absolute path, unquoted and without `..`; links in it are not resolved."""

    path: PurePosixPath


@dataclass(frozen=True, slots=True)
class Rules:
    """`mode`: who fetches media behind URLs. `hosts`: names, `*.domain` or `*`; none: any. `networks`: where hosts may
    be besides the open Internet. `roots`: folders that `file://` may name; none: no files."""

    mode: Mode = "engines"
    schemes: frozenset[str] = frozenset(SCHEMES)
    hosts: tuple[str, ...] = ()
    networks: tuple[Network, ...] = ()
    roots: tuple[PurePosixPath, ...] = ()

    def judge(self, url: str, param: str | None = None) -> Remote | Local | None:
        """Where the media of `url` are; None: in the URL itself. Raises BadRequest, ForbiddenMedia naming `param`.

        Where engines fetch, names are judged by what they look like: nobody knows what an engine will resolve them to.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme not in SCHEMES:
            known = ", ".join(f"{name}:" for name in SCHEMES if name in self.schemes)
            raise BadRequest(f"a media URL begins with one of {known}", param=param, code="invalid_media_url")
        if scheme not in self.schemes:
            raise ForbiddenMedia(f"{scheme}: URLs are not taken here (--media-schemes)", param=param)
        if scheme == "data":
            return None
        if self.mode == "refuse":
            raise ForbiddenMedia("media behind URLs are not taken here: send them inline (--media-urls)", param=param)
        return self._file(url, param) if scheme == "file" else self._remote(url, param)

    def reachable(self, address: str) -> bool:
        """Whether media may come from this IP address."""
        ip = _plain(ip_address(address.partition("%")[0]))
        return _public(ip) or any(ip in network for network in self.networks if network.version == ip.version)

    def _remote(self, url: str, param: str | None) -> Remote:
        found = _HTTP.fullmatch(url) if len(url) <= _LONGEST else None
        if found is None or int(found["port"] or 1) not in range(1, 1 << 16):
            raise BadRequest("the media URL is malformed", param=param, code="invalid_media_url")
        host = found["host"].lower()
        literal = _literal(host)
        if literal is None:
            allowed = self._named(host)
        else:
            listed = not self.hosts or host in self.hosts or "*" in self.hosts
            allowed = listed and literal != "" and self.reachable(literal)
        if not allowed:
            raise ForbiddenMedia("media may not come from this host (--media-hosts, --media-networks)", param=param)
        origin = f"{found['scheme'].lower()}://{host}" + (f":{found['port']}" if found["port"] else "")
        path = quote(found["path"] or "/", safe=_UNQUOTED)
        return Remote(origin, path if path.startswith("/") else "/" + path)

    def _named(self, host: str) -> bool:
        """Whether a name may be resolved by whoever fetches."""
        name = host.rstrip(".")
        if name in self.hosts:
            return True
        listed = not self.hosts or any(rule[0] == "*" and name.endswith(rule[1:]) for rule in self.hosts)
        private = "." not in name or any(f".{name}".endswith(f".{end}") for end in _PRIVATE_NAMES)
        return listed and bool(name) and (self.mode == "fetch" or not private)

    def _file(self, url: str, param: str | None) -> Local:
        if not self.roots:
            raise ForbiddenMedia("file: URLs are not taken here (--media-roots)", param=param)
        found = _FILE.fullmatch(url) if len(url) <= _LONGEST else None
        path = PurePosixPath(unquote(found["path"], errors="surrogateescape")) if found else None
        inside = path is not None and any(path.is_relative_to(root) for root in self.roots)
        if path is None or not inside or ".." in path.parts or "\0" in str(path):
            # The same answer whether the file exists or not: what lies outside the roots is nobody's business.
            raise ForbiddenMedia("the file is outside of what may be read (--media-roots)", param=param)
        return Local(path)


def hosts(text: str) -> tuple[str, ...]:
    """Of a flag: `cdn.example.com,*.images.example.com`, in lower case. Raises ValueError."""
    found = tuple(entry.strip().lower() for entry in text.split(",") if entry.strip())
    for entry in found:
        if not re.fullmatch(r"(\*\.)?[a-z0-9._-]+|\[[0-9a-f:.]+\]|\*", entry):
            raise ValueError(f"{entry!r} is no host: cdn.example.com, *.example.com, an address, or * for any")
    return found


def networks(text: str) -> tuple[Network, ...]:
    """Of a flag: `10.0.0.0/8,fd00::/8`. Raises ValueError."""
    return tuple(ip_network(entry.strip()) for entry in text.split(",") if entry.strip())


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open Internet. Raises ValueError if it is none."""
    return _public(_plain(ip_address(address.partition("%")[0])))


def _plain(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 address carries, else itself."""
    if isinstance(ip, IPv6Address) and any(ip in network for network in _CARRIERS):
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def _public(ip: IPv4Address | IPv6Address) -> bool:
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _PRIVATE_4)
    return ip in _PUBLIC_6 and not any(ip in network for network in _PRIVATE_6)


def _literal(host: str) -> str | None:
    """The address that a URL's host spells; empty if it spells one in an unusual way, None if it is a name.

    As browsers have it (WHATWG URL, "ends in a number"): what ends in a number is an address, or nothing.
    """
    if host.startswith("["):
        bare = host[1:-1]
    elif _NUMBER.fullmatch(host.rstrip(".").rpartition(".")[2]):
        bare = host
    else:
        return None
    try:
        return str(ip_address(bare))
    except ValueError:
        return ""
