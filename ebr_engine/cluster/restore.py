"""`ebr-engine restore --cluster`: the work of a run on the workers of a cluster."""

from ebr_engine.cluster.connect import connected, share_of
from ebr_engine.cluster.fleet import Fleet
from ebr_engine.cluster.run import FleetRun
from ebr_engine.jobs.progress import Progress
from ebr_engine.jobs.recipe import Recipes
from ebr_engine.jobs.run import run_work
from ebr_engine.jobs.work import Work
from ebr_engine.request import RestoreRequest


def restore_on(
    where: str,
    cores: int,
    request: RestoreRequest,
    work: Work,
    progress: Progress,
    keep_parts: bool = True,
    fail_fast: bool = False,
) -> int:
    """Restore the jobs of a run on a cluster (`connect.connected`) of workers of so many cores; the number that failed."""
    with connected(where) as ray:
        share = share_of(ray, request.device, cores)
        with Fleet(request, work, share, lambda text: progress.error(text, "note")) as fleet:
            recipes = Recipes(fleet, work.digests, keep_parts=keep_parts)
            return run_work(fleet, work, progress, recipes, fail_fast, FleetRun)
