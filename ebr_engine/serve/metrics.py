"""What `/metrics` tells, in Prometheus' format."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ebr_engine.serve.store import QUEUED, RUNNING, Store

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Metrics:
    """One server's numbers; none is shared with another in the same process."""

    def __init__(self, store: Store):
        self._registry = CollectorRegistry()
        made = {"registry": self._registry}
        Gauge("ebr_queue_length", "Jobs that wait.", **made).set_function(lambda: store.count(QUEUED))
        Gauge("ebr_running", "Jobs that are being restored.", **made).set_function(lambda: store.count(RUNNING))
        Gauge("ebr_store_bytes", "Size of all files kept.", **made).set_function(store.used)
        self.jobs = Counter("ebr_jobs", "Jobs that are over, by how they ended.", ["state"], **made)
        self.seconds = Histogram("ebr_job_seconds", "Seconds of a job, by stage.", ["stage"], buckets=_SECONDS, **made)
        self.refused = Counter("ebr_requests_refused", "Requests that were turned away, by status.", ["status"], **made)

    def text(self) -> bytes:
        return generate_latest(self._registry)
