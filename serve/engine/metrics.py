"""What is counted while serving, under the same names wherever it is scraped.

A `Metrics` takes numbers by short name; here they go nowhere. `Prometheus` keeps them for `GET /metrics`.
"""

from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    60.0,
    300.0,
)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metric(NamedTuple):
    """A metric: what kind, what it says, which label it has, and a histogram's bounds."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str | None = None
    bounds: tuple[float, ...] = ()


METRICS = {
    "requests": Metric("counter", "Requests for images answered, by HTTP status", "status"),
    "request_seconds": Metric(
        "histogram", "From a request to the end of its answer", bounds=SECONDS
    ),
    "rejections": Metric("counter", "Requests turned away, by reason", "reason"),
    "images": Metric("counter", "Images made"),
    "key_images": Metric("counter", "Images made for a key", "key"),
    "key_nfe": Metric("counter", "Expert evaluations for a key", "key"),
    "key_rejections": Metric("counter", "Requests of a key that were turned away with 429", "key"),
    "jobs": Metric("counter", "Jobs that ended, by how", "status"),
    "pending_cost": Metric("gauge", "Expert evaluations that were accepted and are still to come"),
    "active_requests": Metric("gauge", "Requests accepted and not yet answered"),
    "queue_length": Metric("gauge", "Images that wait for an expert", "expert"),
    "expert_alive": Metric(
        "gauge", "1 if an expert can be reached, 0 if it counts as away", "expert"
    ),
    "batch_fill": Metric(
        "histogram", "Images in a call, as a share of max_batch", "expert", SHARES
    ),
    "call_seconds": Metric("histogram", "One call of an expert", "expert", SECONDS),
    "route_seconds": Metric("histogram", "Moving on and routing all that is ready", bounds=SECONDS),
    "nfe": Metric("counter", "Expert evaluations, one for each image of a call", "expert"),
    "retries": Metric(
        "counter", "Images whose call was lost or failed and was made again", "expert"
    ),
}


class Metrics:
    """Takes numbers by the names of `METRICS`, with a value for their label; this one forgets them."""

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        """Add to a counter."""

    def gauge(self, name: str, value: float, **label: str) -> None:
        """Set a gauge."""

    def observe(self, name: str, value: float, **label: str) -> None:
        """Add to a histogram."""


class Prometheus(Metrics):
    """Keeps them in a registry of its own, as `ddm_NAME`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kinds: dict[str, Any] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}
        self.kept: dict[str, Any] = {
            name: kinds[metric.kind](
                f"ddm_{name}",
                metric.help,
                [metric.label] if metric.label else [],
                registry=self.registry,
                **({"buckets": metric.bounds} if metric.bounds else {}),
            )
            for name, metric in METRICS.items()
        }

    def _at(self, name: str, label: dict[str, str]) -> Any:
        return self.kept[name].labels(**label) if label else self.kept[name]

    def count(self, name: str, amount: float = 1, **label: str) -> None:
        self._at(name, label).inc(amount)

    def gauge(self, name: str, value: float, **label: str) -> None:
        self._at(name, label).set(value)

    def observe(self, name: str, value: float, **label: str) -> None:
        self._at(name, label).observe(value)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
