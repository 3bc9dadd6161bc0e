"""Which URLs pass, under every spelling that leads somewhere else."""

from __future__ import annotations

import socket
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import BadRequest, ForbiddenMedia
from proxy.media.addresses import Local, Remote, Rules, hosts, is_public, networks

OPEN = Rules()
FETCH = Rules(mode="fetch")
ROOTS = Rules(roots=(PurePosixPath("/data"), PurePosixPath("/more")))


@pytest.mark.parametrize("rules", [OPEN, FETCH], ids=["engines", "fetch"])
@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://cdn.example.com/a.png", Remote("https://cdn.example.com", "/a.png")),
        ("HTTP://CDN.example.com:8080", Remote("http://cdn.example.com:8080", "/")),
        ("http://example.com?a=b#c", Remote("http://example.com", "/?a=b")),
        ("http://example.com/ä/%20?x={1}#/ß", Remote("http://example.com", "/%C3%A4/%20?x=%7B1%7D")),
        ("http://1.1.1.1/a", Remote("http://1.1.1.1", "/a")),
        ("http://[2606:4700::1111]:80/a", Remote("http://[2606:4700::1111]:80", "/a")),
        ("http://[::ffff:8.8.8.8]/", Remote("http://[::ffff:8.8.8.8]", "/")),
        ("http://a_b.example.com./", Remote("http://a_b.example.com.", "/")),
        ("data:image/png;base64,AAAA", None),
        ("DATA:,x", None),
    ],
)
def test_what_may_be_named(rules: Rules, url: str, target: Remote | None) -> None:
    assert rules.judge(url) == target


LOOPBACK = [
    *("127.0.0.1", "127.1", "127.0.1", "2130706433", "017700000001", "0x7f000001", "0x7f.1", "0177.0.0.1"),
    *("0x7f.0x0.0x0.0x1", "127.0.0.1.", "127.255.255.254", "0", "0.0.0.0", "00", "0x", "[::1]", "[::]"),
    *("[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:7f00:1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]"),
    *("[2002:7f00:1::]", "localhost", "LOCALHOST.", "a.localhost", "redis", "kubernetes.default.svc.cluster.local"),
]
PRIVATE = [
    *("10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "100.64.0.1", "100.100.100.200", "169.254.169.254"),
    *("192.0.0.192", "168.63.129.16", "198.18.0.1", "224.0.0.1", "255.255.255.255", "240.0.0.1", "203.0.113.9"),
    *("[fe80::1]", "[fd00:ec2::254]", "[fc00::1]", "[ff02::1]", "[2001:db8::1]", "[2001::1]", "[fec0::1]", "[4000::]"),
    *(
        "[::ffff:a9fe:a9fe]",
        "[64:ff9b::a9fe:a9fe]",
        "[64:ff9b:1::1]",
        "2852039166",
        "0xa9fea9fe",
        "0251.0376.0251.0376",
    ),
    *("metadata.google.internal", "printer.local", "router.home.arpa", "1.2.3.256", "1.2.3", "08.8.8.8", "1.2.3.4.5"),
]


@pytest.mark.parametrize("host", LOOPBACK + PRIVATE)
@pytest.mark.parametrize("form", ["http://{}/", "https://{}:443/x?y#z", "HTTP://{}"])
def test_hosts_of_ones_own_network_are_refused_in_every_spelling(host: str, form: str) -> None:
    with pytest.raises(ForbiddenMedia) as caught:
        OPEN.judge(form.format(host), "messages[0].content[1]")
    assert (caught.value.status, caught.value.param) == (403, "messages[0].content[1]")


@given(st.one_of(st.integers(0, 2**32 + 9).map(str), st.from_regex(r"\A(0x?[0-9a-f]{0,9}\.){0,3}0?x?[0-9]{1,10}\.?\Z")))
def test_what_the_system_takes_for_an_address_passes_only_if_that_is_public(host: str) -> None:
    try:
        spelled = socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        spelled = None
    try:
        FETCH.judge(f"http://{host}/")
    except BadRequest:
        return
    assert spelled is None or (is_public(spelled) and spelled == host.rstrip("."))


@pytest.mark.parametrize(
    "url",
    [
        *("", "x", "/etc/passwd", "ftp://h.example/x", "gopher://x.example/", "javascript:1", "//h.example/x", "http"),
        *("http:/h.example/", "http://", "http:///x", "http://user@h.example/", "http://a:b@h.example/"),
        *("http://h.example\\@127.0.0.1/", "http://h.example/a b", "http://h.example/\r\nx: y", " http://h.example/"),
        *("http://h.example/\t", "http://①②⑦.0.0.1/", "http://bücher.example/", "http://h.example:0/"),
        *("http://h.example:65536/", "http://h.example:8o/", "http://[::1", "http://h.example:80:80/", "http://%31/"),
        *("http://h.example%2f@127.0.0.1/", "http://[fe80::1%25eth0]/", "http://h.example/" + "a" * 9000),
    ],
)
def test_what_is_no_url_that_all_read_alike(url: str) -> None:
    with pytest.raises(BadRequest) as caught:
        FETCH.judge(url)
    assert (caught.value.status, caught.value.code) == (400, "invalid_media_url")


def test_names_are_left_to_the_resolver_where_the_proxy_fetches() -> None:
    assert FETCH.judge("http://minio:9000/a") == Remote("http://minio:9000", "/a")
    with pytest.raises(ForbiddenMedia):
        FETCH.judge("http://127.1/")


def test_networks_open_what_is_not_of_the_internet() -> None:
    rules = Rules(networks=networks("10.0.0.0/8, fd00::/8"))
    assert (
        rules.judge("http://10.1.2.3/") and rules.judge("http://[fd00::1]/") and rules.judge("http://[::ffff:10.0.0.1]")
    )
    assert rules.reachable("10.0.0.1") and rules.reachable("8.8.8.8") and not rules.reachable("192.168.0.1")
    with pytest.raises(ForbiddenMedia):
        rules.judge("http://127.0.0.1/")


def test_hosts_may_be_listed() -> None:
    rules = Rules(hosts=hosts("cdn.example.com, *.Images.example.com,minio,8.8.8.8"))
    for host in ("cdn.example.com", "CDN.example.com.", "a.b.images.example.com", "minio:9000", "8.8.8.8"):
        assert rules.judge(f"http://{host}/")
    for host in ("images.example.com", "evilimages.example.com", "cdn.example.com.evil.com", "1.1.1.1", "redis"):
        with pytest.raises(ForbiddenMedia):
            rules.judge(f"http://{host}/")


def test_a_host_of_ones_own_network_may_be_listed_beside_any_other() -> None:
    rules = Rules(hosts=hosts("minio,*"), networks=networks("10.0.0.0/8"))
    for host in ("minio:9000", "cdn.example.com", "8.8.8.8", "10.0.0.1"):
        assert rules.judge(f"http://{host}/")
    for host in ("redis", "127.0.0.1", "metadata.google.internal"):
        with pytest.raises(ForbiddenMedia):
            rules.judge(f"http://{host}/")


def test_schemes_and_modes() -> None:
    https = Rules(schemes=frozenset({"https"}))
    assert https.judge("https://h.example/")
    for url in ("http://h.example/", "data:,x"):
        with pytest.raises(ForbiddenMedia, match="--media-schemes"):
            https.judge(url)
    refuse = Rules(mode="refuse", roots=(PurePosixPath("/"),))
    assert refuse.judge("data:,x") is None
    for url in ("http://h.example/", "file:///x"):
        with pytest.raises(ForbiddenMedia, match="send them inline"):
            refuse.judge(url)


def test_files_are_off_without_roots() -> None:
    with pytest.raises(ForbiddenMedia, match="--media-roots"):
        OPEN.judge("file:///etc/passwd")


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///data/a.png", "/data/a.png"),
        ("FILE://localhost/more/a%20b.png", "/more/a b.png"),
        ("file:///data/%2e%2ea/%252e%252e", "/data/..a/%2e%2e"),
    ],
)
def test_files_under_a_root(url: str, path: str) -> None:
    assert ROOTS.judge(url) == Local(PurePosixPath(path))


@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "/data/../etc/passwd", "/data/%2e%2e/etc/passwd", "/data/..%2fetc/passwd", "//etc/passwd"),
        *("/database/x", "/", "/data/a%00.png", "/data/x?y", "/data/x#y", "/data\\..\\x", "/proc/self/environ"),
    ],
)
@pytest.mark.parametrize("host", ["", "localhost", "elsewhere"])
def test_no_way_out_of_the_roots(host: str, path: str) -> None:
    with pytest.raises(ForbiddenMedia):
        ROOTS.judge(f"file://{host}{path}")


@pytest.mark.parametrize("text", ["http://x", "a b", "**", "a.*.b", "*x.com", "h:80"])
def test_wrong_hosts(text: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        hosts(text)


@pytest.mark.parametrize("text", ["10.0.0.1/8", "x", "10.0.0.0/33"])
def test_wrong_networks(text: str) -> None:
    with pytest.raises(ValueError, match=text):
        networks(text)


@pytest.mark.parametrize(("address", "public"), [("1.1.1.1", True), ("fe80::1%eth0", False), ("2606:4700::1", True)])
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(address) is public
