"""Kubernetes manifests as Kubernetes reads them, as far as our tests ask."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import kubernetes_validate

from engines.settings import EngineSettings
from proxy.settings import ProxySettings
from tests.support.commands import settings_of

VERSIONS = ("1.30", "1.32", "1.37")

Document = dict[str, Any]


def check(documents: Iterable[Document]) -> None:
    """Raises kubernetes_validate.ValidationError unless each is what these versions' schemas say, with nothing else."""
    for document in documents:
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def selects(labels: Mapping[str, str], document: Document) -> bool:
    """Whether a selector of `labels` finds the pods of a Deployment."""
    return labels.items() <= document["spec"]["template"]["metadata"]["labels"].items()


def container(deployment: Document) -> Document:
    """Its only one."""
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return dict(found)


def started(deployment: Document, *config: str) -> ProxySettings | EngineSettings:
    """The settings of its container, whose arguments after --config are `config` then. What a pod is told of itself
    is 10.1.2.3."""
    one = container(deployment)
    environment = {entry["name"]: entry.get("value", "10.1.2.3") for entry in one["env"]}
    args = list(one["args"])
    if "--config" in args:
        at = args.index("--config") + 1
        args[at : at + 1] = config
    return settings_of(args, environment)
