"""Server metrics in Prometheus' text format."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from nanochat.serve.pool import EnginePool


class Metrics:
    """Counters and histograms of one server."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool = pool
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "Responses by path and status.", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "Time from the request to the first token of a reply.",
            buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.speed = Histogram(
            "nanochat_reply_tokens_per_second",
            "Generation speed of a reply after its first token.",
            buckets=(1, 3, 10, 30, 100, 300, 1000, 3000),
            registry=self.registry,
        )
        self.registry.register(self)  # calls `collect` on each scrape

    def collect(self) -> Iterable[Metric]:
        """Yield the metrics that the engines report."""
        pool = self.pool
        stats = [engine.stats for engine in pool.engines if engine.stats]
        loaded = sum(bool(engine.loaded) for engine in pool.engines)
        yield GaugeMetricFamily("nanochat_requests_running", "Replies being generated.", pool.running)
        yield GaugeMetricFamily("nanochat_requests_waiting", "Replies waiting for a slot.", pool.waiting)
        yield GaugeMetricFamily("nanochat_engines", "Engines with a loaded model.", loaded)
        yield GaugeMetricFamily("nanochat_kv_cache_bytes", "Size of the KV caches.", sum(s.kv_bytes for s in stats))
        for name, text in (
            ("prompt_tokens", "Tokens of all prompts since the model was loaded."),
            ("prefilled_tokens", "Prompt tokens computed, not reused from the KV cache."),
            ("generated_tokens", "Tokens generated."),
            ("prefix_hits", "Prompts that reused a prefix in the KV cache."),
        ):
            yield CounterMetricFamily(f"nanochat_{name}", text, sum(getattr(s, name) for s in stats))
