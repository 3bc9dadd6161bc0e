"""All flags of the proxy, by subject, in one frozen object."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from proxy.settings.admission import AdmissionSettings
from proxy.settings.choosing import ChoosingSettings
from proxy.settings.fleet import FleetSettings
from proxy.settings.listening import ListeningSettings
from proxy.settings.media import MediaSettings
from proxy.settings.observing import ObservingSettings
from proxy.settings.patience import PatienceSettings
from proxy.settings.security import SecuritySettings


class ProxySettings(
    ObservingSettings,
    MediaSettings,
    SecuritySettings,
    AdmissionSettings,
    ChoosingSettings,
    PatienceSettings,
    ListeningSettings,
    FleetSettings,
    BaseSettings,
):
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

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What it is made with, and nothing else: `load` reads all the rest."""
        return (init_settings,)

    @model_validator(mode="after")
    def _one_process(self) -> Self:
        if self.workers > 1 and self.virtual_encoder_port is not None:
            raise ValueError("--virtual-encoder-port: a request's calls must meet in one process, so with --workers 1")
        return self
