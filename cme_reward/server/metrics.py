"""What Prometheus can know of the reward server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    Summary,
)

from cme_reward.batch import CMEBatch

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SIZES = tuple(2**k for k in range(13))


class ServerMetrics:
    """One registry per server, so that several can live in a process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        self.info = Info("cme_server", "Version and models.", registry=registry)
        self.requests = Counter(
            "cme_requests",
            "Requests by path and answer; 499: the client left before.",
            ["path", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "cme_request_seconds",
            "Seconds from the headers to the end of the reply, by path.",
            ["path"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge("cme_requests_held", "Scoring requests held.", registry=registry)
        self.held_bytes = Gauge("cme_bytes_held", "Bytes of their bodies.", registry=registry)
        self.responses = Counter("cme_responses", "Responses scored.", registry=registry)
        self.tokens = Counter("cme_tokens", "Generator tokens scored.", registry=registry)
        self.truncated = Counter(
            "cme_truncated",
            "Responses that the verifier's context did not hold.",
            registry=registry,
        )
        self.rewards = Summary(
            "cme_sequence_reward_nats", "Minus the sequence reward.", registry=registry
        )
        self.dropped = Counter(
            "cme_dropped_nats", "Surprise on tokens without a reward.", registry=registry
        )
        self.batch = Histogram(
            "cme_verifier_call_responses",
            "Responses that one call of the verifier scored.",
            buckets=_SIZES,
            registry=registry,
        )
        self.verifier_seconds = Histogram(
            "cme_verifier_call_seconds",
            "Seconds of one call of the verifier.",
            buckets=_SECONDS,
            registry=registry,
        )

    def scored(self, batch: CMEBatch) -> None:
        self.responses.inc(len(batch.sequence_rewards))
        # numpy: on arrays this small, torch takes ten times as long.
        self.tokens.inc(int(batch.mask.numpy().sum()))
        self.truncated.inc(batch.metrics["truncated"])
        self.dropped.inc(float(batch.dropped_nats.numpy().sum()))
        for reward in batch.sequence_rewards.tolist():
            self.rewards.observe(-reward)

    @contextmanager
    def verifier_call(self, n_responses: int) -> Iterator[None]:
        """Around one call of the verifier."""
        self.batch.observe(n_responses)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.verifier_seconds.observe(time.perf_counter() - started)
