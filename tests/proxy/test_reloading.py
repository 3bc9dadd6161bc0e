"""Another configuration: when it is read, what of it counts, what is said of a wrong one."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from proxy import derived
from proxy.reloading import LIVE, Configuration, verify
from proxy.settings import ProxySettings, Sources, Wrong
from tests.support.tls import Authority

D = "decode-servers-urls: [http://d:1]\n"


class Source:
    """A file, and the configuration that is read from it."""

    def __init__(self, folder: Path, text: str = D, *flags: str) -> None:
        self.file = folder / "proxy.yaml"
        self.file.write_text(text)
        self.now = 100.0
        self.configuration = Configuration(Sources.of(["--config", str(self.file), *flags]), lambda: self.now)

    def write(self, text: str) -> None:
        self.file.write_text(text)

    def look(self) -> bool:
        """As if it were looked at twice: a change counts once it has settled."""
        return self.configuration.look() or self.configuration.look()

    @property
    def settings(self) -> ProxySettings:
        return self.configuration.settings

    def metrics(self) -> list[float]:
        """Taken, refused, whether the last one was taken, and when the one in force was read."""
        registry = CollectorRegistry()
        registry.register(self.configuration.reloads)
        names = [("reloads_total", {"result": "ok"}), ("reloads_total", {"result": "refused"})]
        names += [("reload_success", {}), ("loaded_timestamp_seconds", {})]
        return [registry.get_sample_value(f"triptych_config_{name}", labels) or 0.0 for name, labels in names]


def test_every_live_setting_is_one() -> None:
    assert ProxySettings.model_fields.keys() >= LIVE
    assert not LIVE & {"host", "port", "workers", "config", "vision", "tls_cert", "kv_handoff"}


def test_a_changed_file_is_taken_once_it_has_settled(tmp_path: Path) -> None:
    source = Source(tmp_path)
    assert not source.look()
    source.write(D + "max-queue: 5\n")
    assert not source.configuration.look(), "it may still be written"
    source.write(D + "max-queue: 56\n")
    assert not source.configuration.look()
    assert source.configuration.look() and source.settings.max_queue == 56
    assert not source.look(), "once"
    assert derived.limits(source.settings).queue == 56


def test_a_link_that_is_switched_is_a_change(tmp_path: Path) -> None:
    """Kubernetes mounts proxy.yaml → ..data/proxy.yaml, and switches ..data."""
    for version, policy in (("one", "round_robin"), ("two", "random")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "proxy.yaml").write_text(f"{D}policy: {policy}\n")
    (tmp_path / "..data").symlink_to("one")
    (tmp_path / "proxy.yaml").symlink_to("..data/proxy.yaml")
    sources = Sources.of(["--config", str(tmp_path / "proxy.yaml")])
    configuration = Configuration(sources, lambda: 0.0)
    assert configuration.settings.policy == "round_robin"
    (tmp_path / "new").symlink_to("two")
    (tmp_path / "new").rename(tmp_path / "..data")
    assert not configuration.look() and configuration.look()
    assert configuration.settings.policy == "random"


def test_a_file_that_is_gone_is_told_once_and_waited_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As between the two steps of an editor."""
    source = Source(tmp_path)
    source.file.unlink()
    assert not source.look() and source.metrics()[1] == 0
    assert not source.look() and [record.message for record in caplog.records] == [
        f"{source.file} is gone: nothing is read again until it is back"
    ]
    source.write(D + "max-queue: 5\n")
    assert source.look() and source.settings.max_queue == 5


def test_a_bad_file_is_refused_with_its_line_and_the_old_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Source(tmp_path, D + "max-queue: 5\n")
    before = source.settings
    source.write(D + "max-queue: 6\npolicy: random\nqueue-timeout: 0\n")
    assert not source.look() and source.settings is before
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert errors == [
        "the new configuration is refused, the old one stays: "
        f"{source.file}:4: queue-timeout: Input should be greater than 0"
    ]
    assert source.metrics() == [0, 1, 0, 100]
    assert not source.look(), "what was refused is not read again and again"
    source.now = 200.0
    source.write(D + "max-queue: 6\n")
    assert source.look() and source.settings.max_queue == 6
    assert source.metrics() == [1, 1, 1, 200]


def test_what_needs_a_restart_is_told_and_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = Source(tmp_path, D + "port: 1\n")
    source.write(D + "port: 2\nworkers: 3\nmax-queue: 5\n")
    with caplog.at_level(logging.INFO):
        assert source.look()
    assert (source.settings.port, source.settings.workers, source.settings.max_queue) == (1, 1, 5)
    said = [record.getMessage() for record in caplog.records]
    assert (
        said
        == [
            "a new configuration is in force: max-queue",
            "port, workers: to change this, the proxy must be started again",
        ]
        or said[-1] == "workers, port: to change this, the proxy must be started again"
    )


def test_flags_come_before_another_file_too(tmp_path: Path) -> None:
    source = Source(tmp_path, D, "--max-queue", "7")
    source.write(D + "max-queue: 5\n")
    assert source.look() and source.settings.max_queue == 7


def test_a_signal_reads_again_what_has_not_changed(tmp_path: Path) -> None:
    source = Source(tmp_path)
    assert source.configuration.reload() and source.metrics()[0] == 1
    source.file.unlink()
    assert not source.configuration.reload() and source.metrics()[1] == 1


def test_a_change_that_a_signal_has_brought_is_not_taken_again(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.write(D + "max-queue: 5\n")
    assert source.configuration.reload()
    assert not source.look() and source.metrics()[0] == 1


def test_without_a_file_there_is_nothing_to_look_at(tmp_path: Path) -> None:
    configuration = Configuration(Sources.of(["--decode-servers-urls", "http://d:1"]), lambda: 0.0)
    assert not configuration.watched and not configuration.look()
    assert configuration.reload(), "keys and certificates may be read again"


KEY = "- {name: acme, hash: 'sha256:" + 64 * "0" + "'}\n"


def test_files_that_settings_name_are_watched_and_judged_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, admin = tmp_path / "keys.yaml", tmp_path / "admin"
    keys.write_text(KEY)
    admin.write_text("secret")
    source = Source(tmp_path, D, "--api-keys", str(keys), "--admin-key-file", str(admin))
    keys.write_text(KEY + "- {name: acme}\n")
    assert not source.look()
    assert f"--api-keys: {keys}: line 2: hash: Field required" in caplog.text
    keys.write_text(KEY)
    admin.write_text("")
    assert not source.look() and f"{admin} is empty" in caplog.text
    admin.write_text("another")
    assert source.look()


def test_certificates_are_judged(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    files = authority.files("proxy")
    settings = ProxySettings(decode_servers_urls="http://d:1", tls_cert=files.cert, tls_key=files.key)
    verify(settings)
    for name in ("tls_client_ca", "engine_ca", "engine_cert"):
        with pytest.raises(Wrong, match="nowhere"):
            verify(settings.model_copy(update={name: Path("/nowhere")}))


def test_another_process_s_word_is_followed(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.write("no YAML: [")
    source.configuration.follow(D + "max-queue: 5\nport: 9\n")
    assert (source.settings.max_queue, source.settings.port) == (5, 8000)
    assert source.configuration.text.endswith("port: 9\n")
