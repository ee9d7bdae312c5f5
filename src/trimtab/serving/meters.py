"""What the server counts, as Prometheus reads it: requests by HTTP, and the engine's own numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram as Times, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from trimtab.serving.replies import Row
from trimtab.serving.requests import Histogram, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Meters:
    """The numbers of one server."""

    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(stats))
        self._requests = Counter(
            "trimtab_http_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._seconds = Times(
            *("trimtab_http_request_seconds", "From a request's head to the end of its answer.", ["route"]),
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._tokens = Counter(
            "trimtab_model_tokens",
            "Tokens read (prompt) and written (completion) by model.",
            ["model", "kind"],
            registry=self._registry,
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """A request is over. ``route`` is one of ours, or empty."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def tokens(self, model: str, rows: Sequence[Row]) -> None:
        """What the rows of a request have read and written."""
        self._tokens.labels(model, "prompt").inc(sum(row.prompt_tokens for row in rows))
        self._tokens.labels(model, "completion").inc(sum(row.written for row in rows))

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, stats: Callable[[], Stats]) -> None:
        self._stats = stats

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        yield GaugeMetricFamily("trimtab_ready", "1 while requests are taken.", value=stats.state == "ready")
        for name, told, value in (
            ("running", "Requests that are being answered.", stats.running),
            ("queued", "Requests that wait.", stats.queued),
            (
                "tokens_per_second",
                "Tokens written per second, over the last ten seconds or so.",
                stats.tokens_per_second,
            ),
            ("adapters_known", "Adapters that can be asked.", stats.adapters_known),
            ("adapters_loaded", "Adapters in memory.", stats.adapters_loaded),
            ("adapter_bytes", "What those take.", stats.adapter_bytes),
        ):
            yield GaugeMetricFamily(f"trimtab_{name}", told, value=value)
        for name, told, value in (
            ("prompt_tokens", "Tokens read.", stats.prompt_tokens),
            ("completion_tokens", "Tokens written.", stats.completion_tokens),
            ("steps", "Passes of the model.", stats.steps),
            ("adapter_loads", "Adapters read from their folders.", stats.adapter_loads),
            ("adapter_evictions", "Adapters that left memory.", stats.adapter_evictions),
        ):
            yield CounterMetricFamily(f"trimtab_{name}", told, value=value)
        yield _by_reason("finished", "Answers that are over, by reason.", stats.finished)
        yield _by_reason("refused", "Requests that the engine did not take, by reason.", stats.refused)
        yield _histogram(
            "first_token_seconds", "From a request's arrival at the engine to its first token.", stats.first_token
        )
        yield _histogram(
            "duration_seconds", "From a request's arrival at the engine to its last token.", stats.duration
        )


def _by_reason(name: str, told: str, counts: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"trimtab_{name}", told, labels=["reason"])
    for reason, count in sorted(counts.items()):
        family.add_metric([reason], count)
    return family


def _histogram(name: str, told: str, seen: Histogram) -> Metric:
    so_far, buckets = 0, []
    for bound, count in zip((*map(str, seen.bounds), "+Inf"), seen.counts, strict=True):
        so_far += count
        buckets.append((bound, so_far))
    return HistogramMetricFamily(f"trimtab_{name}", told, buckets=buckets, sum_value=seen.total)
