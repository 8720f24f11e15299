"""H. Past the paper: prompts that adapt to the picture, or to the moment, beside one prompt for everything.

* by moment: a block's strength is α + β·(2t/T0 − 1), so that it can be another at the first step than at the last
* by picture, a router: four prompts of a quarter of the tokens each, their strengths α_k + A_k·z(x), where z(x) is what the
  frozen transformer makes of the degraded picture with the empty prompt

z(x): the last layer's input at the first step, its mean over all tokens, brought to mean 0 and deviation 1 over degraded scenes.
It costs one evaluation more a picture. β and A begin at 0; everything is learned together by the engine's learner, from the same
crops, in as many iterations as the one prompt. `--tasks` and the other options as for all experiments.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.claims.common import Study, broad_arguments, fingerprint, key_of, study_of
from benchmarks.claims.learning import config_of, fitted, frozen, kept_pool
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.layers import linear_with
from ebr_engine.backbones.wan.model import BlockStep, WanBlock
from ebr_engine.evaluation.photos import Case
from ebr_engine.kernels.prompt_attention import prompt_attention_ref
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner, Progress, make_optimizer

PROMPTS = 4  # of the router
SCENES = 64  # degraded crops that features are standardised over
REFERENCE = "one prompt"
TENSORS = ("residual", "alpha", "gain", "mean", "deviation")


@dataclass(frozen=True)
class Features:
    """z(x) of latents, as the empty prompt sees them."""

    backbone: Backbone
    t0: float

    @torch.no_grad()
    def raw(self, degraded: Tensor) -> Tensor:
        """[B, D]: the last layer's input, its mean over the tokens; of noiseless latents [B, C, 1, h, w]."""
        seen: list[Tensor] = []
        hook = self.backbone.trunk.patch_out.register_forward_pre_hook(lambda _, given: seen.append(given[0].float().mean(1)))
        try:
            self.backbone.velocity(degraded * (1 - self.t0), self.step)
        finally:
            hook.remove()
        return seen[0]

    @cached_property
    def step(self) -> Any:
        """The tables of the first step with the empty prompt."""
        return self.backbone.bake(torch.tensor([self.t0 * 1000]), [])[0]


class Adaptive:
    """Prompts whose strengths are functions of the moment or of features.

    `residual` [P, L, D]; `alpha` [P, blocks]; `gain`: [P, blocks] of the moment, or [P, blocks, D] of the features. `adapts`:
    to the "moment" or to the "picture".
    """

    def __init__(self, study: Study, prompts: int, adapts: str, seed: int):
        learning, backbone = study.learning, frozen(study.model, config_of(study, "haze", seed).precision)
        tokens = max(1, learning.tokens // prompts)
        generator = torch.Generator().manual_seed(seed)
        blocks, width = backbone.blocks, backbone.width
        self.t0, self.adapts, self.by_picture = learning.t0, adapts, adapts == "picture"
        self.residual = torch.randn(prompts, tokens, width, generator=generator) * 0.02
        self.alpha = torch.full((prompts, blocks), learning.alpha)
        self.gain = torch.zeros(prompts, blocks, *([width] if self.by_picture else []))
        self.mean, self.deviation = torch.zeros(width), torch.ones(width)

    @property
    def parameters(self) -> list[Tensor]:
        """All that is learned."""
        return [self.residual, self.alpha, self.gain]

    def standardise(self, raw: Tensor) -> None:
        """Take mean and deviation from features [N, D]."""
        self.mean, self.deviation = raw.mean(0), raw.std(0).clamp(min=1e-6)

    def z(self, raw: Tensor) -> Tensor:
        """Standardised features [B, D], so scaled that their products with `gain` are of the size of its entries."""
        return (raw - self.mean) / self.deviation / len(self.mean) ** 0.5

    def strengths(self, moment: Tensor, z: Tensor | None) -> Tensor:
        """[B, P, blocks] at times `moment` [B] in 0..T0, for features [B, D]."""
        if z is not None:
            return self.alpha + torch.einsum("bd,pkd->bpk", z, self.gain)
        return self.alpha + self.gain * (2 * moment / self.t0 - 1).view(-1, 1, 1)

    def restore(self, study: Study, case: Case) -> Tensor:
        """A case's photo restored along the fast schedule."""
        table, backbone = study.ebr_table(self.t0), study.restorer.backbone
        z = None
        if self.by_picture:
            z = self.z(Features(backbone, self.t0).raw(backbone.codec.encode(case.degraded.unsqueeze(2))))
        weight = self.strengths(torch.tensor(table.times[:-1]), z)  # one for all steps, or one a step
        plans = [study.restorer.bake(self.prompts(one), table) for one in weight]
        plan = plans[0] if len(plans) == 1 else replace(plans[0], tables=[EachItsOwn([one.tables[0] for one in plans])])
        return study.restorer.run(case.degraded, plan)

    def prompts(self, strengths: Tensor) -> list[tuple[Prompt, float]]:
        """Prompts with strengths [P, blocks], as the engine takes them."""
        return [(Prompt(one, alpha, "mini", "adaptive", "mini", self.t0), 1.0) for one, alpha in zip(self.residual, strengths)]

    def save(self, path: Path) -> None:
        """Write all tensors."""
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(self, name).detach().contiguous() for name in TENSORS}, path)

    def load(self, path: Path) -> None:
        """Take what `save` wrote."""
        for name, tensor in load_file(path).items():
            setattr(self, name, tensor)


@dataclass
class AdaptiveLearner(Learner):
    """The engine's learner of prompts whose strengths adapt."""

    made: Adaptive | None = None

    @classmethod
    def on(cls, made: Adaptive) -> Callable[[LearnConfig, Backbone], Learner]:
        """What starts a learner of these prompts."""

        def start(config: LearnConfig, backbone: Backbone) -> AdaptiveLearner:
            learner = cls.start(config, backbone)
            for parameter in made.parameters:
                parameter.requires_grad_()
            learner.made, learner.live = made, learner.adapted
            learner.optimizer = make_optimizer(config, made.parameters)
            return learner

        return start

    @property
    def parameters(self) -> list[Tensor]:
        """The prompts, their strengths, and how these adapt."""
        return self.made.parameters if self.made else [self.residual, self.alpha]

    def step(self, batch: Callable[..., tuple[Tensor, Tensor]]) -> Progress:
        """See `Learner.step`."""
        with own_strengths_in(self.backbone.trunk):
            return super().step(batch)

    def state_loss(self, numbers: Sequence[int], degraded: Tensor, clean: Tensor) -> Tensor:
        """See `Learner.state_loss`."""
        self.features = None
        if self.made.by_picture:
            with own_strengths_in(self.backbone.trunk, False):
                self.features = self.made.z(Features(self.backbone, self.config.t0).raw(degraded))
        return super().state_loss(numbers, degraded, clean)

    def adapted(self, timestep: Tensor, *_: Tensor) -> Any:
        """What the transformer takes at timesteps [B] for the batch's own features."""
        weight = self.made.strengths(timestep / 1000, self.features)
        none, backbone = torch.zeros(weight.shape[2]), self.backbone
        tables = backbone.conditioner(timestep, backbone.text["context"], [(one, none) for one in self.made.residual])
        return strengthened(tables.to("cpu", backbone.dtype).batch(), weight)


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


def strengthened(step: Any, weight: Tensor) -> Any:
    """A step in which every sample has strengths of its own, [B, P, blocks]."""
    return step._replace(prompt_weight=weight.permute(2, 1, 0)[..., None, None, None])


@contextmanager
def own_strengths_in(trunk: nn.Module, wanted: bool = True) -> Iterator[None]:
    """While it lasts, the blocks take strengths of each sample's own, or no longer do.

    Prompts' branches are computed for all samples and weighted afterwards, as the operation's reference does with a number.
    """
    before = ["cross" in block.__dict__ for block in trunk.blocks]
    try:
        _place(trunk, [wanted] * len(before))
        yield
    finally:
        _place(trunk, before)


def _place(trunk: nn.Module, own: Sequence[bool]) -> None:
    for block, wanted in zip(trunk.blocks, own):
        if wanted:
            block.cross = partial(own_strengths, block)
        else:
            block.__dict__.pop("cross", None)


def own_strengths(block: WanBlock, normed: Tensor, step: BlockStep) -> Tensor:
    """`WanBlock.cross` with strengths [P, B, 1, 1, 1]: the output's bias is each sample's own too."""
    mixed = prompt_attention_ref(block.cross_query(normed), *step[1:]).transpose(1, 2).flatten(2)
    total = 1 + step.prompt_weight.sum(0)[:, 0]  # [B, 1, 1]
    bias = block.cross_out.bias
    return linear_with(block.cross_out, mixed, torch.zeros_like(bias)) + (bias.float() * total).to(mixed.dtype)


def adaptive(study: Study, task: str, seed: int, prompts: int, adapts: str) -> Adaptive:
    """Adaptive prompts learned on a task; kept in `work`."""
    made = Adaptive(study, prompts, adapts, seed)
    chosen = {"prompts": prompts, "adapts": adapts, "task": task, "seed": seed, "model": fingerprint(study.model)}
    path = study.work / "prompts" / f"{key_of(asdict(study.learning) | chosen)}.safetensors"
    if not path.exists():
        config = config_of(study, task, seed)
        if made.by_picture:
            made.standardise(features_of_scenes(study, config))
        fitted(study, config, AdaptiveLearner.on(made))
        made.save(path)
    made.load(path)
    return made


def features_of_scenes(study: Study, config: LearnConfig) -> Tensor:
    """Features [N, D] of crops that are learned from."""
    backbone = frozen(study.model, config.precision)
    with LatentSamples(config, SceneSamples(config, kept_pool(config.scenes, study.work)), backbone) as latents:
        return Features(backbone, config.t0).raw(latents.batch(range(SCENES))[0])


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The one prompt, and those that adapt."""
    table = study.ebr_table(study.learning.t0)
    kept: dict[tuple, Adaptive] = {}

    def adapting(prompts: int, adapts: str):
        def restored(case: Case, seed: int) -> Tensor:
            key = case.task, seed, prompts, adapts
            if key not in kept:
                kept[key] = adaptive(study, *key)
            return kept[key].restore(study, case)

        return restored

    return {
        "input": lambda case, seed: case.degraded,
        REFERENCE: lambda case, seed: study.restore(case, study.prompt(case.task, seed), table),
        "by moment": adapting(1, "moment"),
        "by picture": adapting(PROMPTS, "picture"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("h_adaptive", broad_arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    question = "H. Prompts that adapt to the picture or to the moment"
    notes = ["features cost one evaluation more a picture"]
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
