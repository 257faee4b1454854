"""The Grafana dashboard against the metrics that there are."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from serve.engine.metrics import METRICS, Prometheus

BOARD = json.loads(
    (Path(__file__).resolve().parents[2] / "docker" / "grafana" / "ddm.json").read_text()
)
PANELS: list[dict[str, Any]] = BOARD["panels"]
CHARTS = [panel for panel in PANELS if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in CHARTS for target in panel["targets"]]
# A series of the dashboard -> the metric that makes it.
SERIES = {
    name: metric
    for metric, facts in METRICS.items()
    for name in {
        "counter": [f"{metric}_total"],
        "gauge": [metric],
        "histogram": [f"{metric}_bucket", f"{metric}_sum", f"{metric}_count"],
    }[facts.kind]
}


def series_in(query: str) -> list[str]:
    return re.findall(r"\$\{prefix\}(\w+)", query)


def test_every_series_is_exported() -> None:
    exported = set()
    for family in Prometheus().registry.collect():
        ends = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[
            family.type
        ]
        exported |= {family.name + end for end in ends}
    used = {name for query in QUERIES for name in series_in(query)}
    assert {f"ddm_{name}" for name in used} <= exported
    assert used <= SERIES.keys()


def test_every_metric_is_shown() -> None:
    assert {SERIES[name] for query in QUERIES for name in series_in(query)} == METRICS.keys()


@pytest.mark.parametrize("query", QUERIES)
def test_counters_and_histograms_are_rated(query: str) -> None:
    assert series_in(query)
    assert "ddm_" not in query  # the prefix alone says whose names these are
    for name in series_in(query):
        rated = f"rate(${{prefix}}{name}[$__rate_interval])" in query
        assert rated == (METRICS[SERIES[name]].kind != "gauge")
        assert name.endswith("_bucket") == ("histogram_quantile(" in query)
    assert query.count("(") == query.count(")")


@pytest.mark.parametrize("query", QUERIES)
def test_series_are_summed_by_their_labels(query: str) -> None:
    assert re.search(r"\b(sum|min)\b", query)  # Ray adds a node and a replica to every series
    by = {label for group in re.findall(r"\bby \(([^)]*)\)", query) for label in group.split(", ")}
    for name in series_in(query):
        has = {METRICS[SERIES[name]].label} | ({"le"} if name.endswith("_bucket") else set())
        assert by <= has
        assert name.endswith("_bucket") == ("le" in by)


def test_legends_name_labels_of_their_query() -> None:
    for panel in CHARTS:
        for target in panel["targets"]:
            kept = {
                label
                for group in re.findall(r"\bby \(([^)]*)\)", target["expr"])
                for label in group.split(", ")
            }
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            if panel["type"] != "stat":
                assert shown == kept - {"le"}


def test_a_variable_selects_the_prefix() -> None:
    variables = {variable["name"]: variable for variable in BOARD["templating"]["list"]}
    assert variables.keys() == {"datasource", "prefix"}
    options = {option["value"] for option in variables["prefix"]["options"]}
    assert options == {"ddm_", "ray_ddm_"}
    assert {part.split(" : ")[1] for part in variables["prefix"]["query"].split(", ")} == options
    assert variables["prefix"]["current"]["value"] == "ddm_"
    assert {panel["datasource"]["uid"] for panel in CHARTS} == {"${datasource}"}


def test_panels_have_unique_ids_and_descriptions() -> None:
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert len({(panel["title"], panel["type"]) for panel in PANELS}) == len(PANELS)
    assert [
        panel["title"] for panel in CHARTS if not panel["description"] or not panel["targets"]
    ] == []
    for panel in CHARTS:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs)
    assert BOARD["id"] is None  # Grafana gives one


def test_panels_tile_the_grid() -> None:
    cells = [
        {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        for at in (panel["gridPos"] for panel in PANELS)
    ]
    assert all(0 <= x < 24 and y >= 0 for cell in cells for x, y in cell)
    assert [(a, b) for a, b in combinations(range(len(cells)), 2) if cells[a] & cells[b]] == []
    height = max(y for cell in cells for _, y in cell) + 1
    assert len(set.union(*cells)) == 24 * height  # no holes either
