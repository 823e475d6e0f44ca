"""The training code on CUDA against the CPU: renderer, mixed-precision steps, compiled blocks."""

import copy
from pathlib import Path

import pytest
import torch
from training import nets as training_nets
from training.drive import SIGNALS
from training.graphed import GraphedStep
from training.head import Head
from training.looks import draw_looks
from training.render import Performance, Renderer
from training.scale import LATENTS, POCKET
from training.settings import read_settings
from training.stage_dit import compiled_blocks, dit_batch, dit_loss
from training.stage_vae import to_pixels, vae_loss

from omniavatar.checkpoint.layout_files import TOKENIZER

pytestmark = pytest.mark.gpu
ROOT = Path(training_nets.__file__).parent
SETTINGS = read_settings(ROOT / "configs" / "check.yaml")


def frames_on(device, count=3):
    head = Head(device)
    generator = torch.Generator().manual_seed(0)
    coefficients = (torch.rand(count, 5, 52, generator=generator) * 0.3).to(device)
    turned = (torch.randn(count, 5, 3, generator=generator) * 0.1).to(device)
    still = torch.zeros(count, 5, 2, device=device)
    performance = Performance(coefficients, turned, still, still)
    return Renderer(head).frames(draw_looks(head, count, 7), performance)


def test_frames_are_those_of_the_cpu():
    made, mouth = frames_on("cuda")
    wanted, place = frames_on("cpu")
    torch.testing.assert_close(mouth.cpu(), place, atol=0.01, rtol=0)
    apart = (made.cpu().int() - wanted.int()).abs()
    assert (apart > 3).float().mean() < 2e-3


@pytest.fixture(scope="module")
def nets():
    return training_nets.Nets.fresh(0, ROOT / "assets" / TOKENIZER).to(torch.device("cuda"))


def test_the_vae_steps_in_mixed_precision(nets):
    vae = copy.deepcopy(nets.vae)
    pixels = to_pixels(frames_on("cuda", 1)[0])[..., 60:124, 60:124]
    weight = torch.ones(1, 5, 64, 64, device="cuda")
    torch.manual_seed(0)
    exact = float(vae_loss(vae, pixels, weight, SETTINGS.vae)[0])
    training_nets.channels_last(vae)
    with torch.autocast("cuda", torch.bfloat16):
        torch.manual_seed(0)
        loss, _ = vae_loss(vae, pixels.contiguous(memory_format=torch.channels_last_3d), weight, SETTINGS.vae)
    loss.backward()
    assert float(loss) == pytest.approx(exact, rel=0.02)
    assert all(p.grad is None or p.grad.isfinite().all() for p in vae.parameters())


def examples():
    """A batch of four windows."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    ids = torch.full((4, 160), 5, device="cuda")
    stories = {
        "latents": normal(4, 2, 16, LATENTS, 24, 24).half(),
        "weight": torch.ones(4, 2, LATENTS, 24, 24, device="cuda").half(),
        "starts": torch.tensor([[0, 9]] * 4, device="cuda"),
        "drive": normal(4, 2, LATENTS, len(SIGNALS)),
        "eyes": torch.tensor([[8.0, 9.0], [15.0, 9.0]], device="cuda").expand(4, -1, -1),
        "audio": normal(4, 52, POCKET.dit.audio_dim).half(),
        "ids": ids,
        "mask": (ids > 0).long(),
    }
    return dit_batch(stories, SETTINGS.dit, generator)


def test_compiled_blocks_give_the_plain_loss_and_gradient(nets):
    dit = copy.deepcopy(nets.dit)
    torch.nn.init.normal_(dit.head.head.weight, std=0.02)
    batch, found = examples(), []
    for run_blocks in (None, compiled_blocks(dit)):
        dit.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = dit_loss(dit, nets.text, batch, SETTINGS.dit.steady, run_blocks)
        loss.backward()
        found.append((float(loss), dit.blocks[4].ffn[0].weight.grad.clone()))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.01)
    apart = (found[1][1] - found[0][1]).norm() / found[0][1].norm()
    assert apart < 0.05


def test_a_graphed_step_gives_the_loss_and_gradient_of_each_batch(nets):
    dit, text = copy.deepcopy(nets.dit), copy.deepcopy(nets.text)
    torch.nn.init.normal_(dit.head.head.weight, std=0.02)
    run_blocks = compiled_blocks(dit)
    weights = [*dit.parameters(), *text.parameters()]

    def loss_of(batch):
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return dit_loss(dit, text, batch, SETTINGS.dit.steady, run_blocks)

    first = examples()
    graphed = GraphedStep(loss_of, first, weights)
    other = {name: value.flip(0) * (0.5 if value.is_floating_point() else 1) for name, value in first.items()}
    for batch in (other, first):
        loss = float(graphed(batch))
        found = [weight.grad.clone() for weight in weights if weight.grad is not None]
        held = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        exact = loss_of(batch)
        exact.backward()
        assert loss == pytest.approx(float(exact), rel=1e-3)
        wanted = [weight.grad for weight in weights if weight.grad is not None]
        for weight, gradient in zip(weights, held, strict=True):
            weight.grad = gradient
        assert len(found) == len(wanted)
        apart = torch.stack([(a - b).norm() for a, b in zip(found, wanted, strict=True)]).norm()
        assert apart < 0.02 * torch.stack([b.norm() for b in wanted]).norm()
