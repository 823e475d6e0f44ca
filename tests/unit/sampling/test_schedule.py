import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.errors import ConfigError
from omniavatar.sampling.denoise import denoise, noises_drawn
from omniavatar.sampling.noise import NoiseAhead, WindowNoise, span_weights
from omniavatar.sampling.samplers import euler_step, renoise_step
from omniavatar.sampling.schedule import make_schedule

CPU = torch.device("cpu")


@given(st.integers(1, 100), st.floats(0.5, 20))
def test_levels_fall_from_one(steps, shift):
    schedule = make_schedule(steps, shift)
    assert len(schedule) == steps
    assert schedule.sigmas[0] == pytest.approx(1.0)
    assert all(a > b > 0 for a, b in zip(schedule.sigmas, schedule.sigmas[1:], strict=False))
    assert schedule.next_sigma(steps - 1) == 0.0


def test_four_step_loras_get_their_published_timesteps():
    assert make_schedule(4, 5.0).timesteps == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    assert make_schedule(50, 5.0, (1000, 757, 522)).timesteps == pytest.approx([1000, 757, 522])


@pytest.mark.parametrize("bad", [(), (500, 500), (500, 600), (1001,), (0,)])
def test_bad_timesteps(bad):
    with pytest.raises(ConfigError, match="timesteps"):
        make_schedule(4, 5.0, bad)


def test_euler_reaches_the_clean_sample_of_a_straight_flow():
    clean, noise = torch.randn(1, 4, 2, 2, 2), torch.randn(1, 4, 2, 2, 2)
    for sampler in ("euler", "renoise"):
        schedule = make_schedule(5, 5.0)
        given_latents = clean[:, :, :1]

        def velocity(sample, step, schedule=schedule):
            return (sample - clean) / schedule.sigmas[step]

        result = denoise(velocity, schedule, given_latents, noise.clone, sampler)
        assert torch.allclose(result, clean, atol=1e-5), sampler


def test_given_latents_are_kept_before_every_step_and_at_the_end():
    given_latents = torch.full((1, 2, 2, 1, 1), 7.0)
    seen = []

    def velocity(sample, step):
        seen.append(sample[:, :, :2].clone())
        return torch.ones_like(sample)

    result = denoise(velocity, make_schedule(3, 5.0), given_latents, lambda: torch.randn(1, 2, 4, 1, 1))
    assert len(seen) == 3
    assert all(torch.equal(s, given_latents) for s in seen)
    assert torch.equal(result[:, :, :2], given_latents)


def test_sampling_runs_in_float32():
    """Fault of the original: sample and timestep in bf16."""
    dtypes = set()

    def velocity(sample, step):
        dtypes.add(sample.dtype)
        return sample

    noise = torch.randn(1, 2, 2, 1, 1).bfloat16()
    denoise(velocity, make_schedule(2, 5.0), torch.zeros(1, 2, 1, 1, 1), lambda: noise)
    assert dtypes == {torch.float32}


def test_steps_by_hand():
    x, v, n = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(-1.0)
    assert euler_step(x, v, 0.8, 0.3).item() == pytest.approx(2.0 - 0.25)
    clean = 2.0 - 0.8 * 0.5
    assert renoise_step(x, v, 0.8, 0.3, n).item() == pytest.approx(0.7 * clean - 0.3)
    assert renoise_step(x, v, 0.8, 0.0, None).item() == pytest.approx(clean)


@pytest.mark.parametrize(("sampler", "draws"), [("euler", 1), ("renoise", 3)])
def test_noise_drawn_ahead_is_the_noise(sampler, draws):
    """In a thread, for the window that comes next too, and again from the first one on when asked again."""
    schedule = make_schedule(3, 5.0, None)
    assert noises_drawn(schedule, sampler) == draws
    shape = (1, 2, 3, 4, 5)
    ahead = NoiseAhead(42, CPU, draws)
    for window in (0, 1, 1, 2):
        drawn = []

        next_noise = ahead.of(window, shape)

        def draw(next_noise=next_noise, drawn=drawn):
            drawn.append(next_noise())
            return drawn[-1].clone()  # `denoise` writes into it

        ahead.prepare(window + 1, shape)
        denoise(lambda sample, step: sample, schedule, torch.zeros(1, 2, 1, 4, 5), draw, sampler)
        slow = WindowNoise(42, window, shape, CPU)
        assert len(drawn) == draws
        expected = [slow.draw() for _ in drawn]
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
        assert torch.equal(draw(), slow.draw())  # one more than was foreseen
    other = (1, 2, 2, 4, 5)
    ahead.prepare(3, shape)
    assert ahead.of(3, other)().shape == other  # not the shape it was prepared for


def test_noise_depends_on_seed_and_window_alone():
    """Fault of the original: one global seed, so that a result depends on everything before it."""
    shape = (1, 2, 3, 4, 5)
    torch.manual_seed(0)
    first = WindowNoise(42, 3, shape, CPU)
    a, b = first.draw(), first.draw()
    torch.manual_seed(99)
    torch.randn(17)
    again = WindowNoise(42, 3, shape, CPU)
    assert torch.equal(a, again.draw())
    assert torch.equal(b, again.draw())
    assert not torch.equal(a, b)
    for other in (WindowNoise(43, 3, shape, CPU), WindowNoise(42, 4, shape, CPU)):
        assert not torch.equal(a, other.draw())
    assert abs(a.mean()) < 0.3 and abs(a.std() - 1) < 0.2


@pytest.mark.parametrize("span", [2, 5, 8])
def test_noise_with_a_span_is_normal_and_goes_on_from_window_to_window(span):
    shape = (1, 4, 2, 24, 24)
    ahead = NoiseAhead(42, CPU, 1, span)
    noise = torch.cat([ahead.of(window, shape)() for window in range(12)], 2)
    weights = torch.from_numpy(span_weights(span))
    assert weights.square().sum() == pytest.approx(1)
    for latent in (0, 1, 11):
        assert noise[:, :, latent].std() == pytest.approx(1, abs=0.05)
    for apart in range(1, span + 1):
        shared = float((weights[apart:] * weights[: span - apart]).sum())
        found = (noise[:, :, apart:] * noise[:, :, :-apart]).mean((0, 1, 3, 4))
        assert found.tolist() == pytest.approx([shared] * len(found), abs=0.09)


def test_some_channels_have_no_span():
    shape = (1, 4, 2, 3, 3)
    plain, slow, mixed = (NoiseAhead(42, CPU, 1, *form).of(5, shape)() for form in ((1,), (8,), (8, 1)))
    assert torch.equal(mixed[:, :1], plain[:, :1]) and torch.equal(mixed[:, 1:], slow[:, 1:])
    assert not torch.equal(plain[:, 1:], slow[:, 1:])


def test_noise_with_a_span_depends_on_seed_and_window_alone():
    """A resumed run begins at any window; the noises of later steps are fresh."""
    shape = (1, 2, 2, 4, 5)
    ahead = NoiseAhead(42, CPU, 2, 5)
    for window in (3, 0, 1, 1):
        ahead.prepare(window + 1, shape)
        draw = ahead.of(window, shape)
        again = NoiseAhead(42, CPU, 1, 5).of(window, shape)
        assert torch.equal(draw(), again())
        plain = WindowNoise(42, window, shape, CPU)
        plain.draw()
        assert torch.equal(draw(), plain.draw())
    assert not torch.equal(NoiseAhead(43, CPU, 1, 5).of(0, shape)(), NoiseAhead(42, CPU, 1, 5).of(0, shape)())
