"""What a server counts and times, for Prometheus. Each server has numbers of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The numbers.

    Args:
        waiting: says how many pictures wait.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        registry = self._registry = CollectorRegistry()
        Gauge("sdtrt_queue_pictures", "Pictures that wait", registry=registry).set_function(waiting)
        self.ready = Gauge("sdtrt_workers_ready", "Workers that take pictures", registry=registry)
        self.restarts = Counter("sdtrt_worker_ends", "Workers that ended unasked", registry=registry)
        self.builds = Counter("sdtrt_builds", "Builds of engines, by result", ["result"], registry=registry)
        self.pictures = Counter(
            "sdtrt_pictures", "Pictures, by interface and end", ["interface", "end"], registry=registry
        )
        self.batch = Histogram("sdtrt_batch_pictures", "Pictures of a call", buckets=BATCHES, registry=registry)
        self.wait = Histogram("sdtrt_wait_seconds", "From the request to its call", buckets=SECONDS, registry=registry)
        self.step = Histogram("sdtrt_step_seconds", "A denoising step", buckets=STEP_SECONDS, registry=registry)
        self.picture = Histogram(
            "sdtrt_picture_seconds",
            "From the request to its picture",
            ["interface"],
            buckets=SECONDS,
            registry=registry,
        )
        self.answers = Counter("sdtrt_answers", "HTTP answers, by status", ["status"], registry=registry)
        self._memory = Gauge("sdtrt_gpu_memory_bytes", "PyTorch's memory on the GPU", ["kind"], registry=registry)

    def note_memory(self, memory: Mapping[str, int]) -> None:
        """Note a worker's GPU memory."""
        for kind, count in memory.items():
            self._memory.labels(kind).set(count)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self._registry)
