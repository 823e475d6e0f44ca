"""The four networks for training: initial weights, batched forwards, and state files between sessions.

The modules are those of the engine (`omniavatar.model`, transformers' wav2vec 2.0 and UMT5). This file adds
only the batched forwards that inference does not have, the initial weights, and the state files.

Shapes: B clips, N = 4T-3 video frames, T latent frames, S samples, D audio width, L prompt tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from omniavatar.accel.attention.registry import create_attention
from omniavatar.checkpoint.synthetic import wav2vec_config
from omniavatar.encoders.audio import CONFIG_FIELDS
from omniavatar.encoders.text import MAX_DISTANCE
from omniavatar.model.dit import WanDiT
from omniavatar.model.vae import LATENT_MEAN, LATENT_STD, WanVAE, denormalise, normalise
from training.phones import ARTICULATORS, PHONES
from training.scale import POCKET

SHARD_BYTES = 15 * 2**20
TOKENS = 512
STATE = "pocket"
"""Files of a state are `pocket-000k.safetensors`."""


@torch.no_grad()
def make_vae() -> WanVAE:
    """A VAE that starts as a codec of single frames.

    Convolutions use only the newest frame; resampling in time repeats frames or takes the newer one. Signals
    keep their scale from layer to layer; residual branches and latent noise start small.
    """
    vae = WanVAE(POCKET.vae)
    for name, weight in vae.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif name.endswith("time_conv.weight"):
            nn.init.zeros_(weight)
            same = torch.eye(weight.shape[1]).repeat(weight.shape[0] // weight.shape[1], 1)
            weight[:, :, -1, 0, 0] = same
        elif not name.endswith("gamma"):
            newest = weight[:, :, -1:] if weight.dim() == 5 else weight
            branch = 0.2 if name.endswith(("residual.6.weight", "proj.weight")) else 1.0
            nn.init.zeros_(weight)
            nn.init.normal_(newest, std=branch / math.sqrt(newest[0].numel()))
    channels = POCKET.vae.z_dim
    assert vae.conv1.bias is not None
    vae.conv1.weight[channels:] *= 0.1
    vae.conv1.bias[channels:] = -5.0
    return vae


def channels_last(vae: WanVAE) -> None:
    """Set the memory format of convolution weights that is fastest in cuDNN; call it before the optimiser is
    made."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def vae_encode(vae: WanVAE, video: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance (B, 16, T, h, w), not normalised, of pixels (B, 3, N, H, W) in [-1, 1]."""
    mean, log_variance = vae.conv1(vae.encoder(video, {})).float().chunk(2, dim=1)
    return mean, log_variance.clamp(-20, 4)


def vae_decode(vae: WanVAE, latent: Tensor) -> Tensor:
    """Pixels (B, 3, N, H, W) of latents from `vae_encode`, in one pass."""
    return vae.decoder(vae.conv2(latent), {}).float()


def normalised_latents(vae: WanVAE, video: Tensor) -> Tensor:
    """Normalised latents (B, 16, T, h, w), as the DiT uses them."""
    return normalise(vae_encode(vae, video)[0])


def pixels_of(vae: WanVAE, latent: Tensor) -> Tensor:
    """Pixels of normalised latents, as the DiT uses them."""
    return vae_decode(vae, denormalise(latent))


@torch.no_grad()
def set_latent_statistics(vae: WanVAE, mean: Tensor, std: Tensor) -> None:
    """Fold an affine map into the two 1x1x1 layers, so that latents get the released VAE's statistics.

    The engine normalises latents with these statistics. Reconstructions do not change.

    mean, std: (16,), measured statistics of the latents.
    """
    scale = torch.tensor(LATENT_STD, device=mean.device) / std
    offset = torch.tensor(LATENT_MEAN, device=mean.device) - mean * scale
    channels = len(mean)
    bias_in, bias_out = vae.conv1.bias, vae.conv2.bias
    assert bias_in is not None and bias_out is not None
    vae.conv1.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    bias_in[:channels] = bias_in[:channels] * scale + offset
    bias_in[channels:] += 2 * scale.log()
    back = vae.conv2.weight / scale.view(1, -1, 1, 1, 1)
    bias_out -= (back * offset.view(1, -1, 1, 1, 1)).sum((1, 2, 3, 4))
    vae.conv2.weight.copy_(back)


class AudioTrainer(nn.Module):
    """wav2vec 2.0 with two heads for training only: phones and articulators of each video frame."""

    def __init__(self) -> None:
        from transformers import Wav2Vec2Config, Wav2Vec2Model

        super().__init__()
        fields = wav2vec_config(POCKET.wav2vec)
        known: dict[str, Any] = {field: fields[field] for field in CONFIG_FIELDS}
        self.wav2vec = Wav2Vec2Model(Wav2Vec2Config(**known, mask_time_prob=0.0, mask_feature_prob=0.0))
        hidden = POCKET.wav2vec.hidden
        self.phones = nn.Linear(hidden, len(PHONES))
        self.shapes = nn.Linear(hidden, len(ARTICULATORS))

    def states(self, sound: Tensor, frames: int) -> list[Tensor]:
        """The layers + 1 hidden states (B, frames, hidden) of normalised waveforms (B, S).

        The computation of `omniavatar.encoders.audio`, for a batch of equal lengths in one pass.
        """
        model = self.wav2vec
        features = F.interpolate(
            model.feature_extractor(sound), size=frames, mode="linear", align_corners=True
        )
        hidden = model.feature_projection(features.transpose(1, 2))[0]
        hidden = model.encoder.layer_norm(hidden + model.encoder.pos_conv_embed(hidden))
        result = [hidden]
        for layer in model.encoder.layers:
            attention = layer.attention
            heads = (attention.num_heads, -1)
            q, k, v = (
                each(hidden).unflatten(-1, heads).transpose(1, 2)
                for each in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = layer.layer_norm(hidden + attention.out_proj(mixed))
            hidden = layer.final_layer_norm(hidden + layer.feed_forward(hidden))
            result.append(hidden)
        return result

    def features(self, sound: Tensor, frames: int) -> Tensor:
        """Audio vectors (B, frames, D) for the DiT: the last hidden state, then all hidden states."""
        states = self.states(sound, frames)
        return torch.cat([states[-1], *states], dim=-1)


def normalise_sound(sound: Tensor) -> Tensor:
    """Waveforms (B, S), each with zero mean and unit variance."""
    centred = sound - sound.mean(1, keepdim=True)
    return centred * (centred.square().mean(1, keepdim=True) + 1e-7).rsqrt()


def make_dit() -> WanDiT:
    """A DiT whose blocks start as the identity and whose head starts at zero (as in adaLN-zero)."""
    dit = WanDiT(POCKET.dit, create_attention("sdpa", torch.device("cpu"), torch.float32)[1])
    for name, weight in dit.named_parameters():
        if name.endswith(("self_attn.o.weight", "cross_attn.o.weight", "ffn.2.weight")):
            weight.data.mul_(0.3)
        elif name == "head.head.weight" or name.endswith(".bias"):
            weight.data.zero_()
    return dit


class PromptEncoder(nn.Module):
    """UMT5's encoder stack and the packaged tokenizer."""

    def __init__(self, tokenizer_folder: Path) -> None:
        from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

        super().__init__()
        spec = POCKET.text
        self.stack = UMT5EncoderModel(
            UMT5Config(
                vocab_size=spec.vocab,
                d_model=spec.dim,
                d_kv=spec.dim_attn // spec.num_heads,
                d_ff=spec.dim_ffn,
                num_layers=spec.num_layers,
                num_heads=spec.num_heads,
                relative_attention_max_distance=MAX_DISTANCE,
                relative_attention_num_buckets=spec.num_buckets,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
                attn_implementation="eager",
            )
        ).encoder
        self.tokenizer: Any = AutoTokenizer.from_pretrained(
            tokenizer_folder, local_files_only=True, trust_remote_code=False, padding_side="right"
        )

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Tokens and mask (B, longest) of cleaned prompts."""
        encoded = self.tokenizer(prompts, add_special_tokens=True, padding=True, return_tensors="pt")
        return encoded["input_ids"], encoded["attention_mask"]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Embeddings (B, 512, width) of tokens and mask (B, L); zero after the text.

        The mask is passed in additive form: transformers would compute it from a CPU scalar, which a CUDA
        graph cannot capture.
        """
        added = torch.zeros(mask.shape, device=mask.device).masked_fill(mask == 0, torch.finfo().min)
        hidden = self.stack(input_ids=ids, attention_mask=added[:, None, None]).last_hidden_state
        hidden = hidden * mask[..., None].to(hidden.dtype)
        return F.pad(hidden, (0, 0, 0, TOKENS - hidden.shape[1]))


@dataclass(eq=False)
class Nets:
    """All networks of one training run."""

    vae: WanVAE
    audio: AudioTrainer
    text: PromptEncoder
    dit: WanDiT

    @classmethod
    def fresh(cls, seed: int, tokenizer_folder: Path) -> Nets:
        """Networks with new weights, which are equal on every machine for one seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(make_vae(), AudioTrainer(), PromptEncoder(tokenizer_folder), make_dit())

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.vae, "audio": self.audio, "text": self.text, "dit": self.dit}

    def to(self, device: torch.device) -> Nets:
        for module in self.modules().values():
            module.to(device)
        return self


def forget_gradients(weights: Iterable[Tensor]) -> None:
    """Delete the gradients; the next backward pass allocates new ones."""
    for weight in weights:
        weight.grad = None


class Average:
    """Exponential moving average of the parameters of some modules, in float32."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules, self.decay, self.steps = modules, decay, 0
        self.weights = [weight.detach() for _, weight in self._weights()]
        self.values = {name: weight.detach().clone() for name, weight in self._weights()}

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in self.modules.items():
            for name, weight in module.named_parameters():
                yield f"{prefix}.{name}", weight

    @torch.no_grad()
    def update(self) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.values.values()), self.weights, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Swap the weights of the modules and the averaged weights."""
        for name, weight in self._weights():
            held = weight.detach().clone()
            weight.copy_(self.values[name])
            self.values[name].copy_(held)


def save_shards(weights: dict[str, Tensor], folder: Path, name: str) -> None:
    """Write weights in float16 to files `NAME-000k.safetensors` of at most 15 MiB, in place of older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for key, weight in weights.items():
        value = weight.detach().to("cpu", torch.float16).contiguous().clone()
        if held + value.nbytes > SHARD_BYTES:
            shards.append({})
            held = 0
        shards[-1][key] = value
        held += value.nbytes
    for old in folder.glob(f"{name}-*.safetensors"):
        old.unlink()
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{name}-{number:04d}.safetensors")


def load_shards(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights that `save_shards` wrote, in float32."""
    held: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        held |= {key: value.float() for key, value in load_file(path).items()}
    return held


def save_state(nets: Nets, facts: dict[str, Any], folder: Path) -> None:
    """Write all weights in float16 to files `pocket-000k.safetensors` of at most 15 MiB, and `facts` as
    JSON."""
    save_shards(
        {
            f"{prefix}.{name}": weight
            for prefix, module in nets.modules().items()
            for name, weight in module.state_dict().items()
        },
        folder,
        STATE,
    )
    (folder / "state.json").write_text(json.dumps(facts, indent=1) + "\n")


def load_state(nets: Nets, folder: Path) -> dict[str, Any]:
    """Load files written by `save_state` into `nets`; every key must match. Returns the facts."""
    held = load_shards(folder, STATE)
    for prefix, module in nets.modules().items():
        part = {key.partition(".")[2]: value for key, value in held.items() if key.startswith(prefix + ".")}
        module.load_state_dict(part)
    facts: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return facts


def cosine(progress: float, floor: float = 0.03) -> float:
    """Factor of the learning rate at `progress` 0..1 of a stage."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
