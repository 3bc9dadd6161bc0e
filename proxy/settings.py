"""The one reader of flags, environment and YAML. Everything else gets values, frozen.

Precedence: flags, then TRIPTYCH_… in the environment, then the file of --config, then the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from proxy.balancer import POLICIES
from proxy.core import BOTH, ROLES, Order, Role
from proxy.dialects import DIALECTS
from proxy.dialects.base import Media
from proxy.dialects.sglang import Sglang
from proxy.hedge import Hedge
from proxy.links import LABELS, Links, labels
from proxy.profiles import flagged

_NOTHING = frozenset({"", "disable", "none"})
_ORDERS = {"push": Order.DECODE_FIRST, "pull": Order.SEQUENTIAL, "together": Order.TOGETHER}
_PORTS = ("bootstrap_port", "ec_port")  # facts that a URL may tell


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An engine's base URL, without a trailing slash, the dialect it is spoken to in, and facts that nobody can ask."""

    url: str
    dialect: str
    facts: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str, default: str) -> Endpoint:
        """From `http://host:port` or `dialect+http://host:port`, perhaps with `?bootstrap_port=8998&host=h1&rack=r1`.

        Raises ValueError saying what is wrong.
        """
        text = text.strip().rstrip("/")
        named, plus, rest = text.partition("+")
        dialect, url = (named, rest) if plus and "://" not in named else (default, text)
        if dialect != "auto" and dialect not in DIALECTS:
            raise ValueError(f"{text}: no dialect {dialect!r} (known: auto, {', '.join(DIALECTS)})")
        parts = urlsplit(url)
        facts = _facts(text, parts.query)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{text}: an engine's URL looks like http://host:port")
        if parts.fragment or parts.path.strip("/") == "v1":
            raise ValueError(f"{text}: give the base URL only, like http://{parts.netloc}")
        try:
            parts.port  # noqa: B018 - reading it checks the range
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        return cls(url.partition("?")[0].rstrip("/"), dialect, facts)


def _facts(text: str, query: str) -> dict[str, Any]:
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
        facts: dict[str, Any] = {name: int(given.pop(name)) for name in _PORTS if name in given}
        if any(not 0 < port < 1 << 16 for port in facts.values()):
            raise ValueError
        if placed := labels(given):
            facts["labels"] = placed
    except ValueError:
        said = ", ".join([*(f"?{name}=PORT" for name in _PORTS), *(f"?{label}=NAME" for label in LABELS)])
        raise ValueError(f"{text}: a URL may say {said} and nothing else") from None
    return facts


class ProxySettings(BaseSettings):
    """The proxy of Triptych: one OpenAI-compatible address for encoder, prefill and decode engines.

    Example: triptych proxy --encode-servers-urls http://e1:8001,http://e2:8001 --prefill-servers-urls http://p:8002
    --decode-servers-urls http://d:8003
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="TRIPTYCH_",
        cli_prog_name="triptych proxy",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
    )

    encode_servers_urls: str = Field("", description="encoders, as URL,URL; empty for a deployment without")
    prefill_servers_urls: str = Field(
        "", description="prefill engines; 'disable', 'none' or empty: the decode list holds combined engines"
    )
    decode_servers_urls: str = Field("", description="decode engines, or combined ones without a prefill list")
    host: str = Field("0.0.0.0", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one, named by the READY line")
    dialect: str = Field("auto", description=f"of URLs without one: {', '.join(DIALECTS)}; auto asks each engine")
    policy: str = Field(
        "",
        description=f"{', '.join(POLICIES)}: for all roles or as encode=affinity,decode=least_loaded; "
        "roles that are not named: affinity to encode, else least_loaded",
    )
    kv_handoff: Literal["auto", "push", "pull", "together"] = Field(
        "auto",
        description="push: decode reserves and prefill writes layer by layer; pull: decode reads from prefill; "
        "together: both are called at once; auto: as the engine family does by default",
    )
    media_to_prefill: Media = Field(
        Media.AUTO,
        description="of vLLM engines, media that encoders have encoded; auto: where the engine would not survive that "
        "an embedding is gone; never: embeddings are never deleted, or the engine takes no media",
    )
    virtual_encoder_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="port for SGLang's language servers, which find all encoders behind it as one; never for clients",
    )
    virtual_encoder_url: str | None = Field(
        None, description="where language servers reach that port; default: the address that leads to them"
    )
    encoder_register_urls: str = Field(
        "", description="language servers to register it at, as URL,URL with their --encoder-bootstrap-port"
    )
    metaserver_url: str | None = Field(
        None, description="where decode engines reach this proxy (push); default: the address that leads to them"
    )
    connect_timeout: PositiveFloat = Field(5.0, description="seconds to connect to an engine")
    encode_timeout: PositiveFloat = Field(60.0, description="seconds for an encoder's whole answer")
    prefill_timeout: PositiveFloat = Field(300.0, description="seconds for a prefill engine's whole answer")
    first_token_timeout: PositiveFloat = Field(
        120.0, description="seconds from the decode call to a stream's first content, not counting prefill"
    )
    stream_idle_timeout: PositiveFloat = Field(60.0, description="seconds between two pieces of a stream")
    answer_timeout: PositiveFloat = Field(
        600.0, description="seconds from the decode call to the end of an unstreamed answer, not counting prefill"
    )
    probe_interval: PositiveFloat = Field(2.0, description="seconds between two probes of an engine")
    probe_timeout: PositiveFloat = Field(2.0, description="seconds for a probe's answer")
    warm_up_timeout: PositiveFloat = Field(
        120.0, description="seconds for the one real request that an engine of another family answers before it serves"
    )
    probe_failures: PositiveInt = Field(3, description="failed probes in a row that make an engine DOWN")
    vision: str = Field(
        "",
        description="how images and videos become tokens: qwen2_vl, qwen2_5_vl, qwen3_vl, or a model's folder, for all "
        "models or as MODEL=…,MODEL=…; default: as encoders tell, else by the model's name",
    )
    measure_urls: Literal["never", "public", "all"] = Field(
        "never",
        description="before planning, read up to 64 KiB of media behind URLs to know their size; public: at addresses "
        "of the open Internet; all: at private ones too, which clients then make the proxy connect to",
    )
    measure_timeout: PositiveFloat = Field(1.0, description="seconds that a request waits for its media's sizes")
    max_attempts: PositiveInt = Field(3, description="instances asked, at the most, for the same stage of a request")
    inline_encoding: bool = Field(
        False,
        description="combined engines have an encoder of their own: give them media when encoders fail, or where that "
        "is foreseen to be sooner",
    )
    hedge_after: str = Field(
        "", description="try a second encoder after so many seconds, or a percentile of them like p95; empty: never"
    )
    resume: bool = Field(
        False, description="go on elsewhere with a stream whose engine died, where that is exact: greedy or seeded"
    )
    breaker_failures: PositiveInt = Field(5, description="failed legs in a row that keep an engine from new ones")
    breaker_delay: PositiveFloat = Field(5.0, description="seconds until such an engine is tried again")
    max_concurrent: PositiveInt = Field(4096, description="requests served at once; more wait")
    max_bytes_in_flight: PositiveInt = Field(4 << 30, description="body bytes of the requests served at once")
    max_queue: int = Field(1024, ge=0, description="requests that may wait for a place; more are refused with 429")
    queue_timeout: PositiveFloat = Field(30.0, description="seconds that a request waits for a place at the most")
    ttft_target: PositiveFloat | None = Field(
        None,
        description="seconds to the first token that are foreseen for every request admitted: others wait while that "
        "may help, and are refused with 429; the header x-ttft-target comes first; default: no target",
    )
    tpot_target: PositiveFloat | None = Field(
        None, description="seconds per output token that are foreseen for every request admitted; default: no target"
    )
    max_embedding_bytes: PositiveInt | None = Field(
        None, description="predicted bytes of embeddings on their way to one prefill engine; default: no bound"
    )
    link_rates: str = Field(
        "",
        description="bytes per second between engines that share a label (?host=…&rack=…&zone=… in their URLs), as "
        "host=40e9,rack=20e9,zone=10e9,other=2.5e9; these are the defaults",
    )
    request_timeout: PositiveFloat | None = Field(
        None, description="seconds for a whole request; the header x-request-timeout comes first; default: no limit"
    )
    grace_timeout: PositiveFloat = Field(30.0, description="seconds that requests may go on after SIGTERM")
    max_body_bytes: PositiveInt = Field(256 << 20, description="largest request body accepted")
    trust_client_identity: bool = Field(
        False,
        description="keep clients' uuids and accept their *_embeds, kv_ and ec_transfer_params: trusted ones only",
    )
    tenant_salt: str = Field("", description="secret; when set, tenants never share an embedding of inline media")
    tenant_header: str = Field("authorization", description="the header that tells tenants apart")
    admin_key: str | None = Field(None, description="what POST and DELETE /instances ask for; none: open to all")
    workers: int = Field(
        1, ge=1, le=64, description="processes that serve the port, with one view of load between them"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="what goes to stderr")
    config: Path | None = Field(None, description="YAML file with these flags as keys, - or _ between words")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _Yaml(settings_cls)

    @field_validator("encode_servers_urls", "prefill_servers_urls", "decode_servers_urls", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        """A YAML file may hold a list."""
        return ",".join(map(str, value)) if isinstance(value, list) else ("" if value is None else value)

    @model_validator(mode="after")
    def _consistent(self) -> ProxySettings:
        endpoints = self.fleet()
        if not any(Role.DECODE in role for role, _ in endpoints):
            raise ValueError("--decode-servers-urls: at least one engine is needed")
        urls = [endpoint.url for _, endpoint in endpoints]
        twice = next((url for url in urls if urls.count(url) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is listed twice: an engine has one role")
        self.policies()
        flagged(self.vision)
        if self.lists() and self.virtual_encoder_port is None:
            raise ValueError("--encoder-register-urls: what is to be registered listens on --virtual-encoder-port")
        if self.workers > 1 and self.virtual_encoder_port is not None:
            raise ValueError("--virtual-encoder-port: a request's calls must meet in one process, so with --workers 1")
        try:
            Links.parse(self.link_rates)
        except ValueError as error:
            raise ValueError(f"--link-rates: {error}") from None
        try:
            Hedge(self.hedge_after)
        except ValueError as error:
            raise ValueError(f"--hedge-after: {error}") from None
        return self

    def fleet(self) -> list[tuple[Role, Endpoint]]:
        """Every engine of the three lists with its role. Raises ValueError."""
        split = self.prefill_servers_urls.strip().lower() not in _NOTHING
        lists = (
            (Role.ENCODE, self.encode_servers_urls),
            (Role.PREFILL, self.prefill_servers_urls),
            (Role.DECODE if split else BOTH, self.decode_servers_urls),
        )
        return [(role, Endpoint.parse(url, self.dialect)) for role, text in lists for url in _urls(text)]

    def lists(self) -> list[str]:
        """The bootstrap servers that get to know the virtual encoder. Raises ValueError."""
        return [Endpoint.parse(url, Sglang.name).url for url in _urls(self.encoder_register_urls)]

    def policies(self) -> dict[Role, str]:
        """The policy's name for each role. Raises ValueError."""
        chosen = {**dict.fromkeys(ROLES, "least_loaded"), Role.ENCODE: "affinity"}
        for entry in filter(None, (entry.strip() for entry in self.policy.split(","))):
            label, _, name = entry.rpartition("=")
            if name not in POLICIES:
                raise ValueError(f"--policy: no policy {name!r} (known: {', '.join(POLICIES)})")
            if label and label not in {role.label for role in ROLES}:
                raise ValueError(f"--policy: no role {label!r} (known: {', '.join(role.label for role in ROLES)})")
            chosen |= {role: name for role in ROLES if label in ("", role.label)}
        return chosen

    @property
    def order(self) -> Order | None:
        """None: each engine family's own."""
        return _ORDERS.get(self.kv_handoff)


def _urls(text: str) -> list[str]:
    return [] if text.strip().lower() in _NOTHING else [url for url in text.split(",") if url.strip()]


def load(argv: Sequence[str]) -> ProxySettings:
    """The settings of a command line. Exits with a message for a person when they are wrong."""
    parser = argparse.ArgumentParser(
        prog="triptych proxy", description=ProxySettings.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cli = CliSettingsSource[Any](ProxySettings, root_parser=parser)
    given = cli(args=list(argv))()
    config = given.get("config") or EnvSettingsSource(ProxySettings)().get("config")
    try:
        return _configured(config)(**given)
    except ValidationError as error:
        lines = [_explained(e["loc"], e["msg"]) for e in error.errors()]
    except (yaml.YAMLError, SettingsError, OSError, ValueError) as error:
        lines = [f"--config: {error}"]
    return parser.exit(2, "".join(f"triptych proxy: {line}\n" for line in lines))


def _configured(config: str | None) -> type[ProxySettings]:
    if config is not None and not Path(config).is_file():
        raise FileNotFoundError(f"there is no file {config}")

    class Configured(ProxySettings):
        model_config = SettingsConfigDict(yaml_file=config)

    return Configured


class _Yaml(YamlConfigSettingsSource):
    """A file whose keys may have - between words, as the flags do."""

    def __call__(self) -> dict[str, Any]:
        return {key.replace("-", "_"): value for key, value in super().__call__().items()}


def _explained(where: Sequence[Any], message: str) -> str:
    flag = "--" + str(where[0]).replace("_", "-") + ": " if where else ""
    return flag + message.removeprefix("Value error, ")
