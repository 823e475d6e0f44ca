"""Resamples blocks of sound with FFmpeg's swresample, to an exact number of samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import av
import numpy as np

WAVEFORM_BLOCK = 65536


def resampled_length(samples: int, rate: int, new_rate: int) -> int:
    """ceil(samples * new_rate / rate)."""
    return -(-samples * new_rate // rate)


def resample(
    blocks: Iterable[np.ndarray], layout: str, rate: int, new_layout: str, new_rate: int
) -> Iterator[np.ndarray]:
    """Blocks at the new rate and layout, with exactly `resampled_length` samples in total."""
    if (layout, rate) == (new_layout, new_rate):
        yield from blocks
        return
    resampler = av.AudioResampler(format="fltp", layout=new_layout, rate=new_rate)
    read = written = 0
    for block in blocks:
        read += block.shape[1]
        frames = resampler.resample(_frame(block, layout, rate)) if block.shape[1] else []
        for frame in frames:
            data = frame.to_ndarray()
            written += data.shape[1]
            yield data
    missing = resampled_length(read, rate, new_rate) - written
    for frame in resampler.resample(None) if read else []:
        data = frame.to_ndarray()[:, : max(0, missing)]
        missing -= data.shape[1]
        yield data
    yield from silence(len(av.AudioLayout(new_layout).channels), missing)


def silence(channels: int, samples: int) -> Iterator[np.ndarray]:
    """Blocks of zeros with `samples` samples in total."""
    for start in range(0, samples, WAVEFORM_BLOCK):
        yield np.zeros((channels, min(WAVEFORM_BLOCK, samples - start)), np.float32)


def _frame(block: np.ndarray, layout: str, rate: int) -> av.AudioFrame:
    """An interleaved float frame of (channels, samples): PyAV 18.1 cannot make a planar one of 8 channels."""
    interleaved = np.ascontiguousarray(block.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(interleaved, format="flt", layout=layout)
    frame.sample_rate = rate
    return frame
