"""An avatar for LiveKit Agents, made by omniavatar on this machine."""

from livekit.plugins.omniavatar.generator import OmniAvatarGenerator

__all__ = ["OmniAvatarGenerator"]
__version__ = "0.1.0"
