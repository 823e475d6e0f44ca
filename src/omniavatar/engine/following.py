"""What every process but the first does when several make one video: wait, load the models, go along.

It denoises, and decodes and encodes where the VAE is shared. Inputs, decisions and writing are the leader's
(`omniavatar.engine.pipeline`).
"""

from __future__ import annotations

import numpy as np

from omniavatar.engine.orders import EndOrder, PlaceOrder, WindowsOrder
from omniavatar.engine.pipeline import AvatarPipeline
from omniavatar.types import Conditioning


def follow(pipeline: AvatarPipeline) -> None:
    """Carry out the leader's orders until the last. Raises CheckpointError, ResourceError."""
    components = pipeline.components
    while not isinstance(order := pipeline.team.next_order(), EndOrder):
        if isinstance(order, PlaceOrder):
            components.adopt(components.place(order.request, order.identity))
            components.load_for_windows()
        else:
            _make_windows(pipeline, order)


def _make_windows(pipeline: AvatarPipeline, order: WindowsOrder) -> None:
    device = pipeline.components.device
    width = order.audio_width
    conditioning = Conditioning(
        order.text_positive.to(device),
        order.text_negative.to(device),
        order.reference_latent.to(device),
        None if width is None else np.empty((0, width), dtype=np.float32),
    )
    pipeline.components.use_vae_pass(order.vae_latents)
    pipeline.team.meet()
    generator = pipeline.window_generator(order.sampling, conditioning, order.step_plan)
    for _ in generator.run(order.windows, order.first, order.given):
        pass
