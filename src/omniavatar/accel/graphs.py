"""The blocks of a forward as one CUDA graph: the host launches once instead of a thousand times.

What changes: a forward of a shape that occurred before is captured and replayed from then on. It has its own
input tensors, into which the inputs of each call are copied. This is faster if the device computes a block in
less time than the host needs to launch it: small models on few tokens, above all if several GPUs share them
and every block has four exchanges (1.3B, 7,875 tokens on each of two H100: 3.3 ms to launch a block, 2.3 to
run it).
What it loses: nothing, the same kernels run on the same values. It costs a copy of the inputs (0.1 ms), the
memory of the captured forward, and a capture (about as long as a forward) for each shape.
Limits: blocks must stay on the device. A graph holds their addresses: call `clear` before they move.
Source: CUDA graphs in PyTorch (torch.cuda.CUDAGraph).

Shapes: B batch, L tokens, C width.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from omniavatar.accel.sparse_blocks import OrderedAudio
from omniavatar.model.dit import RunBlocks
from omniavatar.model.layers import AudioByToken, BlockInputs, TokenAudio
from omniavatar.model.rope import RopeTable

FORWARDS_FIRST = 4
"""Forwards of a shape before it is captured. A capture gains time after about ten forwards; the last window
of a few-step video has a shape that occurs once and only four."""
MOST = 4
"""Captured shapes that are kept; a video has two: its windows, and its last window."""
Replay = Callable[[], None]


class Capture(Protocol):
    """What captures functions; `CudaCapture` is the real one."""

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """A function that launches again what `work` launches, and the tensor it writes each time."""
        ...

    def release(self) -> None:
        """Give the memory back as soon as no capture is left that uses it."""
        ...


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One stream for all captures on a device: cuBLAS keeps 32 MiB for each stream that it has met."""
    return torch.cuda.Stream(device)


class CudaCapture:
    """Captures what a function launches; the returned replay function launches all of it again.

    All captures share their memory: a replay overwrites the results of other captures. Unlike
    `torch.cuda.graph` it neither waits for the device nor frees its cached memory, which would cost a running
    video more than the capture.
    """

    def __init__(self) -> None:
        self._stream = _capture_stream(torch.cuda.current_device())
        self._pool: Any = None
        self._holder: Replay | None = None

    def release(self) -> None:
        """Give the memory back as soon as no capture is left that uses it."""
        self._pool = self._holder = None

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        if self._holder is None:
            # PyTorch ends a pool with its last graph; this one lets the next video's captures use it again
            self._pool = torch.cuda.graph_pool_handle()
            self._holder, _ = self._captured(lambda: torch.zeros(1, device=self._stream.device))
        return self._captured(work)

    def _captured(self, work: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        collecting = gc.isenabled()
        gc.disable()  # freeing objects might call CUDA
        try:
            with torch.cuda.stream(self._stream):
                # other threads keep calling CUDA: the video's writer, NCCL's watchdog
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    out = work()
                finally:
                    graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, out


class GraphedBlocks:
    """Replaces `WanDiT.run_blocks`, which documents the arguments.

    The first `FORWARDS_FIRST` forwards of a shape run normally, which compiles and allocates; the next one is
    captured.
    """

    def __init__(self, run_blocks: RunBlocks, capture: Capture) -> None:
        self._run_blocks, self._capture = run_blocks, capture
        self._entries: dict[Any, _Entry | int] = {}

    def clear(self) -> None:
        """Drop all captures and free their memory."""
        self._entries.clear()
        self._capture.release()

    def __call__(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        key = _shapes(tokens_BLC, inputs)
        found = self._entries.pop(key, 0)
        while len(self._entries) >= MOST:
            del self._entries[next(iter(self._entries))]  # the least recently used shape
        if found == FORWARDS_FIRST:
            found = _Entry(self._run_blocks, self._capture, tokens_BLC, inputs)
        if isinstance(found, _Entry):
            self._entries[key] = found
            return found(tokens_BLC, inputs)
        self._entries[key] = found + 1
        return self._run_blocks(tokens_BLC, inputs)


class _Entry:
    """One captured shape and the tensors it reads."""

    def __init__(
        self, run_blocks: RunBlocks, capture: Capture, tokens_BLC: Tensor, inputs: BlockInputs
    ) -> None:
        self._own = [tensor.clone() for tensor in _changing(tokens_BLC, inputs)]
        self._text = [tensor.clone() for pair in inputs.text for tensor in pair]
        self._text_of = inputs.text
        own_tokens, own_inputs = self._rebuilt(inputs)
        self._replay, self._out = capture(lambda: run_blocks(own_tokens, own_inputs))

    def __call__(self, tokens_BLC: Tensor, inputs: BlockInputs) -> Tensor:
        torch._foreach_copy_(self._own, list(_changing(tokens_BLC, inputs)))
        if inputs.text is not self._text_of:
            torch._foreach_copy_(self._text, [tensor for pair in inputs.text for tensor in pair])
            self._text_of = inputs.text
        self._replay()
        return self._out.clone()

    def _rebuilt(self, inputs: BlockInputs) -> tuple[Tensor, BlockInputs]:
        """The arguments of a call with this entry's tensors in place of the call's."""
        own = iter(self._own)
        tokens, modulation, rope = next(own), next(own), RopeTable(next(own), next(own))
        audio = tuple(None if each is None else next(own) for each in _per_frame(inputs))
        text = tuple(zip(self._text[::2], self._text[1::2], strict=True))
        shared = inputs.audio
        placed = replace(shared, per_frame=audio) if isinstance(shared, TokenAudio | OrderedAudio) else audio
        return tokens, BlockInputs(modulation, rope, text, placed)


def _per_frame(inputs: BlockInputs) -> list[Tensor | None]:
    return list(inputs.audio.per_frame if isinstance(inputs.audio, AudioByToken) else inputs.audio)


def _changing(tokens_BLC: Tensor, inputs: BlockInputs) -> Iterator[Tensor]:
    """Every tensor of a call except the text's, in a fixed order."""
    yield from (tokens_BLC, inputs.modulation, inputs.rope.cos, inputs.rope.sin)
    yield from (each for each in _per_frame(inputs) if each is not None)


def _shapes(tokens_BLC: Tensor, inputs: BlockInputs) -> Any:
    """Everything that a captured forward depends on, except the values it copies."""
    audio = inputs.audio
    run: Any = (audio.first, audio.total) if isinstance(audio, TokenAudio) else None
    if isinstance(audio, OrderedAudio):
        run = audio.frames.data_ptr()  # its values never change, and a captured forward keeps it alive
    tensors = tuple((tensor.shape, tensor.dtype) for tensor in _changing(tokens_BLC, inputs))
    heard = tuple(each is not None for each in _per_frame(inputs))
    return run, tensors, heard, tuple((key.shape, key.dtype) for key, _ in inputs.text)
