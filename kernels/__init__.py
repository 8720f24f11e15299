"""The engine's operations: one file an op, each with a plain-torch reference above its kernel.

Kernels are laid out for NVIDIA GPUs from compute capability 8.0 on; `backend.py` decides what serves a call.
"""
