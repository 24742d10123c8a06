"""The figures of several processes as those of one server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

__all__ = ["joined"]


def joined(texts: Mapping[str, str]) -> bytes:
    """Figures in the text format of Prometheus, each with the label ``replica``.

    Args:
        texts: of each replica by its name, in the same format.
    """
    registry = CollectorRegistry()
    registry.register(_Joined(texts))
    return generate_latest(registry)


class _Joined(Collector):
    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, text in self._texts.items():
            for family in text_string_to_metric_families(text):
                own = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    own.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value, sample.timestamp)
        yield from families.values()
