import re

import pytest
import torch
from compare import build_dit, relative_error, under


def test_every_recorded_case(golden):
    tensors, metadata = golden("dit.safetensors")
    dit = build_dit(metadata, under(tensors, "weights."))
    cases = sorted({match.group(0) for key in tensors if (match := re.match(r"case\d+\.", key))})
    assert cases
    for prefix in cases:
        case = under(tensors, prefix)
        with torch.inference_mode():
            text = dit.prepare_text(case["context"])
            for name, audio in (
                ("output", case["audio"]),
                ("output_silent", torch.zeros_like(case["audio"])),
            ):
                output = dit(case["x"], case["y"], case["timestep"], text, dit.prepare_audio(audio))
                assert relative_error(output, case[name]) <= 1e-5, (prefix, name)


def test_audio_changes_the_output(golden):
    """Without audio, the comparison above fails."""
    tensors, metadata = golden("dit.safetensors")
    assert relative_error(tensors["case0.output_silent"], tensors["case0.output"]) > 1e-3
    dit = build_dit(metadata, under(tensors, "weights."))
    case = under(tensors, "case0.")
    with torch.inference_mode():
        text = dit.prepare_text(case["context"])
        output = dit(case["x"], case["y"], case["timestep"], text, dit.prepare_audio(None))
    assert relative_error(output, case["output"]) > 1e-4


@pytest.mark.parametrize("changed", ["patch_embedding.weight", "time_projection.1.bias", "head.modulation"])
def test_weights_change_the_output(golden, changed):
    tensors, metadata = golden("dit.safetensors")
    weights = under(tensors, "weights.")
    weights[changed] = weights[changed] * 1.1
    dit = build_dit(metadata, weights)
    case = under(tensors, "case0.")
    with torch.inference_mode():
        audio = dit.prepare_audio(case["audio"])
        output = dit(case["x"], case["y"], case["timestep"], dit.prepare_text(case["context"]), audio)
    assert relative_error(output, case["output"]) > 1e-4
