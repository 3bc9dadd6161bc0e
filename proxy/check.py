"""`triptych check`: what a proxy with these flags would make of its settings, its files and its engines. Serves nobody.

It is the proxy itself that asks each engine here, warm-up request included: what it finds is what a start would find.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from proxy.app import Proxy
from proxy.core import Instance, State
from proxy.discovery import finder
from proxy.discovery.base import Unreadable
from proxy.errors import EngineFailed
from proxy.joining import detect
from proxy.joining.fitting import Engine, misfits
from proxy.reloading import verify
from proxy.routing import router
from proxy.settings import Endpoint, ProxySettings, Sources, Wrong
from proxy.tasks import together

_NAME_S = 10.0  # for whoever knows what is behind a name
_PROG = "triptych check"
_ABOUT = """\
Reads the settings as `triptych proxy` does, asks every engine as it would, and says what would fail: addresses,
dialects, roles, models, keys, certificates, folders, and what does not fit together. Exits with 1 if anything does.

Takes the flags of `triptych proxy`, and --json."""


class Verdict(StrEnum):
    WELL = "well"
    NOTE = "note"
    FAILS = "fails"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, how it is, and what to do about it."""

    what: str
    verdict: Verdict
    said: str
    advice: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 if a proxy with these flags would serve, 1 if something fails; wrong flags exit with 2."""
    own = argparse.ArgumentParser(prog=_PROG, add_help=False, allow_abbrev=False)
    own.add_argument("--json", action="store_true")
    arguments, flags = own.parse_known_args(sys.argv[1:] if argv is None else argv)
    sources = Sources.of(flags, _PROG, _ABOUT)
    logging.disable(logging.CRITICAL)  # what parts of the proxy would log is told in the table
    found = asyncio.run(findings(sources))
    failed = any(finding.verdict is Verdict.FAILS for finding in found)
    if arguments.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        _show(found, failed)
    return int(failed)


async def findings(sources: Sources) -> list[Finding]:
    """Of settings and files, and if these can be used, of engines."""
    try:
        settings = sources.read()
        verify(settings)
    except Wrong as error:
        return [Finding("settings", Verdict.FAILS, line) for line in error.lines]
    found = [Finding("settings", Verdict.WELL, f"read from {sources.file}" if sources.file else "read from flags")]
    found += _folders(settings)
    found += _open_doors(settings)
    return found + [finding async for finding in _engines(settings)]


def _folders(settings: ProxySettings) -> Iterable[Finding]:
    for root in settings.media_rules().roots:
        if Path(root).is_dir():
            yield Finding("media roots", Verdict.WELL, f"{root} is a folder")
        else:
            yield Finding(
                "media roots", Verdict.FAILS, f"{root} is no folder here", "make it, or take it off --media-roots"
            )


def _open_doors(settings: ProxySettings) -> Iterable[Finding]:
    """What is allowed, and easily overlooked."""
    if settings.admin_secret() is None:
        said = "whoever reaches the proxy may change the fleet"
        yield Finding("security", Verdict.NOTE, said, "set --admin-key-file")
    if settings.api_keys is None:
        yield Finding("security", Verdict.NOTE, "whoever reaches the proxy may ask", "set --api-keys")
    if settings.trust_client_identity:
        said = "clients may set uuids, *_embeds and transfer parameters"
        yield Finding("security", Verdict.NOTE, said, "take --trust-client-identity off unless all clients are yours")


async def _engines(settings: ProxySettings) -> AsyncIterator[Finding]:
    """Each engine as a proxy finds it, and how they fit together."""
    proxy = Proxy(settings.model_copy(update={"workers": 1}))
    async with proxy.upstream:
        for source, (_, endpoint) in proxy.membership.finders.items():
            yield await _looked_up(proxy, source, endpoint)
        await proxy.health.tick()
        listed = list(proxy.fleet)
        for instance in listed:
            yield _engine(instance)
        well = [instance for instance in listed if instance.state is State.READY]
        infos = await asyncio.gather(*(_info(proxy, instance) for instance in well))
    for misfit in misfits([Engine(*known) for known in zip(well, infos, strict=True)]):
        yield Finding("fleet", Verdict.FAILS if misfit.fails else Verdict.NOTE, misfit.said, misfit.advice)
    if not listed:
        yield Finding("fleet", Verdict.NOTE, "there is no engine yet", "they may register, or be found later")
    elif router.servable(proxy.fleet.census()):
        yield Finding("fleet", Verdict.WELL, "every kind of request can be served")
    else:
        yield Finding("fleet", Verdict.FAILS, "no path has an engine for each of its stages", "see the engines above")


async def _looked_up(proxy: Proxy, source: str, endpoint: Endpoint) -> Finding:
    """What is behind a name now; it is in the proxy's fleet afterwards."""
    known: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()

    def say(netlocs: Iterable[str]) -> None:
        if not known.done():
            known.set_result(list(netlocs))

    try:
        async with asyncio.timeout(_NAME_S), together() as group:
            watching = group.create_task(finder(endpoint.finder, proxy.settings).watch(endpoint, say))
            netlocs = await known
            watching.cancel()
    except (Unreadable, TimeoutError) as error:
        said = str(error) or f"nobody says within {_NAME_S:g} s who is behind it"
        return Finding(source, Verdict.FAILS, said, "mend the name, or --dns-server or --kubernetes-api")
    proxy.membership.found(source, netlocs)
    if not netlocs:
        return Finding(source, Verdict.NOTE, "nobody is behind it now")
    return Finding(source, Verdict.WELL, ", ".join(netlocs))


def _engine(instance: Instance) -> Finding:
    what = f"{instance.role.label} {instance.netloc}"
    if instance.state is not State.READY:
        return Finding(what, Verdict.FAILS, instance.reason, _advice(instance.reason))
    version = instance.facts.get("version")
    known = [
        instance.dialect,
        *filter(None, [version and f"version {version}", instance.model and f"model {instance.model}"]),
    ]
    return Finding(what, Verdict.WELL, ", ".join(map(str, known)))


def _advice(reason: str) -> str:
    """For what is said most often."""
    return next((advice for words, advice in _ADVICE if words in reason), "")


_ADVICE = (
    ("refused", "start it, or mend its host and port"),
    ("did not answer in time", "it may still be loading, or --probe-timeout is too short for it"),
    ("TLS", "--engine-ca names the authority that its certificate comes from"),
    ("listed as", "move it to the list of that role"),
    ("no family", "write its dialect before its URL, as vllm+http://host:port"),
    ("warm-up", "its own log says more; --kv-handoff and its transfer settings must fit together"),
)


async def _info(proxy: Proxy, instance: Instance) -> dict[str, object]:
    """What our engines say of themselves."""
    if instance.dialect != "native":
        return {}
    try:
        said = await detect.asking(proxy.upstream, instance, proxy.settings.probe_timeout)("/info")
    except EngineFailed:
        return {}
    return said if isinstance(said, dict) else {}


_COLORS = {Verdict.WELL: "green", Verdict.NOTE: "yellow", Verdict.FAILS: "red"}


def _show(found: Sequence[Finding], failed: bool) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for head in ("what", "", "found", "what to do"):
        table.add_column(head, overflow="fold")
    for finding in found:
        color = _COLORS[finding.verdict]
        table.add_row(
            escape(finding.what), f"[{color}]{finding.verdict}[/]", escape(finding.said), escape(finding.advice)
        )
    console = Console(highlight=False)
    console.print(table)
    fails = sum(finding.verdict is Verdict.FAILS for finding in found)
    console.print(
        f"\n[red]{fails} of {len(found)} fail[/]" if failed else "\n[green]a proxy with these flags serves[/]"
    )


if __name__ == "__main__":
    sys.exit(main())
