"""Engines behind names, as other systems know them: name servers, the API server of a Kubernetes cluster. Nothing here
joins or drains anybody: what is found is told to `proxy.joining.membership`.
"""

from __future__ import annotations

from importlib import import_module

from proxy.discovery.base import Finder
from proxy.settings.endpoint import FINDERS
from proxy.settings.fleet import FleetSettings

_MODULES = {"dns": "names:Addresses", "srv": "names:Services", "k8s": "kubernetes:Slices"}
"""By the word before a URL. They are imported where one is listed: their libraries take a tenth of a second."""

assert _MODULES.keys() == FINDERS.keys()


def finder(word: str, settings: FleetSettings) -> Finder:
    """What finds engines behind URLs that begin with `word`."""
    module, _, name = _MODULES[word].partition(":")
    found: Finder = getattr(import_module(f"{__name__}.{module}"), name)(settings)
    return found
