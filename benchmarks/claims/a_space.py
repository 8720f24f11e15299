"""A. Where a prompt is best learned: as words, as token embeddings before the text encoder, or in its output space.

The method's paper says: prompts of pixels' tasks lie outside of what the text encoder can say. Every learned form has 16 rows and
the same budget; words are chosen by their loss on training scenes.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.claims.common import Study, broad_arguments, fingerprint, key_of, study_of
from benchmarks.claims.learning import config_of, fitted, frozen, kept_pool
from benchmarks.claims.reporting import command_of, finish
from benchmarks.claims.walking import along, restored_by
from ebr_engine.backbones.base import Backbone
from ebr_engine.backbones.mini.model import CONTEXT_TOKENS, Mini, MiniTextEncoder
from ebr_engine.backbones.wan.model import WanStep
from ebr_engine.evaluation.photos import Case
from ebr_engine.media.degradations import STRENGTH_WORDS
from ebr_engine.prompts.catalogue import TASKS
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner, make_optimizer
from ebr_engine.training.supply import CLEAN_WORD

REFERENCE = "prompt branch (the method)"
CROPS = 64  # that words are chosen on


class Given(nn.Module):
    """In the place of a table of embeddings: the same rows whatever the words are."""

    def __init__(self, rows: Tensor):
        super().__init__()
        self.rows = rows

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows.expand(*ids.shape, -1)


def encoded(encoder: MiniTextEncoder, embeddings: Tensor) -> Tensor:
    """The frozen text encoder's output [16, text_dim] for token embeddings [16, text_dim]; differentiable in them."""
    open_ended = copy.copy(encoder)
    open_ended._modules = encoder._modules | {"embedding": Given(embeddings)}
    ids = torch.ones(1, CONTEXT_TOKENS, dtype=torch.int64, device=embeddings.device)
    return open_ended(ids)[0]


def step_for(backbone: Backbone, timestep: Tensor, context: Tensor) -> WanStep:
    """What the transformer takes with a context [16, text_dim] in the place of the empty text; differentiable in it."""
    conditioner, dtype = backbone.conditioner, backbone.dtype
    with torch.no_grad():
        modulation, head = conditioner.modulations(timestep)
    key, value = (x.to(dtype) for x in conditioner.keys_values(conditioner.encode_text(context[None])))
    none = key.new_zeros(key.shape[0], 0, key.shape[2], 1, key.shape[4])
    counts, weight = modulation.new_zeros(key.shape[3]), modulation.new_zeros(key.shape[0], 0)
    return WanStep(modulation, head, key, value, counts, none, none, weight)


def speaking(begun: Tensor, context_of: Callable[[Tensor], Tensor]) -> Callable[[LearnConfig, Backbone], Learner]:
    """What starts the engine's learner on rows [16, text_dim] whose context takes the prompt's place; nothing else is learned."""

    def start(config: LearnConfig, backbone: Backbone) -> Learner:
        learner = Learner.start(config, backbone)
        learner.residual, learner.alpha = begun.clone().requires_grad_(), torch.zeros(0, requires_grad=True)
        learner.live = lambda timestep, rows, _: step_for(backbone, timestep, context_of(rows))
        learner.optimizer = make_optimizer(config, [learner.residual])
        return learner

    return start


def candidates(encoder: MiniTextEncoder, task: str) -> list[tuple[str, ...]]:
    """Captions that might make the transformer restore, as far as the vocabulary goes."""
    found = [(), (CLEAN_WORD,), (task,), *product(STRENGTH_WORDS, (task,)), (CLEAN_WORD, task)]
    return [words for words in found if all(word in encoder.index for word in words)]


@torch.no_grad()
def best_words(study: Study, mini: Mini, task: str, seed: int) -> Tensor:
    """The context of the caption with the least error of the clean estimate on training scenes."""
    config = config_of(study, task, seed)
    learner = speaking(mini.context, lambda rows: rows)(config, frozen(study.model, config.precision))
    samples, errors = SceneSamples(config, kept_pool(config.scenes, study.work)), []
    with LatentSamples(config, samples, learner.backbone) as latents:
        degraded, clean = latents.batch(range(CROPS))
    for words in candidates(mini.text_encoder, task):
        learner.residual = mini.text_encoder(mini.text_encoder.tokenize([words]))[0]
        errors.append((float(learner.state_loss(range(CROPS), degraded, clean)), learner.residual))
    return min(errors, key=lambda pair: pair[0])[1]


def context_for(study: Study, mini: Mini, form: str, task: str, seed: int) -> Tensor:
    """The learned or chosen context [16, text_dim] of a form; kept in `work`."""
    known = asdict(study.learning) | {"form": form, "task": task, "seed": seed, "model": fingerprint(study.model)}
    path: Path = study.work / "contexts" / f"{key_of(known)}.safetensors"
    if not path.exists():
        write_tensors(path, {"context": learned_context(study, mini, form, task, seed)}, {"form": form, "task": task})
    return load_file(path)["context"]


@torch.no_grad()
def learned_context(study: Study, mini: Mini, form: str, task: str, seed: int) -> Tensor:
    """See `context_for`."""
    if form == "words":
        return best_words(study, mini, task, seed)
    encoder = mini.text_encoder
    small = torch.randn(CONTEXT_TOKENS, mini.context.shape[1], generator=torch.Generator().manual_seed(seed)) * 0.02
    through = form == "embeddings"
    begun = encoder.embedding(encoder.tokenize([()]))[0] if through else mini.context

    def context(rows: Tensor) -> Tensor:
        return encoded(encoder, rows) if through else rows

    with torch.enable_grad():
        learner = fitted(study, config_of(study, task, seed), speaking(begun + small, context))
    return context(learner.residual)


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every form of a prompt."""
    mini = study.mini
    table = study.ebr_table(study.learning.t0)

    def spoken(form: str):
        def restored(case: Case, seed: int) -> Tensor:
            context, backbone = context_for(study, mini, form, case.task, seed), study.restorer.backbone
            steps = [step_for(backbone, torch.tensor([t * 1000]), context) for t in table.times[:-1]]
            return restored_by(study, case.degraded, steps, table.times[:-1], along(table, backbone.noise))

        return restored

    return {
        "input": lambda case, seed: case.degraded,
        "empty text": lambda case, seed: study.restore(case, None, table),
        "best words": spoken("words"),
        "token embeddings": spoken("embeddings"),
        "encoder's output, replaced": spoken("output"),
        REFERENCE: lambda case, seed: study.restore(case, study.prompt(case.task, seed), table),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("a_space", broad_arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    notes = [
        "words: the caption with the least error on training scenes, of the task's name, its strengths, 'clean' and nothing",
        "token embeddings pass through the frozen text encoder; its output is learned in its place, or as the method's branch",
        "embeddings and output are 1024 learned numbers, the branch 4102, for its rows are four times as wide",
    ]
    question = "A. Words, token embeddings, or the text encoder's output space"
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
