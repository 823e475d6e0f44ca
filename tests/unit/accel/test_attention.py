"""Attention backends: names, the measured choice, and packages that are not there."""

from __future__ import annotations

import json
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import make_pipeline, request
from omniavatar.accel.attention.packages import SageAttention
from omniavatar.accel.attention.registry import ATTENTION, choose_backend, create_attention
from omniavatar.accel.attention.timing import NEAR, attention_seconds, choose_attention, pick
from omniavatar.device import Backend
from omniavatar.engine.events import Message
from omniavatar.errors import ResourceError, ResumeError

CPU = torch.device("cpu")


@given(st.dictionaries(st.sampled_from(ATTENTION.names), st.floats(1e-4, 1.0), min_size=1))
def test_the_fastest_or_a_preferred_one_as_good(seconds):
    chosen, best, preferred = pick(seconds), min(seconds.values()), list(seconds)
    assert seconds[chosen] <= best * NEAR
    assert all(seconds[name] > best * NEAR for name in preferred[: preferred.index(chosen)])


def test_exact_backends_are_preferred_in_the_order_of_their_rank():
    ranked = [each for each in ATTENTION if each.exact and each.rank is not None]
    names = [each.name for each in sorted(ranked, key=lambda each: -each.rank)]
    assert names == ["fa3", "cudnn", "flash", "flex", "efficient", "sdpa"]
    assert all(each.rank is None for each in ATTENTION if not each.exact), "auto never loses anything"


def test_measured_on_the_cpu():
    seconds = attention_seconds(CPU, torch.float32, heads=2, head_dim=16)
    assert list(seconds) == ["flash", "sdpa"] and all(value > 0 for value in seconds.values())
    name, attention, line = choose_attention("fastest", CPU, torch.float32, 2, 16)
    assert name in seconds and line is not None and f"attention: {name} (measured at 2 heads x 512" in line
    q = torch.randn(1, 5, 2, 16)
    exact = create_attention("math", CPU, torch.float32)[1](q, q, q)
    torch.testing.assert_close(attention(q, q, q), exact)
    assert choose_attention("math", CPU, torch.float32, 2, 16)[2] is None


def test_a_backend_that_refuses_is_left_out():
    refused = []

    def refusing(q, k, v):
        refused.append(q.shape)
        raise RuntimeError("No available kernel")

    backend = Backend(name="refusing", create=lambda device: refusing, exact=True, doc="Refuses.", rank=99)
    ATTENTION.register(backend)
    try:
        assert set(attention_seconds(CPU, torch.float32, 1, 8)) == {"flash", "sdpa"} and refused
    finally:
        ATTENTION.unregister("refusing")


def test_the_choice_is_said_and_kept_with_the_video(nano_checkpoint, tmp_path):
    from omniavatar.engine.recorder import RunRecorder

    said: list[str] = []
    recorder = RunRecorder([lambda event: isinstance(event, Message) and said.append(event.text)])
    pipeline = make_pipeline(nano_checkpoint, tmp_path / "cache", recorder, attention="fastest")
    result = pipeline.generate(request(0.3), tmp_path / "a.mp4")
    sidecar = json.loads(result.sidecar.read_text())
    name = pipeline.models.attention_name
    assert sidecar["attention"] == name and name in ("flash", "sdpa")
    assert any(line.startswith(f"attention: {name} (measured") for line in said)
    same = make_pipeline(nano_checkpoint, tmp_path / "cache", attention=name)
    assert same.generate(request(0.3), tmp_path / "a.mp4").seconds == 0.0, "finished by the same backend"
    other = make_pipeline(nano_checkpoint, tmp_path / "cache", attention="math")
    with pytest.raises(ResumeError, match=r"runtime\.attention"):  # another backend rounds differently
        other.generate(request(0.3), tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sage", "pip install sageattention"),
        ("flex", "needs a CUDA GPU"),
        ("fa3", "pip install fa3-fwd"),
        ("cudnn", "needs a CUDA GPU, the device is cpu"),
    ],
)
def test_what_is_not_there_names_the_remedy(name, hint):
    with pytest.raises(
        ResourceError,
        match=f"attention: {name} cannot be used here .*{hint}.*use one of: auto, fastest, sdpa",
    ):
        create_attention(name, CPU, torch.float32)


@pytest.mark.parametrize(
    ("capability", "installed", "dtype", "chosen", "more"),
    [
        ((9, 0), ("fa3_fwd_interface",), torch.bfloat16, "fa3", ("fa3", "fa3_fp8")),
        ((9, 0), ("fa3_fwd_interface",), torch.float32, "sdpa", ("fa3", "fa3_fp8")),
        ((9, 0), ("fa3_fwd_interface",), torch.float16, "cudnn", ("fa3", "fa3_fp8")),
        ((9, 0), ("triton",), torch.bfloat16, "cudnn", ("flex",)),
        ((10, 0), ("fa3_fwd_interface",), torch.float16, "cudnn", ()),
        ((8, 9), ("sageattention", "triton"), torch.bfloat16, "sdpa", ("flex", "sage")),
        ((7, 5), ("sageattention", "triton"), torch.float16, "sdpa", ("flex",)),
    ],
)
def test_what_auto_means_on_a_gpu(monkeypatch, capability, installed, dtype, chosen, more):
    for name in ("fa3_fwd_interface", "sageattention", "triton"):
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None) if name in installed else None
        monkeypatch.setitem(sys.modules, name, module if name in installed else None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda", 0)
    assert choose_backend(gpu, dtype) == chosen
    assert ATTENTION.available(gpu)[:5] == ("sdpa", "math", "flash", "efficient", "cudnn")
    assert ATTENTION.available(gpu)[5:] == more


@pytest.mark.parametrize("name", ["fa3", "fa3_fp8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_precision_that_a_backend_lacks_is_one_line(monkeypatch, name, dtype):
    module = ModuleType("fa3_fwd_interface")
    module.__spec__ = ModuleSpec("fa3_fwd_interface", None)
    monkeypatch.setitem(sys.modules, "fa3_fwd_interface", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ResourceError, match=rf"{name} computes in bf16, not in fp(16|32); set dtype"):
        create_attention(name, torch.device("cuda", 0), dtype)


def test_sage_takes_long_keys_only(monkeypatch):
    """Keys of the text are kept for the prompt, and the package changes keys in place."""
    calls: list[tuple[int, ...]] = []

    def sageattn(q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "NHD" and not is_causal
        calls.append(tuple(k.shape))
        k -= k.mean(1, keepdim=True)
        return q

    module = ModuleType("sageattention")
    module.sageattn = sageattn
    monkeypatch.setitem(sys.modules, "sageattention", module)
    attention = SageAttention()
    q, text = torch.randn(1, 7, 2, 16), torch.randn(1, 512, 2, 16)
    before = text.clone()
    exact = create_attention("math", CPU, torch.float32)[1](q, text, text)
    torch.testing.assert_close(attention(q, text, text), exact)
    assert torch.equal(text, before) and not calls
    long = torch.randn(1, 1024, 2, 16)
    assert torch.equal(attention(q, long, long.clone()), q) and calls == [(1, 1024, 2, 16)]
