"""Frozen backbones: a conditioner and a trunk each."""
