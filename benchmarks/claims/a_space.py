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

from benchmarks.claims.common import Study, arguments, fingerprint, key_of, study_of
from benchmarks.claims.fitting import T_MIN, fit, pairs
from benchmarks.claims.reporting import command_of, finish
from ebr_engine.backbones.mini.model import CONTEXT_TOKENS, Mini, MiniTextEncoder
from ebr_engine.backbones.wan.model import WanStep
from ebr_engine.bridge.process import training_state
from ebr_engine.bridge.sampler import draw_noise, sample
from ebr_engine.evaluation.photos import Case
from ebr_engine.media.degradations import STRENGTH_WORDS, degrade
from ebr_engine.tensor_files import write_tensors
from ebr_engine.training.pretrain import CLEAN_WORD
from ebr_engine.training.scenes import ScenePool, still_pool

REFERENCE = "prompt branch (the method)"
SEED = 42


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


def velocity_of(mini: Mini, context: Callable[[], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """The frozen transformer with a context in the place of the empty text; differentiable in it, no row merged."""

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        conditioner = mini.conditioner
        modulation, head = conditioner.modulations(t * 1000)
        dtype = mini.trunk.patch_in.weight.dtype
        key, value = (x.to(dtype) for x in conditioner.keys_values(conditioner.encode_text(context()[None])))
        none = key.new_zeros(key.shape[0], 0, key.shape[2], 1, key.shape[4])
        counts, weight = modulation.new_zeros(key.shape[3]), modulation.new_zeros(key.shape[0], 0)
        return mini.trunk(state, WanStep(modulation, head, key, value, counts, none, none, weight))

    return velocity


def candidates(encoder: MiniTextEncoder, task: str) -> list[tuple[str, ...]]:
    """Captions that might make the transformer restore, as far as the vocabulary goes."""
    found = [(), (CLEAN_WORD,), (task,), *product(STRENGTH_WORDS, (task,)), (CLEAN_WORD, task)]
    return [words for words in found if all(word in encoder.index for word in words)]


@torch.no_grad()
def best_words(study: Study, mini: Mini, task: str, seed: int, pool: ScenePool) -> Tensor:
    """The context of the caption with the least error of the clean estimate on training scenes."""
    how, generator = degrading(task), torch.Generator().manual_seed(seed)
    clean, degraded = (mini.codec.encode(x.unsqueeze(2)) for x in pairs(pool, study.learning, how, generator))
    t = T_MIN + (study.learning.t0 - T_MIN) * torch.rand(len(clean), generator=generator)
    state, target = training_state(clean, degraded, torch.randn(clean.shape, generator=generator), t, study.learning.t0)
    errors = []
    for words in candidates(mini.text_encoder, task):
        context = mini.text_encoder(mini.text_encoder.tokenize([words]))[0]
        error = (velocity_of(mini, lambda c=context: c)(state, t) - target) * t.view(-1, 1, 1, 1, 1)
        errors.append((float(error.square().mean()), context))
    return min(errors, key=lambda pair: pair[0])[1]


def degrading(task: str):
    """Learning's degradation of a task, at strengths drawn for each sample."""
    return lambda clean, generator, depth: degrade(clean, task, generator, depth=depth)


def context_for(study: Study, mini: Mini, form: str, task: str, seed: int) -> Tensor:
    """The learned or chosen context [16, text_dim] of a form; kept in `work`."""
    known = asdict(study.learning) | {"form": form, "task": task, "seed": seed, "model": fingerprint(study.model)}
    path: Path = study.work / "contexts" / f"{key_of(known)}.safetensors"
    if not path.exists():
        with still_pool(study.learning.scenes) as pool:
            context = learned_context(study, mini, form, task, seed, pool)
        write_tensors(path, {"context": context}, {"form": form, "task": task})
    return load_file(path)["context"]


def learned_context(study: Study, mini: Mini, form: str, task: str, seed: int, pool: ScenePool) -> Tensor:
    """See `context_for`."""
    if form == "words":
        return best_words(study, mini, task, seed, pool)
    encoder = mini.text_encoder
    empty = encoder.tokenize([()])
    small = torch.randn(CONTEXT_TOKENS, mini.context.shape[1], generator=torch.Generator().manual_seed(seed)) * 0.02
    begun = encoder.embedding(empty)[0] if form == "embeddings" else mini.context
    rows = (begun.detach() + small).requires_grad_()

    def context() -> Tensor:
        return encoded(encoder, rows) if form == "embeddings" else rows

    fit([rows], velocity_of(mini, context), mini.codec, pool, degrading(task), study.learning, seed)
    return context().detach()


def arms(study: Study) -> dict[str, Callable[[Case, int], Tensor]]:
    """Every form of a prompt."""
    mini = study.mini
    table = study.ebr_table(study.learning.t0)

    def spoken(form: str):
        def restored(case: Case, seed: int) -> Tensor:
            context = context_for(study, mini, form, case.task, seed)
            with torch.no_grad():
                degraded = mini.codec.encode(case.degraded.unsqueeze(2))
                times = [torch.tensor([t]) for t in table.times[:-1]]
                noise = draw_noise(degraded.shape, SEED)
                latent = sample(velocity_of(mini, lambda: context), times, degraded, noise, table)
                return mini.codec.decode(latent).squeeze(2).clamp(0, 1)

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
    study = study_of("a_space", arguments(__doc__).parse_args(given), ("haze", "rain", "lowlight"))
    rows = study.measure(arms(study))
    notes = [
        "words: the caption with the least error on training scenes, of the task's name, its strengths, 'clean' and nothing",
        "token embeddings pass through the frozen text encoder; its output is learned in its place, or as the method's branch",
    ]
    question = "A. Words, token embeddings, or the text encoder's output space"
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
