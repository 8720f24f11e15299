"""`--task auto`: look at each file, choose its prompts, and bake each choice once."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebr_engine.errors import EbrError
from ebr_engine.jobs.recipe import ClipOptions, Recipe

if TYPE_CHECKING:
    import numpy as np

    from ebr_engine.jobs.work import Choice

LOOKS = 3  # frames of a clip that are looked at, from its beginning on at equal distances


@dataclass(frozen=True)
class AutoTask:
    """Chooses the prompts of a file by what is wrong with it."""

    plan: Callable[[str], Any]  # the plan of tasks, written rain+haze
    guess: bool = False  # take the likeliest task where nothing is sure
    plans: dict[str, Any] = field(default_factory=dict)  # those that have been made

    def settled(self, recipe: Recipe, pictures: "Sequence[np.ndarray]") -> Recipe:
        """The recipe for pictures [H, W, 3] of one file: with the plan of what auto chose, and a note that tells of it.

        Raises `EbrError` when there is nothing to repair, `PromptError` when the backbone has no prompt for what there is.
        """
        import torch

        from ebr_engine.engine.classify import diagnose
        from ebr_engine.media.colour_fix import fix_for

        diagnosis = diagnose([torch.tensor(pixels).permute(2, 0, 1) for pixels in pictures])
        chosen = diagnosis.tasks or ((diagnosis.likeliest,) if self.guess else ())
        if not chosen:
            raise EbrError(f"auto sees {diagnosis}; name a task, or take the likeliest with --guess")
        tasks = "+".join(chosen)
        if tasks not in self.plans:
            self.plans[tasks] = self.plan(tasks)
        colour_fix = recipe.colour_fix or fix_for(chosen)
        sure = diagnosis if diagnosis.tasks else f"a guess, {chosen[0]} {diagnosis.probability[chosen[0]]:.0%}"
        return replace(recipe, run={**recipe.run, "plan": self.plans[tasks]}, colour_fix=colour_fix, note=f"auto: {sure}")


def recipe_for(choice: "Choice", common: Recipe, plan: Callable[..., Any], guess: bool) -> Recipe:
    """The recipe of a choice: with its plan and the correction of colour that is its task's, or with how auto finds them."""
    from ebr_engine.media.colour_fix import fix_for
    from ebr_engine.prompts.catalogue import AUTO

    if choice.task == AUTO:
        return replace(common, auto=AutoTask(plan, guess))
    fix = common.colour_fix or fix_for([part.partition(":")[0].strip() for part in (choice.task or "").split("+")])
    return replace(common, run={**common.run, "plan": plan(choice.task, choice.prompts or None)}, colour_fix=fix)


def settled(recipe: Recipe, look: "Callable[[], Sequence[np.ndarray]]") -> Recipe:
    """The recipe as it is, or, for task auto, as it is for the file that `look` shows pictures of."""
    return recipe.auto.settled(recipe, look()) if recipe.auto else recipe


def frames_of(clip: Path, options: ClipOptions) -> "list[np.ndarray]":
    """A few frames [H, W, 3] of the part of a clip that is to be restored."""
    from ebr_engine.media.video import open_video

    reading = {"deinterlace": options.deinterlace}
    with open_video(clip, start=options.start, frames=options.frames, **reading) as reader:
        pictures = [next(iter(reader)).pixels]
        length = reader.info.duration or 0.0
    begin = options.start or 0.0
    for index in range(1, LOOKS if length else 1):
        moment = begin + length * index / LOOKS
        with suppress(EbrError), open_video(clip, start=moment, frames=1, **reading) as reader:
            pictures += [frame.pixels for frame in reader]
    return pictures
