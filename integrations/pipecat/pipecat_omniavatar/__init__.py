"""An avatar for Pipecat pipelines, made by omniavatar on this machine."""

from pipecat_omniavatar.processor import OmniAvatarProcessor

__all__ = ["OmniAvatarProcessor"]
__version__ = "0.1.0"
