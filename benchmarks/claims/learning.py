"""Learning by variants of the engine's own learner: for objectives and parts that it has no setting for.

Everything but what a variant overrides is the engine's: batches, draws of times and noise, views, loss, optimizer, schedule.
Scenes are rendered once and kept beside the prompts, for all experiments.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.claims.common import Study, fingerprint, key_of
from ebr_engine.backbones.base import Backbone
from ebr_engine.prompts.catalogue import ASSETS
from ebr_engine.prompts.prompt import Prompt, load_prompt
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import Samples, SceneSamples
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner
from ebr_engine.training.loop import backbone_of
from ebr_engine.training.scenes import ScenePool

Start = Callable[[LearnConfig, Backbone], Learner]
Source = Callable[[LearnConfig, ScenePool], Samples]


@lru_cache(maxsize=1)
def kept_pool(capacity: int, folder: Path) -> ScenePool:
    """Scenes that are rendered once, for all commands."""
    folder.mkdir(parents=True, exist_ok=True)
    return ScenePool(capacity, keep=folder / f"scenes_{capacity}.safetensors")


@lru_cache(maxsize=1)
def frozen(model: Path, precision: str) -> Backbone:
    """The backbone to learn on, once a process."""
    return backbone_of(LearnConfig(task="haze", model=str(model), precision=precision), "cpu")


def bundled(task: str) -> Path:
    """A bundled prompt's file."""
    return ASSETS / "mini" / "prompts" / f"{task}.safetensors"


def config_of(study: Study, task: str, seed: int, **changes: Any) -> LearnConfig:
    """The engine's settings of a study's budget and these changes."""
    precision = "fp32" if study.quick else "auto"
    where = {"task": task, "seed": seed, "model": str(study.model), "precision": precision}
    return LearnConfig(**(asdict(study.learning) | where | changes))


def fitted(study: Study, config: LearnConfig, start: Start = Learner.start, source: Source = SceneSamples) -> Learner:
    """A learner after all of its iterations."""
    learner = start(config, frozen(study.model, config.precision))
    samples = source(config, kept_pool(config.scenes, study.work))
    with LatentSamples(config, samples, learner.backbone) as latents:
        while learner.iteration < config.iterations:
            learner.step(latents.batch)
    return learner


def path_of(study: Study, task: str, seed: int, changes: dict[str, Any]) -> Path:
    """Where a prompt of a study is kept; by what it is learned with, but not by where on this machine it begins."""
    begun = {"start": Path(changes["start"]).name} if "start" in changes else {}
    which = {"task": task, "seed": seed, "model": fingerprint(study.model)}
    folder = study.work / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{key_of(asdict(study.learning) | changes | begun | which)}.safetensors"


def variant(
    study: Study,
    task: str,
    seed: int,
    name: str,
    learner: Start = Learner.start,
    source: Source = SceneSamples,
    **changes: Any,
) -> Prompt:
    """A prompt learned by a variant, which `name` stands for; kept in `work`, so that it is learned once."""
    path = path_of(study, task, seed, {"variant": name} | changes)
    if not path.exists():
        started = time.process_time()
        learned = fitted(study, config_of(study, task, seed, **changes), learner, source)
        learned.prompt({"variant": name, "seconds": round(time.process_time() - started, 1)}).save(path)
    return load_prompt(path)
