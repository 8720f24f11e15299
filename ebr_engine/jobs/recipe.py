"""How the files of one request are restored and written: its plan and its size, found once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError
from ebr_engine.prompts.catalogue import AUTO
from ebr_engine.request import PLAN, RUN, RestoreRequest

if TYPE_CHECKING:
    import numpy as np


class NothingToRepair(EbrError):
    """Task auto has looked at a file and sees nothing that it could repair."""


@dataclass(frozen=True)
class Recipe:
    """How the files of one request are restored and written."""

    request: RestoreRequest
    plan: Any = None  # None: auto finds it for each file
    size: tuple[int, int] | None = None  # height and width to restore at; None is each picture's own
    colour_fix: str | None = None  # of `media.colour_fix`; None is the one for what auto chooses, or none
    digest: str = ""  # of all that decides what the outputs look like: by it a later run knows its own work
    keep_parts: bool = False  # of clips, so that a later run goes on in the middle
    note: str = ""  # told of every file

    @property
    def run(self) -> dict[str, Any]:
        """What `Restorer.restore` and `Restorer.run` take beside pixels."""
        return {"plan": self.plan, **self.request.part(RUN)}


class Recipes:
    """The recipes of all requests of a run, each made when it is first asked for."""

    def __init__(self, restorer: Any, digests: dict[RestoreRequest, str] | None = None, keep_parts: bool = False):
        self.restorer, self.digests, self.keep_parts = restorer, digests or {}, keep_parts
        self._made: dict[RestoreRequest, Recipe] = {}
        self._plans: dict[RestoreRequest, Any] = {}

    def of(self, request: RestoreRequest) -> Recipe:
        """The recipe of a request; `EbrError` for one that the backbone cannot meet."""
        if request not in self._made:
            self._made[request] = self._make(request)
        return self._made[request]

    def _make(self, request: RestoreRequest) -> Recipe:
        from ebr_engine.media.colour_fix import fix_for

        restorer = self.restorer
        restorer.tile_size(request.tile, request.tile_overlap)  # refuses impossible ones before any picture is read
        recipe = Recipe(
            request,
            size=restorer.released_size if request.size == "released" else None,
            colour_fix=request.color_fix,
            digest=self.digests.get(request, ""),
            keep_parts=self.keep_parts,
        )
        if request.task == AUTO:
            return recipe
        tasks = [part.partition(":")[0].strip() for part in (request.task or "").split("+")]
        return replace(recipe, plan=self._plan(request), colour_fix=request.color_fix or fix_for(tasks))

    def _plan(self, request: RestoreRequest) -> Any:
        if request not in self._plans:
            options = {name: value for name, value in request.part(PLAN).items() if name not in ("task", "prompt")}
            self._plans[request] = self.restorer.plan(request.task, list(request.prompt) or None, **options)
        return self._plans[request]

    def seen(self, recipe: Recipe, look: "Callable[[], Sequence[np.ndarray]]") -> Recipe:
        """The recipe as it is or, for task auto, as it is for the file that `look` shows pictures [H, W, 3] of.

        Raises `NothingToRepair`, and `PromptError` when the backbone has no prompt for what there is.
        """
        if recipe.request.task != AUTO:
            return recipe
        import torch

        from ebr_engine.media.colour_fix import fix_for

        diagnosis = self.restorer.diagnose([torch.tensor(pixels).permute(2, 0, 1) for pixels in look()])
        chosen = diagnosis.tasks or ((diagnosis.likeliest,) if recipe.request.guess else ())
        if not chosen:
            raise NothingToRepair(f"auto sees {diagnosis}; name a task, or take the likeliest with --guess")
        plan = self._plan(recipe.request.with_(task="+".join(chosen)))
        sure = diagnosis if diagnosis.tasks else f"a guess, {chosen[0]} {diagnosis.probability[chosen[0]]:.0%}"
        return replace(recipe, plan=plan, colour_fix=recipe.colour_fix or fix_for(chosen), note=f"auto: {sure}")
