"""K. Past the paper: prompts that see where. A residual of low rank for each token, from the frozen trunk's features.

    z_n = V·LN(f_n),   f_n: token n after the first block, V: 4 × 256
    block b > 0 adds U_b·z_n to what its cross-attention gives token n, U_b: 256 × 4, beginning at 0

6144 numbers beside a prompt of 16 tokens, learned together with it; no evaluation more, for the features are the run's own. Three
arms say what a gain would come from: a prompt of as many numbers more (40 tokens), the same map from the mean of all tokens, and
from each token's difference to that mean.
Haze is densest at the top, rain shows before dark ground: damage that varies over the picture.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.claims.common import Study, arguments, fingerprint, key_of, study_of
from benchmarks.claims.learning import config_of, fitted, variant
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.wan.model import BlockStep, WanTrunk
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.learner import Learner, Progress, make_optimizer

RANK = 4
SCALE = 0.1  # of U: Adam moves its numbers as far as a prompt's
REFERENCE = "one prompt"


@dataclass
class Map:
    """From a token's features to its residual in every block but the first."""

    down: Tensor  # [D, R]
    up: Tensor  # [blocks - 1, R, D]
    sees: str = "token"  # each token its own features, their "mean" over all, or its own "difference" to that

    @classmethod
    def start(cls, width: int, blocks: int, sees: str, seed: int) -> "Map":
        """One that adds nothing yet."""
        down = torch.randn(width, RANK, generator=torch.Generator().manual_seed(seed)) / width**0.5
        return cls(down, torch.zeros(blocks - 1, RANK, width), sees)

    def codes(self, features: Tensor) -> Tensor:
        """z [B, N or 1, R] of a stream [B, N, D]."""
        z = F.layer_norm(features.float(), features.shape[-1:]) @ self.down
        mean = z.mean(1, keepdim=True)
        return {"token": z, "mean": mean, "difference": z - mean}[self.sees]


@contextmanager
def seeing(trunk: WanTrunk, map: Map) -> Iterator[None]:
    """While it lasts, the trunk's blocks add the map's residuals."""
    codes: list[Tensor] = []

    def look(_, given: tuple, result: tuple[Tensor, Tensor, Tensor]) -> None:
        x, branch, gate = result
        codes[:] = [map.codes(x.float() + branch.float() * gate.unsqueeze(1))]

    def added(cross: Callable, up: Tensor) -> Callable[[Tensor, BlockStep], Tensor]:
        def with_residuals(normed: Tensor, step: BlockStep) -> Tensor:
            mixed = cross(normed, step)
            return mixed + (codes[0] @ (SCALE * up)).to(mixed.dtype)

        return with_residuals

    first, *others = trunk.blocks
    hook = first.register_forward_hook(look)
    try:
        for block, up in zip(others, map.up):
            block.cross = added(block.cross, up)
        yield
    finally:
        hook.remove()
        for block in others:
            block.__dict__.pop("cross", None)


@dataclass
class WhereLearner(Learner):
    """The engine's learner of a prompt and a map."""

    map: Map | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The prompt, its strengths and the map."""
        return [self.residual, self.alpha] + ([self.map.down, self.map.up] if self.map else [])

    def step(self, batch) -> Progress:
        """See `Learner.step`."""
        with seeing(self.backbone.trunk, self.map):
            return super().step(batch)

    def prompt(self, training: dict | None = None) -> Prompt:
        """The prompt without its map."""
        self.average = [self.residual, self.alpha]
        return super().prompt(training)


def started(config: LearnConfig, backbone: Backbone, sees: str) -> WhereLearner:
    """A learner whose map adds nothing yet."""
    learner = WhereLearner.start(config, backbone)
    learner.map = Map.start(backbone.width, backbone.blocks, sees, config.seed)
    for part in (learner.map.down, learner.map.up):
        part.requires_grad_()
    learner.optimizer = make_optimizer(config, learner.parameters)
    return learner


def learned(study: Study, task: str, seed: int, sees: str) -> tuple[Prompt, Map]:
    """A prompt with its map; kept in `work`."""
    chosen = asdict(study.learning) | {
        "task": task,
        "seed": seed,
        "map": RANK,
        "scale": SCALE,
        "local": {"token": True, "mean": False}.get(sees, sees),
    }
    key = key_of(chosen | {"model": fingerprint(study.model)})
    folder = study.work / "prompts"
    prompt, path = folder / f"{key}.safetensors", folder / f"{key}.map.safetensors"

    def start(config: LearnConfig, backbone: Backbone) -> WhereLearner:
        return started(config, backbone, sees)

    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        learner = fitted(study, config_of(study, task, seed), start)
        learner.prompt().save(prompt)
        save_file({"down": learner.map.down.detach().contiguous(), "up": learner.map.up.detach().contiguous()}, path)
    return load_prompt(prompt), Map(**load_file(path), sees=sees)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """The one prompt, one of as many numbers as the map has more, the map, and the map of the mean."""
    table = study.ebr_table(study.learning.t0)
    config = study.restorer.backbone.trunk.config
    more = -(-(config.width * RANK * config.num_layers) // config.width)
    tokens = study.learning.tokens + more

    def plain(**changes):
        def run(case: Case, seed: int) -> Tensor:
            return study.restore(case, variant(study, case.task, seed, "states", Learner.start, **changes), table)

        return run

    def mapped(sees: str):
        def run(case: Case, seed: int) -> Tensor:
            prompt, map = learned(study, case.task, seed, sees)
            with seeing(study.restorer.backbone.trunk, map):
                return study.restore(case, prompt, table)

        return run

    return {
        "input": lambda case, seed: case.degraded,
        REFERENCE: plain(),
        f"{tokens} tokens": plain(tokens=tokens),
        "sees where": mapped("token"),
        "sees the mean": mapped("mean"),
        "sees where, less the mean": mapped("difference"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("k_where", arguments(__doc__).parse_args(given), ("haze", "rain"))
    rows = study.measure(arms(study))
    notes = [f"a map of rank {RANK}; its residuals begin at 0 and are learned with the prompt, at the same learning rate"]
    finish(study, "K. Prompts that see where", rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
