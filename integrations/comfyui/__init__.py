"""OmniAvatar nodes for ComfyUI. ComfyUI calls `comfy_entrypoint`."""

from .omniavatar_nodes.nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
