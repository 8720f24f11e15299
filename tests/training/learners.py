"""Learners on the tiny backbone, and the batches that they learn from."""

from dataclasses import replace

import torch

from ebr_engine.backbones.base import ModelSource
from ebr_engine.backbones.registry import load_backbone
from ebr_engine.training.config import LearnConfig
from ebr_engine.training.data import SceneSamples
from ebr_engine.training.latents import LatentSamples
from ebr_engine.training.learner import Learner

CPU = torch.device("cpu")
QUICK = LearnConfig("haze", tokens=4, iterations=6, batch=2, size=32, warmup=1, scenes=4, precision="fp32")


def start(weights, precision="fp32", world=None, **settings):
    config = replace(QUICK, precision=precision, **settings)
    return Learner.start(config, load_backbone("mini", ModelSource(weights), CPU, precision), world)


def batches(learner, pool):
    return LatentSamples(learner.config, SceneSamples(learner.config, pool), learner.backbone).batch
