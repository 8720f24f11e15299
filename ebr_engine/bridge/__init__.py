"""The diffusion bridge: states and targets, schedules, and the sampler; the mathematics and nothing else."""
