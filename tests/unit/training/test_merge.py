"""Two sessions side by side become one state."""

import pytest
import torch
from training.merge import merge
from training.nets import Nets, load_state, save_state
from training.session import FOLDER, TOKENIZER


def session(folder, row, minutes, change):
    """A session that added `change` to the tensors under these prefixes, from the same start."""
    nets = Nets.fresh(0, FOLDER / "assets" / TOKENIZER)
    with torch.no_grad():
        for name, weight in nets.vae.named_parameters():
            weight += sum(amount for prefix, amount in change.items() if name.startswith(prefix))
        nets.dit.head.head.bias += change.get("dit", 0.0)
    save_state(nets, {"sessions": 2, "minutes": minutes, "log": [{"stage": "vae"}, row]}, folder)
    return nets


def test_a_merged_state_has_the_dit_of_one_and_the_decoder_of_the_other(tmp_path):
    one = session(tmp_path / "dit", {"stage": "dit"}, {"dit": 3.0, "decoder": 1.0}, {"dit": 0.5})
    two = session(
        tmp_path / "decoder", {"stage": "decoder"}, {"dit": 2.0, "decoder": 5.0}, {"decoder.head": 0.25}
    )
    facts = merge(tmp_path / "dit", tmp_path / "decoder", tmp_path / "out")
    assert facts["minutes"] == {"dit": 3.0, "decoder": 5.0}
    assert [row["stage"] for row in facts["log"]] == ["vae", "dit", "decoder"]
    made = Nets.fresh(1, FOLDER / "assets" / TOKENIZER)
    assert load_state(made, tmp_path / "out") == facts
    for name, wanted in (("dit", one), ("text", one), ("audio", one), ("vae", two)):
        for key, value in getattr(wanted, name).state_dict().items():
            torch.testing.assert_close(getattr(made, name).state_dict()[key], value.half().float())


def test_another_encoder_is_refused(tmp_path):
    for name, change in (("dit", {}), ("decoder", {"encoder.": 0.1})):
        session(tmp_path / name, {}, {"decoder": 1.0}, change)
    with pytest.raises(ValueError, match=r"its encoder is not that of .*dit; resume both from one state"):
        merge(tmp_path / "dit", tmp_path / "decoder", tmp_path / "out")
    assert not (tmp_path / "out").exists()
