"""Makes Grafana's JSON of the panels in `scripts.monitoring.panels`."""

from __future__ import annotations

from typing import Any

from scripts.monitoring.panels import OVERVIEW, ROWS, VARIABLES, GrafanaPanel

SCHEMA_VERSION = 41
RUNBOOK = "https://github.com/tandem/tandem/blob/main/docs/runbook.md"
DATASOURCE = {"type": "prometheus", "uid": "$datasource"}
PANEL_HEIGHT, STAT_HEIGHT, GRID_WIDTH = 8, 4, 24
COLORS = {"student": "blue", "teacher": "orange"}


def dashboard() -> dict[str, Any]:
    """Return what Grafana imports."""
    return {
        "uid": "tandem",
        "title": "Tandem: student beside teacher",
        "description": "What the student saves in latency and costs in quality, on live traffic.",
        "tags": ["tandem"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "links": [_link("Runbook", RUNBOOK)],
        "templating": {"list": [_datasource(), *map(_variable, VARIABLES, VARIABLES.values())]},
        "panels": _panels(),
    }


def _panels() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append({"type": "row", "title": title, "collapsed": False, "panels": [],
                       "gridPos": {"x": 0, "y": y, "w": GRID_WIDTH, "h": 1}})  # fmt: skip
        y += 1
        num_columns = 6 if row is OVERVIEW else 2
        height = STAT_HEIGHT if row is OVERVIEW else PANEL_HEIGHT
        width = GRID_WIDTH // num_columns
        for index, panel in enumerate(row):
            line, column = divmod(index, num_columns)
            place = {"x": column * width, "y": y + line * height, "w": width, "h": height}
            panels.append(_panel(panel) | {"gridPos": place})
        y += -(-len(row) // num_columns) * height
    return [panel | {"id": number} for number, panel in enumerate(panels, 1)]


def _panel(panel: GrafanaPanel) -> dict[str, Any]:
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "links": [_link("Runbook", RUNBOOK)],
        "targets": [
            _target(panel, letter, *query)
            for letter, query in zip("ABCDEFGH", panel.queries, strict=False)
        ],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _options(panel),
    }


def _target(panel: GrafanaPanel, letter: str, expression: str, legend: str) -> dict[str, Any]:
    target = {
        "refId": letter,
        "datasource": DATASOURCE,
        "expr": expression,
        "legendFormat": legend,
        "editorMode": "code",
    }
    if panel.kind == "table":
        return target | {"format": "table", "instant": True, "range": False}
    return target | {"format": "heatmap" if panel.kind == "heatmap" else "time_series"}


def _defaults(panel: GrafanaPanel) -> dict[str, Any]:
    if panel.kind != "timeseries":
        return {"unit": panel.unit}
    stacking = {"mode": "normal" if panel.is_stacked else "none", "group": "A"}
    style = {"fillOpacity": 20 if panel.is_stacked else 0, "showPoints": "never"}
    return {"unit": panel.unit, "min": 0, "custom": style | {"stacking": stacking}}


def _overrides(panel: GrafanaPanel) -> list[dict[str, Any]]:
    """Give each model its colour, in every plot."""
    if panel.kind != "timeseries":
        return []
    return [
        {
            "matcher": {"id": "byRegexp", "options": f"/^{role}/"},
            "properties": [{"id": "color", "value": {"mode": "shades", "fixedColor": color}}],
        }
        for role, color in COLORS.items()
    ]


def _options(panel: GrafanaPanel) -> dict[str, Any]:
    if panel.kind == "stat":
        calculated = {"calcs": ["lastNotNull"], "fields": "", "values": False}
        return {"reduceOptions": calculated, "textMode": "value_and_name", "graphMode": "area"}
    if panel.kind == "timeseries":
        legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "max"]}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    if panel.kind == "heatmap":
        return {"calculate": False, "yAxis": {"unit": "nats/token"}}
    return {}


def _link(title: str, url: str) -> dict[str, Any]:
    return {"title": title, "type": "link", "url": url, "targetBlank": True}


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"], "selected": True},
    }
