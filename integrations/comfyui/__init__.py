"""Nodes of ebr-engine for ComfyUI: link this folder into `custom_nodes`; see README.md."""

from comfy_api.latest import ComfyExtension

from .nodes import NODES


class EbrExtension(ComfyExtension):
    async def get_node_list(self) -> list:
        return NODES


async def comfy_entrypoint() -> EbrExtension:
    """What ComfyUI calls for the nodes."""
    return EbrExtension()
