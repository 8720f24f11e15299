"""A whole run: data in, a prompt out, and beside it a folder with its configuration, log, checkpoints, samples and report."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ebr_engine.backbones.base import Backbone, ModelSource
from ebr_engine.backbones.registry import load_backbone, medium_of
from ebr_engine.errors import EbrError
from ebr_engine.evaluation.run import means
from ebr_engine.media import PICTURES, SOUND
from ebr_engine.prompts.prompt import Prompt
from ebr_engine.training.config import LearnConfig, to_toml
from ebr_engine.training.data import PairSamples, Samples, SceneSamples, pair_samples
from ebr_engine.training.distributed import World, joined
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner
from ebr_engine.training.mixing import MixedSamples
from ebr_engine.training.report import facts_of, write_report
from ebr_engine.training.scenes import still_pool
from ebr_engine.training.sounds import SoundSamples, still_sounds
from ebr_engine.training.trackers import Trackers, check_installed
from ebr_engine.training.validation import SCORES, Validation

Callback = Callable[[int, int, float], None]
RECENT = 50  # iterations that the final loss is the mean of


def run_folder(out: Path) -> Path:
    """The folder beside a prompt with all that its run leaves."""
    return out.with_suffix(".run")


def check_request(config: LearnConfig, out: Path, overwrite: bool) -> None:
    """`EbrError` unless a prompt may be written to `out`, and what the configuration names is there."""
    if out.suffix != ".safetensors":
        raise EbrError(f"{out}: a prompt file's name ends in .safetensors")
    if out.exists() and not overwrite:
        raise EbrError(f"{out} exists; add --overwrite to replace it")
    for name in ("data", "photos", "validation", "context", "vae"):
        if (path := getattr(config, name)) and not Path(path).exists():
            raise EbrError(f"{name}: there is no {path}")
    check_installed(config)


def learn(
    config: LearnConfig,
    out: Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    callback: Callback | None = None,
    on_resume: Callable[[int, Path], None] | None = None,
) -> Prompt:
    """Learn a prompt and write it to `out`; in `NAME.run` beside it stay its configuration, log, samples, report and summary.

    `callback(iteration, iterations, loss)` after each iteration. A run that was interrupted (Ctrl-C too) goes on from its
    last checkpoint, to the bit on a CPU; `on_resume(iteration, checkpoint)` hears where. With `torchrun` several processes share
    each batch. Raises `EbrError`.
    """
    check_request(config, out, overwrite)
    with joined(config.device) as (world, device):
        backbone = backbone_of(config, device)
        learner = Learner.start(config, backbone, world)
        with samples_of(config) as samples, LatentSamples(config, samples, learner.backbone) as latents:
            files = RunFiles(run_folder(out), config, world)
            if resume and (state := files.last_checkpoint()):
                learner.load(state)
                if on_resume is not None:
                    on_resume(learner.iteration, files.checkpoints()[-1])
            validates = world.leads and (config.validation or not config.data) and medium_of(config.backbone) == PICTURES
            validation = Validation.of(config, learner.backbone, files.folder) if validates else None
            files.begin(learner.iteration)
            with Trackers(config, files.folder, world.leads) as trackers:
                seconds = _iterate(learner, latents, files, trackers, validation, callback)
            files.save(learner)  # what follows takes time too
            log = files.log()
            rows, sheets = validation.rows(learner) if validation else ([], {})
            scores = {name: found["mean"] for name, found in means(rows, SCORES).items()}
            prompt = learner.prompt(summary(log, seconds, samples) | scores)
            if world.leads:
                prompt.save(out)
                write_report(files.folder, config, log, prompt, rows, sheets, facts_of(config, out, device, samples, log))
                files.forget_checkpoints()
            world.wait()
    return prompt


def backbone_of(config: LearnConfig, device: str) -> Backbone:
    """The backbone that a configuration names."""
    from ebr_engine.engine.devices import choose_device

    paths = (Path(name) if name else None for name in (config.context, config.vae))
    source = ModelSource(config.model or None, config.revision or None, config.offline, *paths)
    return load_backbone(config.backbone, source, choose_device(device), config.precision)


@contextmanager
def samples_of(config: LearnConfig) -> Iterator[Samples]:
    """What a run learns from."""
    if config.data:
        yield pair_samples(config, config.data)
        return
    if medium_of(config.backbone) == SOUND:
        with still_sounds(config.scenes) as sounds:
            yield SoundSamples(config, sounds)
        return
    with still_pool(config.scenes) as pool:
        mixed = config.photos or config.intact or config.stored or config.heavy
        yield MixedSamples(config, pool) if mixed else SceneSamples(config, pool)


def _iterate(
    learner: Learner,
    latents: LatentSamples,
    files: "RunFiles",
    trackers: Trackers,
    validation: Validation | None,
    callback: Callback | None,
) -> float:
    """All iterations that are left; the seconds they took. Saves when it is interrupted."""
    config, started = learner.config, time.monotonic()
    try:
        while learner.iteration < config.iterations:
            begun = time.monotonic()
            progress = learner.step(latents.batch)
            if not math.isfinite(progress.loss):
                raise EbrError(
                    f"the loss is {progress.loss} at iteration {learner.iteration}; try a smaller learning rate, or --set clip=1"
                )
            row = {"iteration": learner.iteration, **asdict(progress), "seconds": time.monotonic() - begun}
            if validation and config.validate_every and learner.iteration % config.validate_every == 0:
                row |= validation.scores(learner)
            files.note(row)
            trackers.add(row, validation.sheets if validation else ())
            if callback is not None:
                callback(learner.iteration, config.iterations, progress.loss)
            if learner.iteration % config.save_every == 0:
                files.save(learner)
    except KeyboardInterrupt:
        files.save(learner)
        raise
    return time.monotonic() - started


def summary(log: list[dict[str, Any]], seconds: float, samples: Samples) -> dict[str, Any]:
    """What a prompt file tells of its run besides the configuration."""
    losses = [row["loss"] for row in log[-RECENT:]]
    facts: dict[str, Any] = {"seconds": round(seconds, 1), "final_loss": sum(losses) / len(losses) if losses else None}
    if isinstance(samples, PairSamples):
        facts |= {"pairs": len(samples), "skipped": len(samples.bad)}
    return facts


class RunFiles:
    """The folder of a run; only the leading process writes."""

    def __init__(self, folder: Path, config: LearnConfig, world: World):
        self.folder, self.config, self.world = folder, config, world
        self._rows: list[dict[str, Any]] = []
        self._log = folder / "log.jsonl"

    def begin(self, iteration: int) -> None:
        """Write the configuration, and the log as far as the checkpoint knows it."""
        if not self.world.leads:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(to_toml(self.config), encoding="utf-8")
        kept = self._log.read_text().splitlines() if iteration and self._log.exists() else []
        self._rows = [row for row in map(json.loads, kept) if row["iteration"] <= iteration]
        self._log.write_text("".join(json.dumps(row) + "\n" for row in self._rows))

    def note(self, row: dict[str, Any]) -> None:
        """Add a row to the log."""
        if self.world.leads:
            self._rows.append(row)
            with self._log.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def log(self) -> list[dict[str, Any]]:
        """All rows so far."""
        return self._rows

    def checkpoints(self) -> list[Path]:
        """The checkpoints that are there, the oldest first."""
        return sorted(self.folder.glob("*.ckpt"))

    def save(self, learner: Learner) -> None:
        """Write the run's state, atomically, and remove what is more than `save_last_n`."""
        if not self.world.leads:
            return
        path = self.folder / f"{learner.iteration:08d}.ckpt"
        partial = path.with_name(path.name + ".partial")
        torch.save(learner.state(), partial)
        partial.replace(path)
        for old in self.checkpoints()[: -self.config.save_last_n]:
            old.unlink()

    def last_checkpoint(self) -> dict[str, Any] | None:
        """The newest state; None if there is none. `EbrError` when its file is damaged."""
        if not (paths := self.checkpoints()):
            return None
        try:
            return torch.load(paths[-1], map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle raises almost anything
            raise EbrError(f"{paths[-1]} is not a checkpoint of a run; use --no-resume to start anew") from error

    def forget_checkpoints(self) -> None:
        """The run is complete."""
        for path in self.checkpoints():
            path.unlink()
