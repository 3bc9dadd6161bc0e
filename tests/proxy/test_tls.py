"""Certificates on real connections: whose are taken, what is read again, which file is named when one is bad."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme

from proxy.http.client import Client, ConnectFailed, Cut
from proxy.http.message import Response
from proxy.http.server import Request
from proxy.tls import Connector, Files, Listener
from tests.support.raw_http import serving
from tests.support.tls import Authority


async def echo(request: Request) -> Response:
    return Response(200, bytes(await request.read()))


async def ask(port: int, caller: Connector) -> bytes:
    client = Client(5.0, tls=lambda: caller.context)
    client.open()
    try:
        async with client.request("POST", f"https://127.0.0.1:{port}", "/", body=b"hello") as exchange:
            assert exchange.status == 200
            return await exchange.read()
    finally:
        await client.close()


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


async def test_whose_certificate_comes_from_elsewhere_is_no_engine_of_ours(ca: Authority) -> None:
    async with serving(echo, tls=Listener(ca.files("server")).context) as s:
        with pytest.raises(ConnectFailed, match="TLS: unable to get local issuer certificate"):
            await ask(s.port, Connector(Files()))
    async with serving(echo, tls=Listener(ca.files("server", "elsewhere.example")).context) as s:
        with pytest.raises(ConnectFailed, match=r"TLS: .*certificate is not valid for '127\.0\.0\.1'"):
            await ask(s.port, Connector(Files(ca=ca.path)))


async def test_clients_without_a_certificate_are_not_served_where_one_is_asked_for(ca: Authority) -> None:
    listener = Listener(ca.files("server", ca=ca.path))
    async with serving(echo, tls=listener.context) as s:
        with pytest.raises(Cut):
            await ask(s.port, Connector(Files(ca=ca.path)))
        assert await ask(s.port, Connector(ca.files("client", "me", ca=ca.path))) == b"hello"


async def test_what_was_replaced_is_read_again_by_both_sides(ca: Authority, tmp_path: Path) -> None:
    listener = Listener(ca.files("server", ca=ca.path))
    caller = Connector(mine := ca.files("client", "me", ca=ca.path))
    other = Authority(tmp_path, "other")
    async with serving(echo, tls=listener.context) as s:
        assert await ask(s.port, caller) == b"hello"
        before = ca.path.read_bytes()
        try:
            ca.path.write_bytes(other.path.read_bytes())
            listener.reread()
            with pytest.raises(Cut):
                await ask(s.port, caller)  # shows a certificate of the old authority
            caller.reread()
            with pytest.raises(ConnectFailed, match="TLS: "):
                await ask(s.port, caller)  # trusts the new one alone, from which the server has none
            for mine_now in (other.files("server"), other.files("client", "me")):
                for written, place in ((mine_now.cert, mine.cert), (mine_now.key, mine.key)):
                    assert written is not None and place is not None
                    (place.parent / written.name).write_bytes(written.read_bytes())
            listener.reread()
            caller.reread()
            assert await ask(s.port, caller) == b"hello"
        finally:
            ca.path.write_bytes(before)


async def test_a_session_is_not_resumed_where_clients_are_known_by_their_certificates(ca: Authority) -> None:
    for asked, again in ((None, True), (ca.path, False)):
        listener = Listener(ca.files("server", ca=asked))
        context = ca.trusting(ca.files("client", "me"))
        async with serving(echo, tls=listener.context) as s:
            first = await s.connect(ssl=context)
            first.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
            await first.answer()
            session = first.writer.get_extra_info("ssl_object").session
            assert (session is not None and session.has_ticket) is again


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        ({"cert": None}, r"gone\.crt, .*server\.key: No such file"),
        ({"key": b"no key"}, r"server\.crt, .*: "),
        ({"ca": b"no authority"}, r"bad\.pem: "),
    ],
)
def test_bad_files_are_named_and_change_nothing(tmp_path: Path, spoil: dict[str, bytes | None], says: str) -> None:
    good = Authority(tmp_path).files("server", ca=tmp_path / "ca.pem")
    bad = Files(
        tmp_path / "gone.crt" if "cert" in spoil else good.cert,
        _written(tmp_path / "bad.key", spoil["key"]) if "key" in spoil else good.key,
        _written(tmp_path / "bad.pem", spoil["ca"]) if "ca" in spoil else good.ca,
    )
    for kind in (Listener, Connector):
        with pytest.raises(ValueError, match=says):
            kind(bad)


def test_a_file_that_became_bad_leaves_what_was_read_before(tmp_path: Path) -> None:
    files = Authority(tmp_path).files("server")
    listener, caller = Listener(files), Connector(files)
    before = caller.context
    assert files.cert is not None
    files.cert.write_bytes(b"")
    for one in (listener, caller):
        with pytest.raises(ValueError, match=r"server\.crt"):
            one.reread()
    assert caller.context is before


def test_an_encrypted_key_asks_nobody(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(trustme.CA().private_key_pem.bytes(), None)
    files = Authority(tmp_path).files("server")
    assert files.key is not None
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(ValueError, match="the key is encrypted"):
        Listener(files)


def test_no_version_before_1_2_is_spoken(ca: Authority) -> None:
    for context in (Listener(ca.files("server")).context, Connector(Files()).context):
        assert context.minimum_version is ssl.TLSVersion.TLSv1_2


def _written(path: Path, content: bytes | None) -> Path:
    path.write_bytes(content or b"")
    return path
