"""Embeddings of prompts, from memory, the cache on disk or the text encoder.

The least recently used embeddings leave memory, so its size does not grow with the number of prompts. They
are kept in host memory: the device holds the two of the running request only.

The text encoder is loaded only for prompts that no cache holds, and is released at once: only the DiT is
larger, and the text encoder runs for seconds. If it does not fit, it computes layer by layer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from omniavatar.checkpoint.layout import scale_spec, text_tensors
from omniavatar.device import upload
from omniavatar.encoders.text import TextEncoder, random_text_encoder, sizes_of
from omniavatar.encoders.text_cache import TextCache, encode_cached, encoder_identity
from omniavatar.engine.events import Message

if TYPE_CHECKING:
    from omniavatar.config.schema import PipelineConfig
    from omniavatar.types import Recorder


KEPT_BYTES = 64 * 2**20
"""Most bytes of embeddings in memory: 16 prompts of the released models."""


class KeptEmbeddings:
    """The embeddings used last, in host memory.

    - most: bytes; the entry used last stays even if it alone is larger.
    """

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self._most = most
        self._entries: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in self._entries.values())

    def get(self, prompt: str) -> Tensor | None:
        """The embedding of `prompt`, which is now the one used last; None if it is not kept."""
        if prompt in self._entries:
            self._entries.move_to_end(prompt)
        return self._entries.get(prompt)

    def put(self, prompt: str, embedding: Tensor) -> None:
        """Keep a copy of `embedding` in memory of its own size, and drop the ones used least recently."""
        self._entries[prompt] = embedding.detach().cpu().clone()
        self._entries.move_to_end(prompt)
        while self.bytes > self._most and len(self._entries) > 1:
            self._entries.popitem(last=False)


class PromptEncoder:
    """Embeds prompts for one configuration.

    - fits: returns whether the whole text encoder fits on the device now. The embeddings do not depend on it.
    """

    def __init__(
        self,
        config: PipelineConfig,
        device: torch.device,
        dtype: torch.dtype,
        recorder: Recorder,
        fits: Callable[[], bool],
    ) -> None:
        self._config, self._device, self._dtype = config, device, dtype
        self._recorder, self._fits = recorder, fits
        self._kept = KeptEmbeddings()

    def embed(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embeddings, one (1, 512, text_dim) a prompt, on the device."""
        found = {prompt: self._kept.get(prompt) for prompt in prompts}
        missing = [prompt for prompt, embedding in found.items() if embedding is None]
        if missing:
            for prompt, embedding in zip(missing, self._compute(missing), strict=True):
                found[prompt] = embedding[None]
                self.remember(prompt, embedding[None])
        placed = {prompt: self._placed(each) for prompt, each in found.items() if each is not None}
        return [placed[prompt] for prompt in prompts]

    def remember(self, prompt: str, embedding: Tensor) -> None:
        """Use `embedding` (1, 512, text_dim) while this prompt is one of those used last."""
        self._kept.put(prompt, embedding)

    def _placed(self, embedding: Tensor) -> Tensor:
        on_device = embedding.device.type == self._device.type
        return embedding.to(self._device) if on_device else upload(embedding, self._device)

    def _compute(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (n, 512, text_dim), from the cache on disk or from a text encoder loaded now."""
        if self._fits():
            try:
                return self.encode(prompts, layer_by_layer=False)
            except torch.OutOfMemoryError:
                self._recorder.event(Message("the text encoder does not fit: layer by layer", "warning"))
        return self.encode(prompts, layer_by_layer=True)

    def encode(self, prompts: Sequence[str], layer_by_layer: bool) -> Tensor:
        """Embeddings (n, 512, text_dim); with `layer_by_layer`, the device holds one layer at a time."""
        model = self._config.model
        if model.weights == "random":
            with self._recorder.stage("load_text_encoder"):
                sizes = sizes_of(dict(text_tensors(scale_spec(model.scale).text)), "random weights")
                encoder = random_text_encoder(
                    self._device, self._dtype, seed=0, sizes=sizes, layer_by_layer=layer_by_layer
                )
            return encoder.encode(prompts)
        encoder_path, tokenizer_path = model.text_encoder_path, model.tokenizer_folder
        assert encoder_path is not None and tokenizer_path is not None

        def load() -> TextEncoder:
            self._recorder.event(Message("loading the text encoder (new prompt)"))
            with self._recorder.stage("load_text_encoder"):
                return TextEncoder.load(
                    encoder_path, tokenizer_path, self._device, self._dtype, layer_by_layer
                )

        identity = encoder_identity(encoder_path, tokenizer_path, self._dtype)
        folder = self._config.runtime.text_cache
        return encode_cached(prompts, None if folder is None else TextCache(folder, identity), load)
