"""H. Past the paper: prompts that adapt to the picture, or to the moment, beside one prompt for everything.

* by moment: a block's strength is α + β·(2t/T0 − 1), so that it can be another at the first step than at the last
* by picture, strength: α + A·z(x), where z(x) is what the frozen transformer makes of the degraded picture with the empty prompt
* by picture, router: four prompts of a quarter of the tokens each, their strengths α_k + A_k·z(x)

z(x): the last layer's input at the first step, its mean over all tokens, brought to mean 0 and deviation 1 over degraded scenes.
It costs one evaluation more a picture. β and A begin at 0; everything is learned together by the bridge's objective, in as many
iterations as the one prompt. `--tasks` and the other options as for all experiments.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.common import Study, arguments, fingerprint, key_of, study_of
from benchmarks.claims.fitting import fit, pairs
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import Mini
from ebr_engine.backbones.wan.model import BlockStep, WanBlock
from ebr_engine.evaluation.photos import Case
from ebr_engine.kernels.prompt_attention import prompt_attention_ref
from ebr_engine.media.degradations import degrade
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.scenes import ScenePool, still_pool

PROMPTS = 4  # of the router
SCENES = 64  # degraded, that features are standardised over
REFERENCE = "one prompt"


@dataclass(frozen=True)
class Features:
    """z(x) of latents, as the empty prompt sees them."""

    mini: Mini
    t0: float

    @torch.no_grad()
    def raw(self, degraded: Tensor) -> Tensor:
        """[B, D]: the last layer's input, its mean over the tokens; of noiseless latents [B, C, 1, h, w]."""
        seen: list[Tensor] = []
        trunk = self.mini.trunk
        hook = trunk.patch_out.register_forward_pre_hook(lambda _, given: seen.append(given[0].float().mean(1)))
        try:
            trunk(degraded * (1 - self.t0), self.step)
        finally:
            hook.remove()
        return seen[0]

    @cached_property
    def step(self) -> Any:
        """The tables of the first step with the empty prompt."""
        tables = self.mini.conditioner(torch.tensor([self.t0 * 1000]), self.mini.context)
        return tables.to("cpu", self.mini.trunk.patch_in.weight.dtype)[0]


class Adaptive:
    """Prompts whose strengths are functions of the moment or of features.

    `residual` [P, L, D]; `alpha` [P, blocks]; `gain`: [P, blocks] of the moment, or [P, blocks, D] of the features. `adapts`:
    to the "moment", to the "picture", or to nothing ("").
    """

    def __init__(self, study: Study, prompts: int, adapts: str, seed: int):
        learning, config = study.learning, study.mini.trunk.config
        tokens = max(1, learning.tokens // prompts)
        generator = torch.Generator().manual_seed(seed)
        blocks, width = config.num_layers, config.width
        self.study, self.adapts, self.by_picture = study, adapts, adapts == "picture"
        self.residual = torch.randn(prompts, tokens, width, generator=generator) * 0.02
        self.alpha = torch.full((prompts, blocks), learning.alpha)
        self.gain = torch.zeros(prompts, blocks, *([width] if self.by_picture else []))
        self.mean, self.deviation = torch.zeros(width), torch.ones(width)
        self.features = Features(study.mini, learning.t0)

    @property
    def parameters(self) -> list[Tensor]:
        """All that is learned."""
        return [self.residual, self.alpha, *([self.gain] if self.adapts else [])]

    def z(self, degraded: Tensor) -> Tensor:
        """Standardised features of latents, [B, D], so scaled that their products with `gain` are of the size of its entries."""
        return (self.features.raw(degraded) - self.mean) / self.deviation / len(self.mean) ** 0.5

    def strengths(self, moment: Tensor, z: Tensor | None) -> Tensor:
        """[B, P, blocks] at times `moment` [B] in 0..T0, for features [B, D]."""
        if z is not None:
            return self.alpha + torch.einsum("bd,pkd->bpk", z, self.gain)
        return self.alpha + self.gain * (2 * moment / self.study.learning.t0 - 1).view(-1, 1, 1)

    def learn(self, task: str, seed: int) -> None:
        """Learn on a task; the batches are those of every other arm."""
        mini, learning = self.study.mini, self.study.learning
        how = task_of(task)
        with still_pool(learning.scenes) as pool:
            if self.by_picture:
                self._standardise(pool, how)
            for parameter in self.parameters:
                parameter.requires_grad_()

            def velocity(state: Tensor, t: Tensor) -> Tensor:
                z = self.z(self.degraded) if self.by_picture else None
                weight = self.strengths(t, z)
                tables = mini.conditioner(t * 1000, mini.context, [(one, torch.zeros(weight.shape[2])) for one in self.residual])
                return sampled_velocity(mini, tables, weight, state)

            def remembering(clean: Tensor, generator: torch.Generator, depth: Tensor | None) -> Tensor:
                degraded = how(clean, generator, depth)
                self.degraded = mini.codec.encode(degraded.unsqueeze(2))
                return degraded

            fit(self.parameters, velocity, mini.codec, pool, remembering, learning, seed)
        for parameter in self.parameters:
            parameter.requires_grad_(False)

    def _standardise(self, pool: ScenePool, how: Callable) -> None:
        generator = torch.Generator().manual_seed(0)
        learning = replace(self.study.learning, batch=min(SCENES, 4 * self.study.learning.batch))
        _, degraded = pairs(pool, learning, how, generator)
        raw = self.features.raw(self.study.mini.codec.encode(degraded.unsqueeze(2)))
        self.mean, self.deviation = raw.mean(0), raw.std(0).clamp(min=1e-6)

    def restore(self, case: Case) -> Tensor:
        """A case's photo restored along the fast schedule."""
        study = self.study
        table = study.ebr_table(study.learning.t0)
        z = self.z(study.mini.codec.encode(case.degraded.unsqueeze(2))) if self.by_picture else None
        weight = self.strengths(torch.tensor(table.times[:-1]), z)  # one for all steps, or one a step
        plans = [study.restorer.bake(self.prompts(one), table) for one in weight]
        plan = plans[0] if len(plans) == 1 else replace(plans[0], tables=[EachItsOwn([one.tables[0] for one in plans])])
        return study.restorer.run(case.degraded, plan)

    def prompts(self, strengths: Tensor) -> list[tuple[Prompt, float]]:
        """Prompts with strengths [P, blocks], as the engine takes them."""
        t0 = self.study.learning.t0
        return [(Prompt(one, alpha, "mini", "adaptive", "mini", t0), 1.0) for one, alpha in zip(self.residual, strengths)]

    def save(self, path: Path) -> None:
        """Write all tensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).contiguous() for name in TENSORS}, path)

    def load(self, path: Path) -> None:
        """Take what `save` wrote."""
        for name, tensor in load_file(path).items():
            setattr(self, name, tensor)


TENSORS = ("residual", "alpha", "gain", "mean", "deviation")


@dataclass(frozen=True)
class EachItsOwn:
    """A run's tables of which each step takes its own: step i of the i-th."""

    tables: list[Any]

    @property
    def head(self) -> Tensor:
        return self.tables[0].head

    def __len__(self) -> int:
        return len(self.tables)

    def __getitem__(self, step: int) -> Any:
        return self.tables[step][step]


def sampled_velocity(mini: Mini, tables: Any, weight: Tensor, state: Tensor) -> Tensor:
    """The trunk's velocity where every sample has strengths of its own: `weight` [B, P, blocks].

    Prompts' branches are computed for all samples and weighted afterwards, as the operation's reference does with a number.
    """
    dtype = mini.trunk.patch_in.weight.dtype
    step = tables.to("cpu", dtype).batch()._replace(prompt_weight=weight.permute(2, 1, 0)[..., None, None, None])
    blocks = mini.trunk.blocks
    try:
        for block in blocks:
            block.cross = partial(own_strengths, block)
        return mini.trunk(state, step)
    finally:
        for block in blocks:
            del block.cross


def own_strengths(block: WanBlock, normed: Tensor, step: BlockStep) -> Tensor:
    """`WanBlock.cross` with strengths [P, B, 1, 1, 1]: the output's bias is each sample's own too."""
    mixed = prompt_attention_ref(block.cross_query(normed), *step[1:]).transpose(1, 2).flatten(2)
    total = 1 + step.prompt_weight.sum(0)[:, 0]  # [B, 1, 1]
    return F.linear(mixed, block.cross_out.weight) + (block.cross_out.bias.float() * total).to(mixed.dtype)


def task_of(task: str) -> Callable[[Tensor, torch.Generator, Tensor | None], Tensor]:
    """A task's degradation with a strength drawn for each sample, as learning has it."""
    return lambda clean, generator, depth: degrade(clean, task, generator, depth=depth)


def adaptive(study: Study, task: str, seed: int, prompts: int, adapts: str) -> Adaptive:
    """Adaptive prompts learned on a task; kept in `work`."""
    made = Adaptive(study, prompts, adapts, seed)
    chosen = {"prompts": prompts, "adapts": adapts, "task": task, "seed": seed, "model": fingerprint(study.model)}
    path = study.work / "prompts" / f"{key_of(asdict(study.learning) | chosen)}.safetensors"
    if path.exists():
        made.load(path)
    else:
        made.learn(task, seed)
        made.save(path)
    return made


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The one prompt, learned by the same loop as the others, and those that adapt."""
    kept: dict[tuple, Adaptive] = {}

    def adapting(prompts: int, adapts: str):
        def restored(case: Case, seed: int) -> Tensor:
            key = case.task, seed, prompts, adapts
            if key not in kept:
                kept[key] = adaptive(study, *key)
            return kept[key].restore(case)

        return restored

    return {
        "input": lambda case, seed: case.degraded,
        REFERENCE: adapting(1, ""),
        "by moment": adapting(1, "moment"),
        "by picture, strength": adapting(1, "picture"),
        "by picture, router": adapting(PROMPTS, "picture"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("h_adaptive", arguments(__doc__).parse_args(given), ("haze", "rain", "lowlight"))
    rows = study.measure(arms(study))
    question = "H. Prompts that adapt to the picture or to the moment"
    notes = ["features cost one evaluation more a picture"]
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
