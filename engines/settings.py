"""Every flag of the engines, and the only reader of flags, environment and YAML among them. It starts nothing.

A field `kv_blocks` is the flag `--kv-blocks`, the variable `TRIPTYCH_KV_BLOCKS` and the key `kv_blocks` (or
`kv-blocks`) of the YAML file named by `--config`. The first of these that sets it wins, in that order. Settings
are frozen: whatever else an engine needs to know is derived from them.

    settings = load(EncoderSettings, sys.argv[1:], prog="triptych encoder")
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from engines.errors import SetupError

PREFIX = "TRIPTYCH_"
WILDCARDS = ("0.0.0.0", "::")


def _positive(size: ByteSize) -> ByteSize:
    if size <= 0:
        raise ValueError("must be more than 0 bytes")
    return size


def _split(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


Seconds = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]
Bytes = Annotated[ByteSize, AfterValidator(_positive)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]

TransferName = Literal["shm", "mooncake", "zmq", "storage"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class EngineSettings(BaseSettings):
    """What the encoder and the language engine have in common."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=PREFIX,
        populate_by_name=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        protected_namespaces=(),
    )

    config: Path | None = Field(
        None, description="YAML file with any of these settings; flags and environment win over it"
    )
    model: Path = Field(
        description="checkpoint folder in the Hugging Face form: config.json, *.safetensors, processor files"
    )
    served_model_name: str = Field("", description="name that requests use; default: the folder's name")
    host: str = Field("127.0.0.1", description="address to serve HTTP on; 0.0.0.0 for every interface")
    port: int = Field(
        8100, ge=0, le=65535, description="port to serve HTTP on; 0 lets the kernel choose (see the READY line)"
    )
    dtype: Dtype = Field("auto", description="dtype of weights and activations; auto takes the checkpoint's")
    device: str = Field(
        "cpu", description="torch device of the model, e.g. cpu or cuda:0; of an encoder also several: cuda:0,cuda:1"
    )
    threads: int = Field(0, ge=0, description="threads that torch may use; 0 leaves torch's own choice")

    transfer: TransferName = Field(
        "shm", description="how tensor bytes travel between engines; the same on every engine"
    )
    transfer_host: str = Field("127.0.0.1", description="address of this machine that other engines can reach")
    transfer_timeout: Seconds = Field(30.0, description="seconds for one transfer to settle before it fails")
    rdma: bool = Field(False, description="with --transfer mooncake: use RDMA, and refuse to start without it")
    storage_path: Path | None = Field(None, description="with --transfer storage: folder that all engines share")

    embedding_store: Names = Field(
        (),
        description="master of a Mooncake Store, or several of which one answers, as HOST:PORT,HOST:PORT: encoders put "
        "embeddings there and look there before they compute, language engines look there for what an encoder has "
        "lost; see triptych store",
    )
    embedding_store_timeout: Seconds = Field(
        1.0, description="seconds that a request waits for an embedding from there, until it is done without"
    )
    embedding_store_buffer: Bytes = Field(
        ByteSize(256 << 20), description="memory for embeddings on their way there and back; holds the largest of them"
    )

    key: str | None = Field(
        None, min_length=1, description="bearer token that every request but /health needs; none: open to all"
    )
    tls_cert: Path | None = Field(None, description="PEM certificate with its chain: the engine speaks TLS alone")
    tls_key: Path | None = Field(None, description="PEM key of it; default: it is in the same file")
    tls_client_ca: Path | None = Field(None, description="PEM authorities: clients need a certificate of theirs")
    proxy_ca: Path | None = Field(
        None, description="PEM authorities of an https proxy that is called; default: those that the system trusts"
    )

    proxies: Names = Field(
        (),
        alias="register",
        description="proxies to be known to while this engine serves, as URL,URL; they need no list that names it",
    )
    register_key: str | None = Field(None, min_length=1, description="what they ask for: their --register-key")
    register_ttl: Seconds = Field(
        15.0, description="seconds without a word until they drain it; it says a word three times as often"
    )
    advertise: str | None = Field(
        None,
        description="URL that they reach this engine at, perhaps with ?weight=2&host=h1&rack=r1; default: --host and "
        "--port, for every interface the address that leads to them",
    )

    max_body_bytes: Bytes = Field(
        ByteSize(256 << 20), description="largest request body, e.g. 256MiB; larger ones get a 413"
    )
    grace: Seconds = Field(10.0, description="seconds that requests in flight get to finish after SIGTERM")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe log line shown")

    @model_validator(mode="after")
    def _check_transfer(self) -> EngineSettings:
        if self.transfer == "storage" and self.storage_path is None:
            raise ValueError("--transfer storage needs --storage-path, a folder that all engines share")
        if self.transfer != "storage" and self.storage_path is not None:
            raise ValueError(f"--storage-path needs --transfer storage, not {self.transfer}")
        if self.rdma and self.transfer != "mooncake":
            raise ValueError(f"--rdma needs --transfer mooncake, not {self.transfer}")
        return self

    @model_validator(mode="after")
    def _check_store(self) -> EngineSettings:
        for master in self.embedding_store:
            host, _, port = master.rpartition(":")
            if not host or not port.isdecimal():
                raise ValueError(f"--embedding-store: {master} should look like HOST:PORT")
        return self

    @model_validator(mode="after")
    def _check_tls(self) -> EngineSettings:
        for name in ("tls_key", "tls_client_ca"):
            if getattr(self, name) is not None and self.tls_cert is None:
                raise ValueError(f"--{name.replace('_', '-')} needs --tls-cert")
        return self

    @model_validator(mode="after")
    def _check_register(self) -> EngineSettings:
        wrong = [one for one in self.proxies if not one.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"--register: {wrong[0]}: a proxy's URL looks like http://host:port")
        return self

    @property
    def name(self) -> str:
        """The model's name on the wire."""
        return self.served_model_name or self.model.resolve().name

    @property
    def transfer_bind(self) -> str:
        """The interface of the transfer's control channel: all of them if HTTP has all, else the advertised one."""
        return self.host if self.host in WILDCARDS else self.transfer_host

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)  # `load` merges the others, so that a settings object made in code is what it was told


class EncoderSettings(EngineSettings):
    """`triptych encoder`: the vision tower, its media pool, its batches and its cache of embeddings."""

    cache_bytes: Bytes = Field(
        ByteSize(512 << 20), description="arena for embeddings; must hold what is encoded within --handle-ttl"
    )
    handle_ttl: Seconds = Field(
        60.0, description="seconds that a handle stays readable after the last answer that named it"
    )
    max_batch_patches: Count = Field(16384, description="patches of one forward; a larger item runs alone")
    max_item_patches: Count = Field(65536, description="patches of one item after resizing; larger ones get a 413")
    max_queue_items: Count = Field(
        1024, description="items decoding or waiting for the model; beyond it requests get a 503"
    )
    max_items: Count = Field(256, description="items in one request")
    encode_timeout: Seconds = Field(120.0, description="seconds from request to embeddings")

    sglang: bool = Field(
        False, description="speak SGLang's encoder protocol too, for its language-only servers (zmq_to_scheduler)"
    )

    media_workers: int = Field(
        0, ge=0, description="threads that decode and preprocess images and videos; 0: one for each core, 16 at most"
    )
    max_media_bytes: Bytes = Field(ByteSize(64 << 20), description="largest file of an image or video")
    max_media_pixels: Count = Field(
        64_000_000, description="pixels of the largest image or frame, checked before it is decoded"
    )
    max_video_seconds: Seconds = Field(600.0, description="seconds of the longest video; longer ones get a 413")
    max_video_frames: Count = Field(768, description="frames that are taken of one video; more get a 413")
    decode_timeout: Seconds = Field(20.0, description="seconds to decode and preprocess one item once a worker has it")
    fetch_timeout: Seconds = Field(10.0, description="seconds to fetch one http(s) image or video")
    max_redirects: int = Field(3, ge=0, description="redirects to follow when fetching media")
    max_fetches: Count = Field(32, description="http(s) media fetched at the same time")
    allow_remote_media: bool = Field(True, description="fetch http(s) media at all")
    allow_private_hosts: bool = Field(
        False, description="fetch http(s) media from loopback, private and link-local addresses too"
    )
    allowed_media_roots: Paths = Field(
        (), description="folders that file:// URLs may name, comma-separated; none by default"
    )

    @property
    def media_threads(self) -> int:
        return self.media_workers or min(16, len(os.sched_getaffinity(0)))


class LanguageSettings(EngineSettings):
    """`triptych language`: continuous batching over a paged KV cache, alone or as prefill or decode."""

    role: Literal["both", "prefill", "decode"] = Field(
        "both", description="which stages this engine runs; POST /role changes it"
    )
    tensor_parallel: Count = Field(
        1,
        description="processes that share the model, each with its part of every layer on a device of its own: from "
        "--device cuda:0 on, cuda:0, cuda:1, …; the same on prefill and decode",
    )
    rank_timeout: Seconds = Field(
        30.0, description="with --tensor-parallel: seconds without a sign of life from one of them, until all end"
    )
    attention: Literal["auto", "gather", "varlen"] = Field(
        "auto",
        description="how queries find their keys: varlen is a kernel that reads the KV cache where it lies, for 16-bit "
        "weights on a GPU; gather copies out of it first, and runs anywhere; auto takes varlen where it runs",
    )
    decode_graphs: bool = Field(
        True, description="on a GPU: capture the decode step of each batch size and length at start, and replay it"
    )
    block_size: Count | None = Field(
        None,
        description="tokens in one KV block, the same on prefill and decode; default: 16, or 256 with --attention "
        "varlen, which needs a multiple of 256",
    )
    kv_blocks: Count | None = Field(None, description="KV blocks to allocate; default: what --kv-bytes holds")
    kv_bytes: Bytes = Field(
        ByteSize(1 << 30), description="memory for KV blocks where --kv-blocks is not given, on each device"
    )
    kv_mirror: bool = Field(
        False,
        description="keep the KV cache apart from the memory that transfers read and write, and copy between the two, "
        "on the CPU too; on other devices it is always so",
    )
    max_model_len: Count | None = Field(
        None, description="longest prompt plus answer in tokens; default: the checkpoint's"
    )
    max_num_seqs: Count = Field(64, description="sequences running at the same time")
    max_batched_tokens: Count = Field(2048, description="tokens of one step; longer prompts run in chunks of it")
    chunk_while_decoding: Count | None = Field(
        None,
        description="prompt tokens of a step in which others decode: fewer shorten the longest wait between two tokens "
        "and lengthen that for a first one; default: what --max-batched-tokens leaves",
    )
    prefix_cache: bool = Field(
        True, description="keep the KV of prompts that are over while there is room, for prompts that begin alike"
    )
    max_queue: Count = Field(1024, description="requests waiting to be scheduled; beyond it requests get a 503")
    embedding_bytes: Bytes = Field(ByteSize(256 << 20), description="arena for embeddings fetched from encoders")
    embedding_block_tokens: Count = Field(16, description="tokens in one block of that arena (of 32 bits a number)")
    embedding_default_tokens: int = Field(
        0,
        ge=0,
        description="tokens for whose embeddings a request waits for room before it is queued; the others follow in "
        "pieces of as many, while its prompt runs; 0: all of them, as far as the arena holds them",
    )
    layers_per_push: Count = Field(4, description="layers whose KV is sent together while later layers are computed")
    kv_lease: Seconds = Field(30.0, description="seconds that prefilled blocks wait for the decode engine to read them")
    metaserver_timeout: Seconds = Field(
        60.0, description="seconds for the metaserver (and prefill behind it) to answer"
    )
    handoff_timeout: Seconds = Field(60.0, description="seconds for KV to arrive once blocks are reserved for it")
    request_timeout: Seconds = Field(600.0, description="seconds from request to last token")
    switch_timeout: Seconds = Field(
        120.0,
        description="seconds that POST /role waits for what is in flight, refusing what is new; then the role stays as "
        "it was",
    )


class ColocatedSettings(LanguageSettings, EncoderSettings):
    """`triptych language`: with --encode it holds an encoder too, whose flags count then."""

    encode: bool = Field(
        False, description="hold an encoder too: take requests with media as they are, and read embeddings in place"
    )
    encoder_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="with --encode: port of the encoder's own routes, for engines that have none; default: not served",
    )
    encoder_device: str | None = Field(
        None, description="with --encode: torch device of the vision tower, or several; default: that of --device"
    )

    @model_validator(mode="after")
    def _check_encode(self) -> ColocatedSettings:
        for name in ("encoder_port", "encoder_device"):
            if getattr(self, name) is not None and not self.encode:
                raise ValueError(f"--{name.replace('_', '-')} needs --encode")
        if self.encoder_port is not None and self.proxies and self.advertise is not None:
            raise ValueError(
                "--advertise tells proxies of one port, and --encoder-port is another: leave one of them out"
            )
        return self

    def of_encoder(self) -> EncoderSettings:
        """Those of the encoder within."""
        port, device = self.encoder_port or 0, self.encoder_device or self.device
        return self.model_copy(update={"port": port, "device": device})


SettingsT = TypeVar("SettingsT", bound=EngineSettings)


def load(cls: type[SettingsT], argv: Sequence[str], *, prog: str) -> SettingsT:
    """Settings from flags, environment and YAML. Exits on --help.

    Raises SetupError with one line per mistake, each naming its flag.
    """
    cli = CliSettingsSource[Any](cls, cli_prog_name=prog, cli_parse_args=list(argv), cli_shortcuts=None)
    environment = _environment(cls)
    try:
        flags = cli()
        path = flags.get("config") or environment.get("config")
        return cls(**{**_yaml(cls, Path(path) if path else None), **environment, **flags})
    except ValidationError as error:
        raise SetupError("\n".join(_explain(entry) for entry in error.errors())) from None
    except SettingsError as error:
        raise SetupError(str(error)) from None


def _environment(cls: type[SettingsT]) -> dict[str, str]:
    names = {f"{PREFIX}{name.upper()}": name for name in _names(cls)}
    return {names[key]: value for key, value in os.environ.items() if key in names}  # noqa: TID251 - the one reader


def _names(cls: type[SettingsT]) -> set[str]:
    """As users write them; a field cannot be called `register`, which is a method of all classes of this kind."""
    return {field.alias or name for name, field in cls.model_fields.items()}


def _yaml(cls: type[SettingsT], path: Path | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SetupError(f"--config {path}: {error}") from None
    if not isinstance(content, dict):
        raise SetupError(f"--config {path}: expected a mapping of settings, got {type(content).__name__}")
    keys = {str(key).replace("-", "_"): value for key, value in content.items()}
    if unknown := sorted(keys.keys() - _names(cls)):
        raise SetupError(f"--config {path}: unknown setting {', '.join(unknown)}; --help lists them all")
    return keys


def _explain(entry: Any) -> str:
    flag = "--" + ".".join(str(part) for part in entry["loc"][:1]).replace("_", "-")
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] == "missing":
        return f"{flag} is required"
    shown = "" if entry["loc"][:1] == ("key",) else f", got {entry['input']!r}"  # a secret is not repeated
    return f"{flag}: {message}{shown}" if entry["loc"] else message
