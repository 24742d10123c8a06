"""Figures for Prometheus. No label has more values than there are routes, kinds of models and status codes: adapters may be thousands."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from turnrow.serving.engine import Engine

__all__ = ["Metrics"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

_STATES = ("starting", "running", "draining", "stopped", "broken")

_GAUGES = {
    "waiting": ("turnrow_answers_waiting", "Answers that wait to be generated"),
    "running": ("turnrow_answers_running", "Answers that are generated now"),
    "slots": ("turnrow_adapter_slots", "Adapters that can be on the device at once"),
    "slots_filled": ("turnrow_adapter_slots_filled", "Adapters on the device"),
    "slots_in_use": ("turnrow_adapter_slots_in_use", "Adapters on the device that running requests use"),
    "adapter_bytes": ("turnrow_adapter_device_bytes", "Memory of adapters on the device"),
    "cache_tokens": ("turnrow_cache_tokens", "Tokens for which the cache of keys and values has room"),
    "cache_tokens_held": ("turnrow_cache_tokens_held", "Tokens that it has room given out for"),
}
_COUNTERS = {
    "prompt_tokens": ("turnrow_prompt_tokens", "Tokens of prompts that were read, for each of their answers"),
    "generated_tokens": ("turnrow_generated_tokens", "Tokens that were generated"),
    "steps": ("turnrow_steps", "Steps of the model"),
    "adapters_put_in_slots": ("turnrow_adapter_uploads", "How often an adapter was put on the device"),
}
_STORE_GAUGES = {
    "registered": ("turnrow_adapters_registered", "Adapters that can be asked for"),
    "in_memory": ("turnrow_adapters_in_memory", "Adapters in the memory of the host"),
    "bytes_in_memory": ("turnrow_adapter_host_bytes", "Memory of these"),
}


class Metrics:
    """Of one server, with a registry of their own.

    Args:
        engine: asked whenever the figures are.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "turnrow_http_requests",
            "HTTP requests by route, kind of model (base, adapter, or none) and status; 499 for clients that went away",
            ["route", "model_kind", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            "turnrow_http_request_seconds",
            "From the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "turnrow_time_to_first_token_seconds",
            "From the acceptance of a request to the first of its tokens",
            ["model_kind"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.registry.register(_EngineFigures(engine))

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)


class _EngineFigures(Collector):
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        for name, (metric, text) in _GAUGES.items():
            yield GaugeMetricFamily(metric, text, getattr(stats, name))
        for name, (metric, text) in _COUNTERS.items():
            yield CounterMetricFamily(metric, text, getattr(stats, name))
        for name, (metric, text) in _STORE_GAUGES.items():
            yield GaugeMetricFamily(metric, text, stats.store[name])
        yield CounterMetricFamily(
            "turnrow_adapter_loads", "How often an adapter was read from disk", stats.store["loads"]
        )
        # what was put into a slot and lies there no more had to make room, or was unloaded
        evicted = max(0, stats.adapters_put_in_slots - stats.slots_filled)
        yield CounterMetricFamily("turnrow_adapter_evictions", "How often an adapter left its slot", evicted)
        ended = CounterMetricFamily("turnrow_answers", "Answers that ended, and requests that failed", labels=["how"])
        for how, count in sorted(stats.finished.items()):
            ended.add_metric([how], count)
        yield ended
        state = GaugeMetricFamily("turnrow_engine_state", "1 for the state in which the engine is", labels=["state"])
        for name in _STATES:
            state.add_metric([name], float(name == stats.state))
        yield state
