"""The engine: a backbone, a plan and a machine become a run."""
