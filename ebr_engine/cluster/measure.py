"""`ebr-engine eval --cluster`: files measured by the workers of a cluster, each with the metrics and the model loaded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_engine.cluster.connect import connected, share_of
from ebr_engine.cluster.contents import Contents, as_they_end, contents_of, prompts_named, unpacked
from ebr_engine.cluster.pool import Pool

if TYPE_CHECKING:
    from ebr_engine.evaluation.paired import Item, Media
    from ebr_engine.evaluation.run import Row, Settings


class MeasureWorker:
    """`settings`: what to measure and how; `prompts`: files that it names; computes with `threads` on `device`."""

    def __init__(self, settings: "Settings", device: str, prompts: Contents, threads: int):
        import torch

        from ebr_engine.evaluation.run import Measurer

        torch.set_num_threads(threads)
        with unpacked(prompts) as place:
            if settings.restoring is not None and prompts:
                request = settings.restoring.request
                found = tuple((place(Path(path)), weight) for path, weight in request.prompt)
                settings = replace(settings, restoring=replace(settings.restoring, request=request.with_(prompt=found)))
            self._measurer = Measurer(settings, device)

    def row(self, item: "Item", contents: Contents) -> "Row":
        """The row of an item, its files as the driver read them."""
        from ebr_engine.evaluation.run import row_of

        with unpacked(contents) as place:

            def moved(media: "Media | None") -> "Media | None":
                return media and replace(media, paths=tuple(map(place, media.paths)))

            here = replace(item, source=moved(item.source), target=moved(item.target), restored=moved(item.restored))
            row = row_of(self._measurer, here)
            if "error" in row:
                for path in contents:
                    row["error"] = row["error"].replace(str(place(Path(path))), path)
        return row


def measuring(
    where: str, cores: int, settings: "Settings", device: str, tell: Callable[[str], None]
) -> "Callable[[Sequence[Item]], Iterator[Row]]":
    """What gives the rows of items, measured on a cluster (see `connect.connected`), as they come."""
    prompts = prompts_named([settings.restoring.request] if settings.restoring else [])

    def rows(items: "Sequence[Item]") -> "Iterator[Row]":
        if not items:
            return
        with connected(where) as ray:
            share = share_of(ray, device, cores)
            with Pool(MeasureWorker, (settings, device, prompts, cores), share, most=len(items), tell=tell) as pool:

                def give(item: "Item"):
                    paths = [path for media in (item.source, item.target, item.restored) if media for path in media.paths]
                    return pool.submit("row", item, contents_of(paths))

                yield from (row for _, row in as_they_end(pool, items, give))

    return rows
