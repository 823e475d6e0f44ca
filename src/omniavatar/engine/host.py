"""What the engine needs from the machine it runs on. A subclass of `Host` replaces single functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omniavatar.device import arrival, free_disk, usable_cores
from omniavatar.plan.limit import device_limit

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from omniavatar.config.schema import RuntimeConfig
    from omniavatar.media.running import RunningEncoder


class Host:
    """This machine."""

    def memory_limit(self, runtime: RuntimeConfig, device: torch.device) -> int | None:
        """Bytes of the device that this process may hold in total; None means no limit."""
        return device_limit(runtime.memory, device)

    def arrival(self, device: torch.device) -> Callable[[], None]:
        """A function that blocks until the device has finished everything queued so far."""
        return arrival(device)

    def choose_encoder(self, name: str, size: tuple[int, int]) -> str:
        """The video encoder that `output.encoder` selects for frames of (height, width)."""
        from omniavatar.media.h264 import choose_encoder

        return choose_encoder(name, size)

    def free_disk(self, folder: Path) -> int:
        """Free bytes of the disk that holds `folder`."""
        return free_disk(folder)

    @property
    def encoders(self) -> int:
        """How many windows x264 may encode at once; a window keeps about two cores busy."""
        return min(8, usable_cores() // 2)

    def encode_segment(
        self,
        frames: Any,
        path: Path,
        running: RunningEncoder | None = None,
        **options: Any,
    ) -> int:
        """Encode one window's frames into `path`; returns their number.

        - running: the encoder of the windows before, with its settings (`media.running`), which takes
          pictures of yuv420p; None for a closed file by the settings in `options`
          (`media.video.encode_segment`).
        """
        if running is not None:
            return running.write(frames, path)
        from omniavatar.media.video import encode_segment

        return encode_segment(frames, path, **options)
