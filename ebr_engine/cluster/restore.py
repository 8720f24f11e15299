"""`ebr-engine restore --cluster`: a fleet on the cluster that is named."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ebr_engine.cluster.connect import connected, share_of
from ebr_engine.cluster.fleet import Fleet
from ebr_engine.jobs.progress import Progress
from ebr_engine.request import RestoreRequest

if TYPE_CHECKING:
    from ebr_engine.jobs.files import Job


@contextmanager
def fleet_on(
    where: str,
    cores: int,
    most: int | None,
    request: RestoreRequest,
    requests: Iterable[RestoreRequest],
    jobs: "Sequence[Job]",
    progress: Progress,
) -> Iterator[Fleet]:
    """A fleet of `most` workers of so many cores each on a cluster (see `connected`); other arguments are those of `Fleet`."""
    with connected(where) as ray:
        share = share_of(ray, request.device, cores)
        with Fleet(request, requests, jobs, share, most, lambda text: progress.error(text, "note")) as fleet:
            yield fleet
