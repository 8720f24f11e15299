"""`ebr-engine cache-latents --cluster`: crops encoded by the workers of a cluster, kept by the driver."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ebr_engine.cluster.connect import connected, share_of
from ebr_engine.cluster.contents import Contents, as_they_end, contents_of, unpacked
from ebr_engine.cluster.pool import Pool

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.training.config import LearnConfig
    from ebr_engine.training.data import PairSamples, View
    from ebr_engine.training.latents import Encode
    from ebr_engine.training.pairs import Pair


class EncodeWorker:
    """A loaded backbone, whose codec encodes crops as `config` has them, with `threads`."""

    def __init__(self, config: "LearnConfig", threads: int):
        import torch

        from ebr_engine.training.data import PairSamples
        from ebr_engine.training.distributed import World
        from ebr_engine.training.latents import LatentSamples
        from ebr_engine.training.learner import check_fits
        from ebr_engine.training.loop import backbone_of

        torch.set_num_threads(threads)
        backbone = backbone_of(config, config.device)
        check_fits(config, backbone, World())
        self._latents = LatentSamples(replace(config, cache=""), PairSamples(config, []), backbone)

    def fingerprint(self) -> str:
        """What tells the codec from others."""
        from ebr_engine.training.latents import fingerprint

        return fingerprint(self._latents.backbone.codec)

    def encode(self, pair: "Pair", view: "View", contents: Contents) -> "tuple[np.ndarray, ...]":
        """Degraded and clean latent [C, f, h, w] float32 of a view; `BadDataError` for a pair that cannot be used."""
        import torch

        from ebr_engine.training.data import BadDataError

        with unpacked(contents) as place, torch.no_grad():
            degraded = pair.degraded and tuple(map(place, pair.degraded))
            try:
                latents = self._latents.pair(replace(pair, clean=tuple(map(place, pair.clean)), degraded=degraded), view)
            except BadDataError as error:
                text = str(error)
                for path in (*pair.clean, *(pair.degraded or ())):
                    text = text.replace(str(place(path)), str(path))
                raise BadDataError(text) from None
        return tuple(latent.float().cpu().numpy() for latent in latents)


def fill_on(
    where: str,
    cores: int,
    config: "LearnConfig",
    samples: "PairSamples",
    tell: Callable[[str], None],
    callback: Callable[[int, int], None] | None = None,
) -> tuple[int, int]:
    """As `training.latents.fill_cache`, encoded on a cluster (see `connect.connected`)."""
    import torch

    from ebr_engine.training.data import BadDataError
    from ebr_engine.training.latents import LatentCache, fill

    with connected(where) as ray:
        share = share_of(ray, config.device, cores)
        with Pool(EncodeWorker, (config, cores), share, tell=tell) as pool:
            cache = LatentCache(Path(config.cache), config, pool.submit("fingerprint").result())

            def encode(todo: "Iterator[Encode]"):
                def give(one: "Encode"):
                    return pool.submit("encode", one.pair, one.view, contents_of([*one.pair.clean, *(one.pair.degraded or ())]))

                for one, latents in as_they_end(pool, todo, give, BadDataError):
                    found = isinstance(latents, Exception)
                    yield one, latents if found else tuple(torch.from_numpy(latent.copy()) for latent in latents)

            return fill(config, samples, cache, encode, callback)
