"""Random weights that behave like trained ones in size: finite, activations of order one, damped residuals.

One rule for every model of the project, from a weight's name and shape: norms around one, matrices by
1/sqrt(inputs), what is written back to a residual stream smaller with depth. Used for synthetic checkpoints
and for `weights: random`, where timings and memory matter and pictures do not.
Uniform numbers, since they come from integers exactly: the same bytes on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import nn

NORM = re.compile(r"(?:^|[._])(?:norm\w*|layer_norm|final_layer_norm)\.weight$|gamma$|weight_g$|original0$")
DAMPED = re.compile(r"(?:attn|SelfAttention)\.o\.weight$|ffn\.(?:2|fc2)\.weight$|\.wo\.weight$")
TEXT_QUERY = re.compile(r"(?:\.attn|SelfAttention)\.q\.weight$")
LORA_UP = re.compile(r"lora_B\b.*weight$")
DAMPING = 0.2
TEXT_HEAD_DIM = 64


def initial_spread(key: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """(mean, standard deviation) of a random weight called `key`, in the released files' names."""
    if NORM.search(key):
        return 1.0, 0.02
    if key.endswith(".bias") or len(shape) < 2:
        return 0.0, 0.02
    if key.endswith("token_embedding.weight"):
        return 0.0, 1.0
    if key.endswith("pos_embedding.embedding.weight"):
        return 0.0, 0.3
    inputs = shape[-1] if key.endswith("modulation") else math.prod(shape[1:])
    std = 1.0 / math.sqrt(inputs)
    if LORA_UP.search(key):
        return 0.0, 0.2 * std
    if TEXT_QUERY.search(key):
        return 0.0, std / math.sqrt(TEXT_HEAD_DIM)
    return 0.0, std * (DAMPING if DAMPED.search(key) else 1.0)


def random_weight(
    key: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    """The next random weight of `generator`, on its device, spread as `initial_spread` says."""
    mean, std = initial_spread(key, shape)
    half_width = std * math.sqrt(3.0)
    value = torch.empty(shape, dtype=dtype, device=generator.device)
    return value.uniform_(mean - half_width, mean + half_width, generator=generator)


def fill_random(
    module: nn.Module,
    *,
    dtype: torch.dtype | Callable[[str], torch.dtype],
    device: torch.device | str,
    seed: int,
    place: torch.device | str | None = None,
) -> None:
    """Give a module made on meta random weights directly on `device`, without a copy elsewhere.

    dtype: of all weights, or a function of the weight's name. Numbers depend on seed, device and dtype.
    place: where each weight goes once it is made, `device` if None.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in list(module.named_parameters()):
        chosen = dtype if isinstance(dtype, torch.dtype) else dtype(name)
        value = random_weight(name, tuple(parameter.shape), chosen, generator)
        parent, _, leaf = name.rpartition(".")
        setattr(
            module.get_submodule(parent), leaf, nn.Parameter(value.to(place or device), requires_grad=False)
        )
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__} keeps tensors on meta: {left}")
