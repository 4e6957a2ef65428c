"""What the server tells of itself, in Prometheus' text format."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.serve.pool import Pool

FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SPEED_BUCKETS = (1, 3, 10, 30, 100, 300, 1000, 3000)


class Metrics:
    """Counters of one server."""

    def __init__(self, pool: Pool) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nanochat_requests", "Requests answered, by path and status.", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "nanochat_time_to_first_token_seconds",
            "From the request to the first token of its reply.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.speed = Histogram(
            "nanochat_reply_tokens_per_second",
            "Tokens of a reply over the time it was written in, after the first.",
            buckets=SPEED_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_PoolMetrics(pool))

    def text(self) -> bytes:
        """Everything, as it stands."""
        return generate_latest(self.registry)


class _PoolMetrics:
    """What the engines report anyway, read when it is asked for."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def collect(self) -> Iterable[Metric]:
        pool = self.pool
        stats = [worker.stats for worker in pool.workers if worker.stats]
        yield GaugeMetricFamily("nanochat_requests_running", "Replies being written.", pool.running)
        yield GaugeMetricFamily("nanochat_requests_waiting", "Replies waiting for a slot.", pool.waiting)
        yield GaugeMetricFamily("nanochat_engines", "Engines with a model.", sum(bool(w.loaded) for w in pool.workers))
        yield GaugeMetricFamily("nanochat_kv_cache_bytes", "Memory of the KV caches.", sum(s.kv_bytes for s in stats))
        for name, text in (
            ("prompt_tokens", "Tokens of all prompts, since the model was loaded."),
            ("prefilled_tokens", "Of these, tokens that had to be computed."),
            ("generated_tokens", "Tokens written."),
            ("prefix_hits", "Prompts that began with one in the KV cache."),
        ):
            yield CounterMetricFamily(f"nanochat_{name}", text, sum(getattr(s, name) for s in stats))


class Counted:
    """Counts every response by the route that gave it."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")  # not what was asked for, which may be anything
                self.metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self.app(scope, receive, counting if scope["type"] == "http" else send)
