"""Choosing settings for a deadline: parsing, ranking, what is counted, and one measured on nano."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from omniavatar.accel.attention.sparse_registry import SPARSE, SparseBackend
from omniavatar.accel.vae_runners import VAES
from omniavatar.checkpoint.layout import scale_spec
from omniavatar.cli import app
from omniavatar.config.change import changed
from omniavatar.config.load import load_config
from omniavatar.errors import ConfigError
from omniavatar.measure.deadline import (
    Axes,
    Candidate,
    Measured,
    choose,
    count,
    linear_part,
    parse_duration,
    propose,
    untried,
)
from omniavatar.measure.deadline_axes import faster_presets, sparsities, vae_runners, window_lengths
from omniavatar.measure.projection import StartCosts, WindowCosts
from omniavatar.plan.run import plan_run
from omniavatar.plan.sparsity import plan_sparse_run
from omniavatar.sampling.step_cache import compute_all

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
SMALL = "weights=random,scale=nano,device=cpu,max_tokens=56,image_sizes_720=[[64,64]],num_steps=4"


NONE = [({}, 0.0)]
START = StartCosts(0.0, 0.0)


def forwards_only(plan, settings) -> WindowCosts:
    """A second a forward, and nothing else."""
    return WindowCosts(1.0, 0.0, 0.0, 0.0, 0.0)


def counted(config, plan, costs=forwards_only, configured=None, **axes) -> list[Candidate]:
    """All candidates; the axes are those of the configuration where none are given."""
    found = replace(Axes.of(config), **axes)
    return list(count(config, plan, costs, START, 5, found, configured or config))


@given(st.integers(0, 30), st.integers(0, 59), st.integers(0, 59))
def test_durations(hours: int, minutes: int, seconds: int) -> None:
    total = hours * 3600 + minutes * 60 + seconds
    for text in (f"{hours}h{minutes}m{seconds}s", f"{hours} h {minutes} min {seconds} s"):
        if total:
            assert parse_duration(text) == total
        else:
            with pytest.raises(ConfigError, match="must be above 0"):
                parse_duration(text)


@pytest.mark.parametrize("text", ["", "soon", "20 minutes!", "-5min", "5x", "min"])
def test_what_is_not_a_duration(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a duration; write 20min"):
        parse_duration(text)
    assert parse_duration("1.5") == 90


@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.floats(1, 1000)), min_size=1, max_size=30),
    st.floats(1, 2000),
    st.floats(0, 1500),
)
def test_the_fewest_points_within_the_deadline(pairs, deadline, as_is) -> None:
    choices = [Candidate({}, 0.0, as_is, 1), *(Candidate({"num_steps": 1}, p, s, 1) for p, s in pairs)]
    found = choose(choices, 5, deadline, {}, [])
    fitting = [each for each in choices if each.seconds <= deadline * 0.95]
    assert found.as_configured == choices[0]
    if not fitting:
        assert found.chosen is None and found.others[0].seconds == min(each.seconds for each in choices)
    else:
        assert found.chosen in fitting
        assert found.chosen.points == min(each.points for each in fitting)
        assert all(each.seconds > deadline * 0.95 for each in found.others)


def test_what_is_counted() -> None:
    config = load_config(CONFIGS / "inference_1.3B_optimized.yaml", {"tea_cache_l1_thresh": 0}).config

    def plan(changes, seconds):
        if changes.sampling.cache_policy == "magcache":
            raise ConfigError("no constants")
        return plan_run(changes, (400, 720), round(seconds * 16000), compute_all(changes.sampling.steps))

    choices = counted(config, plan)
    assert choices[0].settings == {} and choices[0].points == 0
    assert all("magcache" not in each.override for each in choices)
    steps = {each.settings.get("num_steps", 15) for each in choices}
    assert steps == {15, 12, 10, 8}
    half = next(each for each in choices if each.override == "num_steps=8,guidance_interval=[0,0.5]")
    windows = choices[0].forwards // 30
    assert half.forwards == windows * (4 * 2 + 4) == half.seconds
    again = load_config(CONFIGS / "inference_1.3B_optimized.yaml", ["tea_cache_l1_thresh=0", half.override])
    assert again.config.sampling.num_steps == 8 and again.config.sampling.guidance_interval == (0.0, 0.5)
    float8 = counted(changed(config, runtime={"quantize": "fp8"}), plan, configured=config)
    assert float8[0].settings == {"quantize": "fp8"} and float8[0].points == 1
    distilled = changed(
        config, sampling={"timesteps": (1000.0, 500.0), "guidance_scale": 1.0, "audio_scale": None}
    )
    lengths = [each.settings for each in counted(distilled, plan)]
    assert lengths == [{}, {"max_tokens": 20000}, {"max_tokens": 30000}]


def test_sparse_attention_may_be_proposed() -> None:
    """Where a fast backend takes the model; counted with the steps that stay dense."""
    config = load_config(CONFIGS / "inference_1.3B_4steps.yaml").config
    asked: list[tuple[str, float | None]] = []

    def plan(changes, seconds):
        asked.append((changes.sparsity.sparse_attention, changes.sparsity.sparse_density))
        dit = scale_spec("1.3B").dit
        steps = compute_all(changes.sampling.steps)
        return plan_sparse_run(changes, (400, 720), round(seconds * 16000), dit, steps)

    def costs(each, settings) -> WindowCosts:
        share = 1.0 if each.sparsity is None else each.sparsity.kept_share
        return WindowCosts(1.0, 0.0, 0.0, 0.0, 0.0, sparse_forward=share)

    axis = [({}, 0.0), ({"sparse_attention": "window", "sparse_density": 0.35}, 5.0)]
    dense, sparse = counted(config, plan, costs, planned=(axis,))
    assert asked == [("dense", None), ("window", 0.35)]
    assert dense.points == 0 and sparse.points == 5 and sparse.seconds < dense.seconds
    assert sparse.override == "sparse_attention=window,sparse_density=0.35"
    again = load_config(CONFIGS / "inference_1.3B_4steps.yaml", [sparse.override]).config
    assert again.sparsity.density == 0.35
    assert sparsities(config) == [({}, 0.0)], "no fast backend on this machine"


def registered(backends: list[SparseBackend]) -> None:
    """Let these be the backends of sparse attention, in this order."""
    for each in list(SPARSE):
        SPARSE.unregister(each.name)
    for each in backends:
        SPARSE.register(each)


def test_a_fast_backend_decides_what_is_proposed() -> None:
    config = load_config(None, ["weights=random,scale=1.3B,device=cpu,num_steps=4"]).config
    before = list(SPARSE)
    registered([replace(each, fast=True) for each in before])
    try:
        found = sparsities(config)
        causal = changed(config, sparsity={"sparse_attention": "window"})
        assert sparsities(causal) == [({}, 0.0)], "a configured plan stays"
        assert sparsities(changed(config, sampling={"num_steps": 1})) == [({}, 0.0)]
    finally:
        registered(before)
    assert [settings.get("sparse_density") for settings, _ in found] == [None, 0.5, 0.35, 0.25]
    assert {settings.get("sparse_attention") for settings, _ in found[1:]} == {"window"}


def test_the_float8_vae_is_proposed_where_it_is_faster() -> None:
    config = load_config(CONFIGS / "inference_1.3B_4steps.yaml").config
    assert vae_runners(config) == NONE, "a CPU runs it, but slowly"
    before = list(VAES)
    try:
        for each in before:
            VAES.unregister(each.name)
            VAES.register(replace(each, suits=lambda *facts: True))
        assert vae_runners(config) == [*NONE, ({"vae": "fp8"}, 0.5)]
        for other in ({"vae": "plain"}, {"vae": "fp8"}):
            assert vae_runners(changed(config, runtime=other)) == NONE
        assert vae_runners(changed(config, model={"decoder": "taehv"})) == NONE
    finally:
        for each in before:
            VAES.unregister(each.name)
            VAES.register(each)


def four_steps(tokens: int = 15_000):
    config = load_config(CONFIGS / "inference_1.3B_4steps.yaml", {"max_tokens": tokens}).config

    def plan(changes, seconds):
        return plan_run(changes, (400, 720), round(seconds * 16000), compute_all(4))

    return config, plan


def test_windows_of_other_lengths_are_counted_for_few_steps() -> None:
    config, plan = four_steps()
    assert window_lengths(config) == [*NONE, ({"max_tokens": 20_000}, 0.5), ({"max_tokens": 30_000}, 0.5)]
    assert window_lengths(four_steps(30_000)[0])[1:] == [
        ({"max_tokens": 15_000}, 1.0),
        ({"max_tokens": 20_000}, 1.0),
    ]
    assert window_lengths(changed(config, sampling={"timesteps": None})) == NONE
    shorter, longer = (plan(changed(config, video={"max_tokens": each}), 300) for each in (15_000, 30_000))
    window = WindowCosts(forward=1.0, skipped_forward=0.1, decode=0.5, encode=0.1, write=0.2)
    measured = Measured(
        window, START, shorter.tokens, shorter.window_length - shorter.overlap, 0.6, [1.0, 0.5], [1.0, 0.8],
        {"fp8": (0.3, 0.05)}, {"veryfast": 0.1},
    )  # fmt: skip
    ratio = longer.tokens / shorter.tokens
    assert measured.costs(shorter, {}) == window
    costs = measured.costs(longer, {"vae": "fp8", "preset": "veryfast"})
    assert costs.forward == pytest.approx(0.6 * ratio + 0.4 * ratio**2)
    assert costs.decode == pytest.approx(0.3 * ratio) and costs.encode == 0.05
    assert 0.1 * ratio < costs.write < 0.3, "more of a longer window's frames are new"
    assert linear_part((100, 0.6 * 100 + 0.4 * 100), (50, 0.6 * 50 + 0.4 * 25)) == pytest.approx(0.6)
    assert linear_part((100, 1.0), (50, 0.6)) == 1.0, "timing noise cannot make attention negative"


def test_a_faster_preset_is_counted_where_the_model_would_wait() -> None:
    config, plan = four_steps()
    assert [settings["preset"] for settings, _ in faster_presets(config)] == ["veryfast", "ultrafast"]
    assert faster_presets(changed(config, output={"preset": "ultrafast"})) == []
    writing = {"veryfast": 6.0, "ultrafast": 3.0}

    def costs(each, settings) -> WindowCosts:
        return WindowCosts(1.0, 0.0, 0.5, 0.1, writing.get(settings.get("preset"), 12.0), writers=writers)

    writers = 4  # 3 s a window against 4.6
    assert [each.settings for each in counted(config, plan, costs, planned=(NONE,))] == [{}]
    writers = 2
    slow, better, best = counted(config, plan, costs, planned=(NONE,))
    assert [better.settings, best.settings] == [{"preset": "veryfast"}, {"preset": "ultrafast"}]
    windows = len(plan(config, 300).windows)
    assert slow.seconds == pytest.approx(6 * windows, rel=0.1) and better.points == 0.25
    assert better.seconds == pytest.approx(4.6 * windows, rel=0.1)


@pytest.mark.slow
def test_prediction_agrees_with_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time of this process, since other work shares its cores. Both leave out loading."""
    import time

    from tests.engine import portrait, voice

    from omniavatar import AvatarPipeline, AvatarRequest

    monkeypatch.setattr(time, "perf_counter", time.process_time)
    config = load_config(CONFIGS / "nano.yaml", [SMALL]).config
    found = propose(config, minutes=0.05, deadline=1e6, repeats=2)
    assert found.chosen == found.as_configured and not found.chosen.settings
    pipeline = AvatarPipeline.from_config(config)
    request = AvatarRequest("a person", portrait(), voice(3.0))
    pipeline.generate(request, tmp_path / "warm.mp4")
    begun = time.perf_counter()
    pipeline.generate(request, tmp_path / "video.mp4", resume=False)
    taken = time.perf_counter() - begun
    assert 0.3 < (found.chosen.seconds - found.loading) / taken < 3


@pytest.mark.parametrize("chosen", [None, Candidate({"num_steps": 8}, 6.0, 60.0, 100)])
def test_a_smaller_decoder_is_named_and_not_proposed(chosen: Candidate | None) -> None:
    """To those who lose something, and where its weights are for the model's latents."""
    config = load_config(CONFIGS / "inference_1.3B.yaml").config
    (note,) = untried(config, chosen)
    assert "decoder=taehv" in note and "never measured" in note
    assert untried(config, Candidate({}, 0.0, 60.0, 100)) == ()
    assert untried(changed(config, model={"decoder": "taehv"}), chosen) == ()
    assert untried(load_config("pocket").config, chosen) == ()


@pytest.mark.slow
def test_command(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner()
    base = ["plan", "-c", str(CONFIGS / "nano.yaml"), "--hp", SMALL, "--minutes", "0.1"]
    met = run.invoke(app, [*base, "--deadline", "5h", "--json"])
    assert met.exit_code == 0, met.output
    assert json.loads(met.stdout)["chosen"]["settings"] == {}
    missed = run.invoke(app, [*base, "--deadline", "0.01s"])
    assert missed.exit_code == 7
    line = " ".join(missed.output.split())
    assert "too slow: as configured" in line and "points lost: an order of preference" in line
    assert "cannot be made in 0.0 s on this machine; the fastest settings take" in line
    fixed = "timesteps=[1000,500],sampler=renoise,guidance_scale=1"
    bound = run.invoke(app, [*base, "--hp", fixed, "--deadline", "0.01s"])
    assert bound.exit_code == 7 and bound.stderr.rstrip().endswith(": those of the configuration")
    assert run.invoke(app, [*base[:-2], "--deadline", "5h"]).exit_code == 2
    wrong = run.invoke(app, [*base, "--deadline", "soon"])
    assert wrong.exit_code == 2 and "is not a duration" in wrong.output
