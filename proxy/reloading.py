"""The configuration in force, and what becomes of another one: read, judged, taken or refused. Applies nothing itself.

    the file changes, SIGHUP ──▶ reload ──Wrong──▶ refused: the old one stays, the log names file, line and key
                                    └───▶ taken: what is LIVE is other settings now, the rest waits for a restart

A file that is written in place is not read half: a change counts once nothing has changed for one look. What a link
leads to is looked at, not the link: Kubernetes switches one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.derived import Secrets
from proxy.settings import ProxySettings, Sources, Wrong
from proxy.settings.admission import AdmissionSettings
from proxy.settings.choosing import ChoosingSettings
from proxy.settings.patience import PatienceSettings
from proxy.settings.security import SecuritySettings

log = logging.getLogger(__name__)

_LISTENING = {
    *("admin_host", "admin_port", "tls_cert", "tls_key", "tls_client_ca", "engine_ca", "engine_cert", "engine_cert_key")
}
LIVE = frozenset(
    {
        *AdmissionSettings.model_fields,
        *(ChoosingSettings.model_fields.keys() - {"vision"}),
        *PatienceSettings.model_fields,
        *("encode_servers_urls", "prefill_servers_urls", "decode_servers_urls", "register_key"),
        *(SecuritySettings.model_fields.keys() - _LISTENING),
        *("media_schemes", "media_hosts", "media_networks", "media_roots"),
        *("max_header_bytes", "max_body_bytes", "max_text_bytes", "max_json_depth", "max_items", "max_pixels"),
        *("grace_timeout", "drain_delay", "log_level"),
    }
)
"""Settings that another configuration changes at once. The others are as they were until the proxy is started again."""

SIZE = 4 * 8
_TAKEN, _REFUSED, _SUCCESS, _LOADED = range(4)

_Signature: TypeAlias = tuple[tuple[int, ...] | None, ...]


class Reloads(Collector):
    """How reloads went: four numbers, of which one process writes and all of a proxy tell."""

    def __init__(self, memory: bytearray | memoryview) -> None:
        """`memory`: SIZE bytes, zero before the first configuration."""
        self._cells = memoryview(memory)[:SIZE].cast("B").cast("d")

    def __repr__(self) -> str:
        return f"<Reloads {self._cells[_TAKEN]:.0f} taken, {self._cells[_REFUSED]:.0f} refused>"

    def began(self, now: float) -> None:
        """The first configuration was loaded; `now` is Unix time."""
        self._cells[_SUCCESS], self._cells[_LOADED] = 1.0, now

    def taken(self, now: float) -> None:
        self._cells[_TAKEN] += 1.0
        self.began(now)

    def refused(self) -> None:
        self._cells[_REFUSED] += 1.0
        self._cells[_SUCCESS] = 0.0

    def collect(self) -> Iterator[Metric]:
        counts = CounterMetricFamily("triptych_config_reloads", "Configurations read while serving", labels=["result"])
        counts.add_metric(["ok"], self._cells[_TAKEN])
        counts.add_metric(["refused"], self._cells[_REFUSED])
        yield counts
        yield GaugeMetricFamily(
            "triptych_config_reload_success",
            "Whether the last configuration that was read is in force",
            self._cells[_SUCCESS],
        )
        yield GaugeMetricFamily(
            "triptych_config_loaded_timestamp_seconds", "When the configuration in force was read", self._cells[_LOADED]
        )


class Configuration:
    """`settings` are those in force, with the `secrets` that their files held; `text` is what the file said when they
    were read."""

    def __init__(self, sources: Sources, clock: Callable[[], float]) -> None:
        """Reads the first one. `clock` tells Unix time. Raises Wrong."""
        self._sources = sources
        self._clock = clock
        self.text = sources.text()
        self.settings = sources.settings(self.text)
        self.secrets = verify(self.settings)
        self._before = self._seen = self._signature()
        self._missed: Path | None = None  # a file that was told to be gone
        self.count(Reloads(bytearray(SIZE)))

    def __repr__(self) -> str:
        return f"<Configuration {self.reloads!r}>"

    def count(self, reloads: Reloads) -> None:
        """Count there from now on."""
        self.reloads = reloads
        reloads.began(self._clock())

    @property
    def watched(self) -> bool:
        """Whether there is a file that may change."""
        return bool(self._files())

    def look(self) -> bool:
        """Reload if a file has changed and is whole; True if other settings are in force now. To be called each second
        or so."""
        now = self._signature()
        settled, self._before = now == self._before, now
        if None in now:
            if settled:
                self._miss(self._files()[now.index(None)])
            return False
        self._missed = None
        return settled and now != self._seen and self.reload()

    def reload(self) -> bool:
        """Read all files again, changed or not; True unless they were refused."""
        self._before = self._seen = self._signature()
        try:
            text = self._sources.text()
            settings = self._sources.settings(text)
            verify(settings)
        except Wrong as error:
            self.reloads.refused()
            for line in error.lines:
                log.error("the new configuration is refused, the old one stays: %s", line)
            return False
        self.follow(text)
        with suppress(Wrong):  # a path that cannot change while serving may lead nowhere by now
            self.secrets = verify(self.settings)
        self.reloads.taken(self._clock())
        return True

    def follow(self, text: str) -> None:
        """Another process has taken this text. Raises Wrong."""
        before, asked = self.settings, self._sources.settings(text)
        changed = [name for name in ProxySettings.model_fields if getattr(before, name) != getattr(asked, name)]
        fixed = {name: getattr(before, name) for name in changed if name not in LIVE}
        self.text, self.settings = text, asked.model_copy(update=fixed)
        log.info(
            "a new configuration is in force: %s", _flags(name for name in changed if name in LIVE) or "no changes"
        )
        if fixed:
            log.warning("%s: to change this, the proxy must be started again", _flags(fixed))

    def _miss(self, file: Path) -> None:
        if file != self._missed:
            self._missed = file
            log.warning("%s is gone: nothing is read again until it is back", file)

    def _files(self) -> list[Path]:
        """The configuration's, and those that security is made of."""
        named = (getattr(self.settings, name) for name in SecuritySettings.model_fields)
        return [*filter(None, [self._sources.file]), *(value for value in named if isinstance(value, Path))]

    def _signature(self) -> _Signature:
        return tuple(map(_stat, self._files()))


def verify(settings: ProxySettings) -> Secrets:
    """What the files hold that `settings` name. Raises Wrong."""
    try:
        return Secrets.read(settings)
    except ValueError as error:
        raise Wrong([str(error)]) from None


def _flags(names: Iterable[str]) -> str:
    return ", ".join(name.replace("_", "-") for name in names)


def _stat(file: Path) -> tuple[int, ...] | None:
    """What changes with a file; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size
