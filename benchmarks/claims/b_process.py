"""B. Does a prompt learned on the bridge (EBR) beat one learned by the naive process, or by DDBM's bridge, at the same budget?

Every prompt also runs through another process's sampler: what matters, the states that it learned on, or the sampler?
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.claims.common import Study, broad_arguments, study_of
from benchmarks.claims.reporting import command_of, finish
from benchmarks.claims.walking import Sampler, along, restored_by
from ebr_engine.bridge.sampler import flow_table
from ebr_engine.bridge.schedules import FAST_POWER, power_times
from ebr_engine.evaluation.photos import Case
from ebr_engine.prompts.catalogue import TASKS

REFERENCE = "EBR prompt, EBR sampler"


def ddbm_weights(t: float, t0: float) -> tuple[float, float, float]:
    """Weights of the clean latent, the degraded one and the noise in DDBM's state at t; see `bridge.ddbm_state`."""
    ratio = ((1 - t0) / t0) ** 2 * (t / (1 - t)) ** 2
    return (1 - t) * (1 - ratio), ratio * (1 - t), t * max(1 - ratio, 0.0) ** 0.5


def ddbm_sample(velocity, conditioning: Sequence, degraded: Tensor, noise: Tensor, times: Sequence[float], t0: float) -> Tensor:
    """The restored latent by DDBM's bridge, deterministic after its first step (DBIM, Zheng et al., arXiv 2405.15885).

    It starts at the scaled degraded latent, without noise: the first step, which knows none, draws it; later ones keep that
    of the state. `times` decrease from T0 to 0; `conditioning` has an entry for each but the last.
    """
    state = (1 - t0) * degraded
    for i, (t, s) in enumerate(zip(times, times[1:])):
        clean = state - t * velocity(state, conditioning[i])
        a, b, c = ddbm_weights(t, t0)
        drawn = noise if i == 0 else (state - a * clean - b * degraded) / c
        a, b, c = ddbm_weights(s, t0)
        state = a * clean + b * degraded + c * drawn
    return state


def arms(study: Study) -> dict:
    """Prompt and sampler of every arm; each sampler starts with the noise of its process."""
    t0, backbone = study.learning.t0, study.restorer.backbone
    times = power_times(study.steps, t0, FAST_POWER)
    samplers: dict[str, Sampler] = {
        "EBR": along(study.ebr_table(t0), backbone.noise),
        "naive": along(flow_table(times, t0), 1.0),
        "DDBM": lambda velocity, steps, degraded, noise: ddbm_sample(velocity, steps, degraded, noise, times, t0),
    }

    def prompted(bridge: str | None, sampler: str):
        def restored(case: Case, seed: int) -> Tensor:
            prompt = study.prompt(case.task, seed, bridge=bridge) if bridge else None
            steps = backbone.bake(torch.tensor(times[:-1]) * 1000, [(prompt.residual, prompt.alpha)] if prompt else [])
            return restored_by(study, case.degraded, steps, times[:-1], samplers[sampler])

        return restored

    return {
        "input": lambda case, seed: case.degraded,
        "empty prompt, EBR sampler": prompted(None, "EBR"),
        "naive prompt, naive sampler": prompted("naive", "naive"),
        "naive prompt, EBR sampler": prompted("naive", "EBR"),
        "EBR prompt, naive sampler": prompted("ebr", "naive"),
        "DDBM prompt, DDBM sampler": prompted("ddbm", "DDBM"),
        "DDBM prompt, EBR sampler": prompted("ddbm", "EBR"),
        "EBR prompt, DDBM sampler": prompted("ebr", "DDBM"),
        REFERENCE: prompted("ebr", "EBR"),
    }


def main(given: Sequence[str] | None = None) -> None:
    """Measure what the store lacks, write the table and the plot."""
    study = study_of("b_process", broad_arguments(__doc__).parse_args(given), TASKS)
    rows = study.measure(arms(study))
    question = "B. The process: EBR, naive, DDBM"
    notes = [
        "the naive sampler takes Euler steps; DDBM's draws its noise in the first step and is deterministic after it",
        "naive and DDBM learn and run with their full noise, EBR with a fifth of it, as `mini` does",
    ]
    finish(study, question, rows, REFERENCE, command_of(__file__, given, sys.argv[1:]), notes)


if __name__ == "__main__":
    main()
