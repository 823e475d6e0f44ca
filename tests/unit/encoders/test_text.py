"""Text encoder: cleaning, tokens, keys and sizes of the released file, and the cache of embeddings."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from omniavatar.checkpoint.layout import UMT5_XXL as XXL_SPEC
from omniavatar.checkpoint.layout import text_tensors
from omniavatar.encoders import text as text_module
from omniavatar.encoders.text import UMT5_XXL, TextEncoder, library_key, random_text_encoder, sizes_of
from omniavatar.encoders.tokens import ByteTokenizer, FolderTokenizer, clean_prompt
from omniavatar.errors import CheckpointError
from tiny_text import SIZES, SPEC


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a\t woman \n speaks ", "a woman speaks"),
        ("R&amp;amp;D", "R&D"),
        ("fran\u00c3\u00a7ais", "fran\u00e7ais"),
        ("it\u2019s", "it's"),
        ("", ""),
    ],
)
def test_cleaning(raw: str, clean: str) -> None:
    assert clean_prompt(raw) == clean


def test_folder_tokenizer_ends_pads_and_cuts(tokenizer_folder: Path) -> None:
    tokens = FolderTokenizer(tokenizer_folder)(["a b", "c" * 700], 512)
    assert tokens.ids.shape == (2, 512)
    length = int(tokens.mask[0].sum())
    assert length == tokens.lengths[0] > 2
    assert tokens.ids[0, length - 1] == 1
    assert not tokens.ids[0, length:].any()
    assert tokens.mask[1].sum() == 512 < tokens.lengths[1]
    assert tokens.ids[1, -1] == 1


def test_missing_or_broken_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tokenizer folder not found"):
        FolderTokenizer(tmp_path / "none")
    with pytest.raises(CheckpointError, match="unusable tokenizer") as caught:
        FolderTokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def hostile(source: Path, folder: Path, **settings: object) -> Path:
    """A copy of a tokenizer folder with other settings, and code that leaves a mark when it runs."""
    shutil.copytree(source, folder)
    code = f"open({str(folder / 'ran')!r}, 'w')\nclass Evil: ...\n"
    (folder / "evil.py").write_text(code)
    (folder / "tokenizer.py").write_text(code)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        {"auto_map": {"AutoTokenizer": [None, "somebody/repository--evil.Evil"]}, "tokenizer_class": "Evil"},
        {"auto_map": ["evil.Evil", None]},
        {"tokenizer_class": "Evil"},
        {"tokenizer_class": "BertJapaneseTokenizer"},
        {"tokenizer_class": ["T5Tokenizer"]},
        {"tokenizer_class": "\x1b[31mT5"},
        {"added_tokens_decoder": {"x": 3}},
        {"pad_token": None},
    ],
    ids=str,
)
def test_a_tokenizer_folder_cannot_run_code(
    tokenizer_folder: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    folder = hostile(tokenizer_folder, tmp_path / "hostile", **settings)
    with pytest.raises(CheckpointError) as caught:
        FolderTokenizer(folder)(["a"], 4)
    assert str(folder) in str(caught.value) and str(caught.value).isprintable()
    assert not (folder / "ran").exists()


def test_settings_of_a_tokenizer_cannot_name_other_files(tokenizer_folder: Path, tmp_path: Path) -> None:
    """The files are always those of the folder; a model's configuration beside them is not read."""
    elsewhere = str(tmp_path / "elsewhere.json")
    names = ("vocab_file", "tokenizer_file", "gguf_file", "special_tokens_map_file", "added_tokens_file")
    settings: dict[str, object] = {name: elsewhere for name in names}
    settings |= {"fast_tokenizer_files": ["tokenizer.9.json", "../../elsewhere.json"], "name_or_path": "a/b"}
    folder = hostile(tokenizer_folder, tmp_path / "hostile", **settings)
    (folder / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}')
    prompts = ["a b", "hello"]
    found, expected = (FolderTokenizer(each)(prompts, 16) for each in (folder, tokenizer_folder))
    assert torch.equal(found.ids, expected.ids) and found.lengths == expected.lengths
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_damaged_files_of_a_tokenizer(tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    folder = hostile(tokenizer_folder, tmp_path / "hostile")
    for content in (b"", b"[" * 5000, b'{"model": 3, "eos_token": "</s>"}', b"\xff\x00"):
        (folder / name).write_bytes(content)
        refused = ""
        try:
            FolderTokenizer(folder)(["a"], 4)
        except CheckpointError as error:
            refused = str(error)
        harmless = name != "tokenizer.json" and content.startswith(b"{")
        assert harmless or (str(folder) in refused and "\n" not in refused)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        FolderTokenizer(folder)


@pytest.mark.parametrize("name", ["T5Tokenizer", "T5TokenizerFast", "PreTrainedTokenizerFast"])
def test_the_tokens_are_those_of_transformers(tokenizer_folder: Path, tmp_path: Path, name: str) -> None:
    from transformers import AutoTokenizer

    folder = hostile(tokenizer_folder, tmp_path / "again", tokenizer_class=name)
    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    texts = ["a b", "Hello, it's a  test", "\u00e9\u4eba", ""]
    found = FolderTokenizer(folder)(texts, 24)
    for row, text in enumerate(texts):
        assert found.ids[row, : found.lengths[row]].tolist() == reference(text)["input_ids"]


def test_a_tokenizer_of_another_text_encoder(encoder: TextEncoder) -> None:
    with pytest.raises(CheckpointError, match="knows 260 tokens, the tokenizer gave token 260"):
        encoder.encode_tokens(torch.tensor([[5, 260]]), torch.ones(1, 2, dtype=torch.int64))


@given(st.text(max_size=30), st.integers(2, 20))
@settings(max_examples=50, deadline=None)
def test_byte_tokenizer(text: str, length: int) -> None:
    tokens = ByteTokenizer()([text], length)
    kept = int(tokens.mask.sum())
    data = text.encode()
    assert tokens.lengths == (len(data) + 1,)
    assert bytes((tokens.ids[0, : kept - 1] - 3).tolist()) == data[: length - 1]
    assert tokens.ids[0, kept - 1] == 1 and not tokens.ids[0, kept:].any()


def test_sizes_of_the_released_file() -> None:
    assert sizes_of(dict(text_tensors(XXL_SPEC)), "test") == dict(UMT5_XXL)
    with pytest.raises(CheckpointError, match=r"some\.pth: has no tensor 'token_embedding\.weight'"):
        sizes_of({}, "some.pth")


def test_every_released_key_has_a_place() -> None:
    stack = text_module._stack(SIZES)
    wanted = {name: tuple(value.shape) for name, value in stack.state_dict().items()}
    assert {library_key(key): shape for key, shape in text_tensors(SPEC)} == wanted


def test_padding_does_not_matter_and_prompts_do_not_mix(encoder: TextEncoder) -> None:
    """Computing only the tokens gives the result of all 512 positions under a mask, in any batch."""
    prompts = ["a man speaks", "a much longer prompt about a woman in a red coat"]
    embeddings = encoder.encode(prompts)
    assert embeddings.shape == (2, 512, SPEC.dim) and embeddings.dtype == torch.float32
    tokens = ByteTokenizer()(prompts, 512)
    with torch.inference_mode():
        whole = encoder.stack(input_ids=tokens.ids, attention_mask=tokens.mask).last_hidden_state
    whole = whole * tokens.mask[:, :, None]
    assert (embeddings - whole).abs().max() < 1e-5 * whole.abs().max()
    assert not embeddings[tokens.mask == 0].any()
    assert torch.equal(encoder.encode(prompts[:1])[0], embeddings[0])


def test_long_prompt_is_cut_with_a_warning(encoder: TextEncoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        embedding = encoder.encode(["x" * 600])
    assert embedding[0, -1].any()
    assert "601 tokens" in caplog.text


def test_random_encoder_depends_on_the_seed(encoder: TextEncoder) -> None:
    embedding = encoder.encode(["a"])
    assert torch.isfinite(embedding).all() and 0.1 < embedding[0, :2].std() < 10
    again, other = (random_text_encoder("cpu", torch.float32, seed=s, sizes=SIZES) for s in (1, 2))
    assert torch.equal(again.encode(["a"]), embedding)
    assert not torch.equal(other.encode(["a"]), embedding)


def test_layer_by_layer_gives_the_same_embeddings(
    encoder: TextEncoder, encoder_file: Path, tokenizer_folder: Path
) -> None:
    """Each layer computes with other weight tensors and gets its own back afterwards."""
    streamed = random_text_encoder("cpu", torch.float32, seed=1, sizes=SIZES, layer_by_layer=True)
    at_home = {name: weight.data_ptr() for name, weight in streamed.stack.named_parameters()}
    away: list[str] = []

    def look(*_: object) -> None:
        away.extend(name for name, w in streamed.stack.named_parameters() if w.data_ptr() != at_home[name])

    for block in streamed.stack.block:
        block.layer[1].register_forward_hook(look)
    prompts = ["a face", "two people talk"]
    assert torch.equal(streamed.encode(prompts), encoder.encode(prompts))
    assert set(away) == {name for name in at_home if name.startswith("block.")}
    assert {name: weight.data_ptr() for name, weight in streamed.stack.named_parameters()} == at_home
    files = encoder_file, tokenizer_folder, "cpu", torch.float32
    streamed, resident = TextEncoder.load(*files, layer_by_layer=True), TextEncoder.load(*files)
    assert torch.equal(streamed.encode(prompts), resident.encode(prompts))


def test_load_is_strict(encoder_file: Path, tokenizer_folder: Path) -> None:
    loaded = TextEncoder.load(encoder_file, tokenizer_folder, "cpu", torch.bfloat16)
    assert loaded.encode(["a"]).dtype == torch.bfloat16
    assert loaded.width == SPEC.dim
    weights = torch.load(encoder_file)
    key = "blocks.1.attn.q.weight"
    torch.save(weights | {"blocks.1.attn.extra": weights[key]}, encoder_file)
    with pytest.raises(CheckpointError, match=r"1 unexpected: blocks\.1\.attn\.extra"):
        TextEncoder.load(encoder_file, tokenizer_folder, "cpu")
    del weights[key]
    torch.save(weights, encoder_file)
    with pytest.raises(CheckpointError, match="1 missing"):
        TextEncoder.load(encoder_file, tokenizer_folder, "cpu")


def test_the_synthetic_files_load(nano_checkpoint: Path) -> None:
    (path,) = nano_checkpoint.rglob("models_t5_umt5-xxl-enc-bf16.pth")
    loaded = TextEncoder.load(path, path.parent / "google" / "umt5-xxl", "cpu")
    assert torch.isfinite(loaded.encode(["A woman speaks."])).all()
