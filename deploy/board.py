"""The Grafana board, built: `python -m deploy.board > deploy/grafana/triptych.json`. Change it here, not there.

Its queries use what a proxy's /metrics says by the labels that Prometheus gives it: `instance` is the proxy that was
asked, `exported_instance` an engine. Loads add up over proxies; of what all proxies see alike, the worst view counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from deploy.panels import SOURCE, Panel, Row, panels

_HERE = 'job=~"$job",instance=~"$proxy"'
_ENGINE = "{{role}} {{exported_instance}}"
_STAGES = ("queue", "encode", "prefill", "ttft", "decode", "e2e")


# ---- queries


def now(metric: str, labels: str = "") -> str:
    """The board's own part of a metric's series."""
    return f"{metric}{{{_HERE}{',' if labels else ''}{labels}}}"


def rate(metric: str, labels: str = "") -> str:
    """Of a counter, per second."""
    return f"rate({now(metric, labels)}[$__rate_interval])"


def by(label: str, value: str, how: str = "sum") -> str:
    return f"{how} by ({label}) ({value})"


def total(value: str) -> str:
    return f"sum({value})"


def quantile(q: float, metric: str, labels: str = "le") -> str:
    """Of a histogram, over all proxies."""
    return f"histogram_quantile({q}, {by(labels, rate(f'{metric}_bucket'))})"


def mean(metric: str, label: str = "job") -> str:
    """Of a histogram, over all proxies."""
    return f"{by(label, rate(f'{metric}_sum'))} / {by(label, rate(f'{metric}_count'))}"


def share(part: str, whole: str) -> str:
    """Of one rate in another; 0 where there was none yet of that part."""
    return f"({total(part)} or vector(0)) / {total(whole)}"


# ---- panels


def _stat(title: str, query: str, unit: str = "short", what: str = "", **more: Any) -> Panel:
    return Panel(title, [("", query)], unit, what, "stat", width=3, height=4, **more)


def _heatmap(title: str, metric: str, what: str) -> Panel:
    counted = by("le", f"increase({now(f'{metric}_bucket')}[$__rate_interval])")
    return Panel(title, [("{{le}}", counted)], "s", what, "heatmap", width=12, height=8)


def _spread(title: str, metric: str, unit: str, what: str = "") -> Panel:
    return Panel(title, [(f"p{q * 100:.0f}", quantile(q, metric)) for q in (0.5, 0.95, 0.99)], unit, what)


_OF_ALL = rate("triptych_requests_total")
_LOAD = by("role, exported_instance", now("triptych_load_tokens"))
_RELOADED = [("refused", "red"), ("taken", "green")]
_CIRCUITS = [("closed", "green"), ("half open", "orange"), ("open", "red")]

ROWS = (
    Row(
        "Overview",
        [
            _stat("Requests", total(_OF_ALL), "reqps"),
            _stat(
                "Failed",
                share(rate("triptych_requests_total", 'status=~"5.."'), _OF_ALL),
                "percentunit",
                "Requests that ended with a 5xx, or with an error told within their stream",
                limits=(0.001, 0.01),
            ),
            _stat("First token, p95", quantile(0.95, "triptych_ttft_seconds"), "s", limits=(2, 5)),
            _stat("Per token, p95", quantile(0.95, "triptych_token_seconds"), "s", limits=(0.1, 0.2)),
            _stat("Tokens written per second", total(rate("triptych_tokens_total", 'kind="output"'))),
            _stat("In flight", total(now("triptych_requests_in_flight"))),
            _stat("Queued", total(now("triptych_requests_queued")), limits=(1, 32)),
            _stat(
                "Engines not ready",
                total(by("role, state", now("triptych_instances", 'state!="READY"'), "max")),
                limits=(1, 2),
            ),
            Panel("Requests by status", [("{{status}}", by("status", _OF_ALL))], "reqps", stacked=True),
            Panel(
                "Requests by path",
                [("{{path}}", by("path", _OF_ALL))],
                "reqps",
                "Which stages they took apart; none: they ended before one was chosen",
                stacked=True,
            ),
            Panel(
                "Tokens",
                [("{{kind}}", by("kind", rate("triptych_tokens_total")))],
                what="Per second, as engines count them",
            ),
        ],
    ),
    Row(
        "Stages",
        [
            Panel(
                "Seconds by stage, median",
                [(stage, quantile(0.5, f"triptych_{stage}_seconds")) for stage in _STAGES],
                "s",
                "ttft and e2e are from the request's arrival; decode ends with the answer",
            ),
            Panel(
                "Seconds by stage, p95",
                [(stage, quantile(0.95, f"triptych_{stage}_seconds")) for stage in _STAGES],
                "s",
            ),
            _spread("Seconds per output token", "triptych_token_seconds", "s", "Mean of each request"),
            Panel(
                "Transfers, p95",
                [("{{link}}", quantile(0.95, "triptych_transfer_seconds", "le, link"))],
                "s",
                "Of KV: from the end of prefill to the first token, so with a step of decode",
            ),
            Panel(
                "Legs in work",
                [("{{role}}", by("role", now("triptych_leases")))],
                what="Open leases: calls to engines that hold load",
                stacked=True,
            ),
            Panel(
                "Items per request",
                [
                    ("mean", mean("triptych_request_items")),
                    ("p95", quantile(0.95, "triptych_request_items")),
                ],
            ),
        ],
    ),
    Row(
        "Latency",
        [
            _heatmap("To the first token", "triptych_ttft_seconds", "From the request's arrival"),
            _heatmap("To the end", "triptych_e2e_seconds", "From the request's arrival"),
            _heatmap("Encode", "triptych_encode_seconds", "All items of a request"),
            _heatmap("Per output token", "triptych_token_seconds", "Mean of each request"),
        ],
    ),
    Row(
        "Fleet",
        [
            Panel(
                "Engines",
                [("{{role}} {{state}}", by("role, state", now("triptych_instances") + " > 0", "max"))],
                stacked=True,
            ),
            Panel("Load by engine", [(_ENGINE, _LOAD)], what="Predicted tokens in work"),
            Panel(
                "Work ahead by engine",
                [(_ENGINE, by("role, exported_instance", now("triptych_instance_pending_seconds"), "max"))],
                "s",
                "How long the engine will take for what it has, at the speed it has shown",
            ),
            Panel(
                "Busy",
                [("{{role}}", by("role", now("triptych_stage_utilisation"), "max"))],
                "percentunit",
                "Part of their time in which engines work, over the last minutes",
                width=12,
            ),
            Panel(
                "Engines advised",
                [("{{role}}", by("role", now("triptych_advised_instances"), "max"))],
                what="The fewest that carry the load of the last minutes: see triptych plan",
                width=12,
            ),
            Panel(
                "Circuits",
                [(_ENGINE, by("role, exported_instance", now("triptych_circuit_state"), "max"))],
                what="An open one gets nothing but a trial now and then",
                kind="state-timeline",
                width=24,
                words=_CIRCUITS,
            ),
        ],
    ),
    Row(
        "Balance and caches",
        [
            Panel(
                "Imbalance",
                [("{{role}}", f"{by('role', _LOAD, 'max')} / {by('role', _LOAD, 'avg')}")],
                what="The fullest engine's load against the mean: 1 is even, 0/0 idle",
            ),
            Panel(
                "Items found in a cache",
                [
                    (
                        "hits",
                        share(rate("triptych_cache_items_total", 'result="hit"'), rate("triptych_cache_items_total")),
                    )
                ],
                "percentunit",
            ),
            Panel(
                "Items that need no encoding of their own",
                [
                    ("cached", total(rate("triptych_cache_items_total", 'result="hit"'))),
                    ("joined one in flight", total(rate("triptych_single_flight_joins_total"))),
                ],
                "ops",
            ),
            Panel(
                "Items by modality", [("{{modality}}", by("modality", rate("triptych_items_total")))], "ops", width=12
            ),
            Panel("Bytes", [("{{direction}}", by("direction", rate("triptych_bytes_total")))], "Bps", width=12),
        ],
    ),
    Row(
        "Failures",
        [
            Panel(
                "Legs failed, by cause",
                [("{{stage}} {{cause}}", by("stage, cause", rate("triptych_leg_failures_total")))],
                "ops",
                "Of the engine that was asked; others may have served the request",
            ),
            Panel(
                "Legs failed, by code",
                [("{{stage}} {{code}}", by("stage, code", rate("triptych_failures_total")))],
                "ops",
            ),
            Panel(
                "Tried elsewhere",
                [
                    ("{{stage}} again", by("stage", rate("triptych_retries_total"))),
                    ("hedged", total(rate("triptych_hedges_total"))),
                    ("stream resumed", total(rate("triptych_resumes_total"))),
                ],
                "ops",
            ),
            Panel("Fallbacks", [("{{reason}}", by("reason", rate("triptych_fallbacks_total")))], "ops"),
            Panel(
                "Refused", [("{{modality}} {{code}}", by("modality, code", rate("triptych_refused_total")))], "reqps"
            ),
            Panel(
                "Attempts per request",
                [("mean", mean("triptych_attempts")), ("p99", quantile(0.99, "triptych_attempts"))],
            ),
            Panel(
                "Circuits opened so far",
                [(_ENGINE, by("role, exported_instance", now("triptych_circuit_openings_total")))],
                width=24,
            ),
        ],
    ),
    Row(
        "The proxies themselves",
        [
            Panel(
                "Up",
                [("{{instance}}", 'up{job=~"$job",instance=~"$proxy"}')],
                kind="state-timeline",
                words=[("down", "red"), ("up", "green")],
            ),
            Panel(
                "Event loop lag, p99",
                [("{{instance}}", quantile(0.99, "triptych_event_loop_lag_seconds", "le, instance"))],
                "s",
                "How late what is due is run: beyond 0.1 s the proxy lacks CPU",
            ),
            Panel(
                "Decision, p99",
                [("{{instance}}", quantile(0.99, "triptych_decision_seconds", "le, instance"))],
                "s",
                "To choose a path and its engines",
            ),
            Panel(
                "Configuration",
                [("{{instance}}", now("triptych_config_reload_success"))],
                what="What became of the last reload",
                kind="state-timeline",
                words=_RELOADED,
            ),
            Panel("Versions", [("{{version}}", by("version", now("triptych_build_info"), "count"))], stacked=True),
            Panel(
                "Spans",
                [("{{result}}", by("result", rate("triptych_spans_total")))],
                "ops",
                "Only with --otlp-endpoint",
            ),
        ],
    ),
)


# ---- the whole


def board() -> dict[str, Any]:
    """The board as Grafana imports it."""
    return {
        "uid": "triptych",
        "title": "Triptych",
        "description": "Encode, prefill and decode behind one proxy: made by deploy/board.py",
        "tags": ["triptych", "llm"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cursor for all panels
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "",
        "templating": {"list": list(_variables())},
        "annotations": {"list": [_alerts()]},
        "panels": list(panels(ROWS)),
    }


def _variables() -> Iterator[dict[str, Any]]:
    yield {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    for name, label, query in (
        ("job", "Job", "label_values(triptych_requests_in_flight, job)"),
        ("proxy", "Proxy", 'label_values(triptych_requests_in_flight{job=~"$job"}, instance)'),
    ):
        yield {
            "name": name,
            "label": label,
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": query, "refId": name},
            "includeAll": True,
            "multi": True,
            "current": {"text": ["All"], "value": ["$__all"]},
            "refresh": 2,  # whenever the time range changes
            "sort": 1,
        }


def _alerts() -> dict[str, Any]:
    return {
        "name": "Alerts",
        "enable": True,
        "datasource": SOURCE,
        "expr": 'ALERTS{alertname=~"Triptych.*",alertstate="firing"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{role}} {{stage}} {{exported_instance}}",
        "iconColor": "red",
        "step": "30s",
    }


if __name__ == "__main__":
    json.dump(board(), sys.stdout, indent=1)
    print()
