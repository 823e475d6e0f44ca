"""The configuration: layers, origins, notations, and one clear line for every invalid value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from omniavatar.config.identity import NEUTRAL_FIELDS, SWITCHED_OFF, config_hash, flat_values, result_values
from omniavatar.config.load import load_config
from omniavatar.config.schema import NEGATIVE_PROMPT, PipelineConfig
from omniavatar.config.sparsity import SparsityConfig
from omniavatar.config.syntax import parse_overrides, parse_value
from omniavatar.config.values import CAUSAL_FIELDS, IGNORED_KEYS
from omniavatar.errors import ConfigError
from omniavatar.plan.run import plan_run
from omniavatar.sampling.schedule import make_schedule
from omniavatar.sampling.step_cache import compute_all

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def write(folder: Path, text: str, name: str = "c.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def hp(text: str) -> PipelineConfig:
    return load_config(None, [text]).config


# The tree


def test_leaf_names_are_unique_and_documented() -> None:
    leaves = [name.split(".")[1] for name in flat_values(PipelineConfig())]
    assert len(leaves) == len(set(leaves))
    assert not set(leaves) & (set(PipelineConfig.model_fields) | set(IGNORED_KEYS))
    for section in PipelineConfig.model_fields.values():
        for name, field in section.annotation.model_fields.items():
            assert field.description, f"{name} has no line of documentation"


def test_defaults_are_the_original_ones() -> None:
    config = PipelineConfig()
    sampling, video = config.sampling, config.video
    assert (sampling.num_steps, sampling.guidance_scale, sampling.audio_scale) == (50, 4.5, None)
    assert (sampling.seed, sampling.shift, sampling.cache_policy) == (42, 5.0, "none")
    assert (video.overlap_frame, video.max_tokens, video.fps, video.max_hw) == (13, 30000, 25, 720)
    assert (video.silence_duration_s, video.seq_len) == (0.3, 200)
    assert video.sizes == ((400, 720), (720, 720), (720, 400))
    assert sampling.effective_audio_scale == 4.5


def test_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        PipelineConfig().sampling.num_steps = 3  # type: ignore[misc]


def test_cache_policy_follows_the_threshold_unless_named() -> None:
    assert hp("tea_cache_l1_thresh=0.14").sampling.cache_policy == "teacache"
    assert hp("tea_cache_l1_thresh=0.14,step_cache=none").sampling.cache_policy == "none"
    assert hp("step_cache=magcache").sampling.cache_policy == "magcache"


def test_hash_ignores_only_values_that_do_not_change_the_video() -> None:
    base = config_hash(PipelineConfig())
    assert config_hash(hp("output_dir=elsewhere,resume=false,threads=3,device=cpu")) == base
    for change in ("seed=1", "crf=20", "dtype=fp32", "overlap_frame=5", "negative_prompt=x", "color_match=1"):
        assert config_hash(hp(change)) != base, change
    neutral = NEUTRAL_FIELDS | {f"sampling.{name}" for name in CAUSAL_FIELDS}
    neutral |= set(SWITCHED_OFF) - {"output.key_frame_s"}  # is on
    neutral |= {f"sparsity.{name}" for name in SparsityConfig.model_fields}  # attention is dense
    assert set(flat_values(PipelineConfig())) - set(result_values(PipelineConfig())) == neutral
    assert "sparsity.sparse_density" in result_values(hp("sparse_attention=window"))
    assert "output.key_frame_s" not in result_values(hp("key_frame_s=0"))


def test_tokenizer_is_beside_the_text_encoder() -> None:
    assert hp("text_encoder_path=a/t5.pth").model.tokenizer_folder == Path("a/google/umt5-xxl")
    assert hp("text_encoder_path=a/t5.pth,tokenizer_path=b").model.tokenizer_folder == Path("b")


def test_missing_paths_are_an_error_only_if_files_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"dit_path, vae_path.*weights: random"):
        PipelineConfig().model.check_files_named()
    hp("weights=random,scale=nano").model.check_files_named()


# Files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_load_without_warnings(path: Path) -> None:
    loaded = load_config(path)
    assert loaded.warnings == () and loaded.ignored == {}
    loaded.config.model.check_files_named()
    if path.stem in {"pocket", "pocket_live"}:
        assert loaded.config.model.input_limits is not None
    else:
        assert loaded.config.sampling.negative_prompt == NEGATIVE_PROMPT
        assert (loaded.config.model.exp_path is None) == (path.stem in {"flashhead", "leaptalk", "livetalk"})
    step_plan = compute_all(loaded.config.sampling.steps)
    plan = plan_run(loaded.config, loaded.config.video.sizes[0], 5 * 60 * 16000, step_plan)
    clean = 0 if plan.causal is None else 1
    assert plan.forwards == len(plan.windows) * (len(plan.branches) * plan.steps + clean) > 0


@pytest.mark.parametrize("scale", ["14B", "1.3B"])
def test_few_step_configs_run_four_passes_a_window(scale: str) -> None:
    config = load_config(CONFIGS / f"inference_{scale}_4steps.yaml").config
    plan = plan_run(config, (400, 720), 60 * 16000)
    assert plan.forwards == 4 * len(plan.windows) and plan.steps == 4
    assert config.sampling.sampler == "renoise" and len(config.model.loras) == 1
    wanted = make_schedule(4, 5.0).timesteps
    assert config.sampling.timesteps == pytest.approx(wanted, abs=1e-3)
    full = load_config(CONFIGS / f"inference{'' if scale == '14B' else '_1.3B'}.yaml").config
    assert config.model.model_copy(update={"loras": ()}) == full.model


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "threshold", "tokens", "overlap", "seq_len", "shards"),
    [
        ("inference", 50, 4.5, 0, 30000, 13, 200, 6),
        ("inference_1.3B", 50, 4.5, 0, 30000, 13, 200, 1),
        ("inference_optimized", 20, 3.5, 0.14, 20000, 9, 200, 6),
        ("inference_1.3B_optimized", 15, 3.0, 0.14, 15000, 5, 100, 1),
    ],
)
def test_shipped_configs_have_the_guides_values(
    name: str,
    steps: int,
    guidance: float,
    threshold: float,
    tokens: int,
    overlap: int,
    seq_len: int,
    shards: int,
) -> None:
    config = load_config(CONFIGS / f"{name}.yaml").config
    assert (config.sampling.num_steps, config.sampling.guidance_scale) == (steps, guidance)
    assert config.sampling.tea_cache_l1_thresh == threshold
    assert (config.video.max_tokens, config.video.overlap_frame, config.video.seq_len) == (
        tokens,
        overlap,
        seq_len,
    )
    assert len(config.model.dit_path) == shards


def test_the_originals_notation_is_understood(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "# comment\n"
        'dtype: "bf16"\n'
        "image_encoder_path: None\n"
        "dit_path: a/1.safetensors,a/2.safetensors\n"
        "num_persistent_param_in_dit:  # comment\n"
        "reload_cfg: True\n"
        "image_sizes_720: [[400, 720], \n      [720, 720]]\n"
        "audio_scale: \n"
        "num_steps: 25\n"
        "use_fsdp: False\n"
        "tea_cache_l1_thresh: 14e-2\n"
        "max_tokens: 3e4\n",
    )
    loaded = load_config(path)
    config = loaded.config
    assert config.model.dit_path == (Path("a/1.safetensors"), Path("a/2.safetensors"))
    assert config.video.image_sizes_720 == ((400, 720), (720, 720))
    assert config.sampling.tea_cache_l1_thresh == 0.14 and config.video.max_tokens == 30000
    assert config.sampling.audio_scale is None
    assert loaded.origins["sampling.num_steps"] == f"{path}:10"
    assert loaded.origins["sampling.seed"] == "default"
    assert set(loaded.ignored) == {"reload_cfg"}
    assert len(loaded.warnings) == 1 and "reload_cfg has no effect" in loaded.warnings[0]


def test_ignored_key_with_a_value_is_reported() -> None:
    loaded = load_config(None, ["random_prefix_frames=true"])
    assert "training setting" in loaded.warnings[0]


def test_memory_is_auto_or_a_number_and_the_originals_key_keeps_its_meaning() -> None:
    assert hp("").runtime.memory == "auto" and hp("memory=10").runtime.memory == 10.0
    assert hp("num_persistent_param_in_dit=100000000").runtime.num_persistent_param_in_dit == 10**8
    assert hp("num_persistent_param_in_dit=").runtime.num_persistent_param_in_dit is None
    for wrong in ("memory=0", "memory=lots", "memory=true", "num_persistent_param_in_dit=-1"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            hp(wrong)
    with pytest.raises(ConfigError, match="set only one"):
        hp("memory=10,num_persistent_param_in_dit=0")
    assert config_hash(hp("memory=10")) == config_hash(hp("num_persistent_param_in_dit=0"))
    assert config_hash(hp("quantize=auto")) != config_hash(hp(""))


def test_sections_flat_and_dotted_keys_are_the_same(tmp_path: Path) -> None:
    flat = load_config(write(tmp_path, "num_steps: 7\nfps: 30\n")).config
    nested = load_config(write(tmp_path, "sampling:\n  num_steps: 7\nvideo: {fps: 30}\n")).config
    dotted = load_config(None, ["sampling.num_steps=7,video.fps=30"]).config
    mapping = load_config(None, {"sampling": {"num_steps": 7}, "fps": 30}).config
    assert flat == nested == dotted == mapping


def test_precedence_checkpoint_then_yaml_then_override(tmp_path: Path) -> None:
    exp = tmp_path / "exp"
    exp.mkdir()
    released = {
        "model_config": {"in_dim": 33, "audio_hidden_size": 48},
        "train_architecture": "lora",
        "lora_rank": 128,
        "lora_alpha": 64,
        "lora_target_modules": "q,k,v,o,ffn.0,ffn.2",
        "init_lora_weights": "kaiming",
        "random_prefix_frames": True,
        "use_audio": True,
        "i2v": True,
        "learning_rate": 1e-4,
    }
    (exp / "config.json").write_text(json.dumps(released))
    path = write(tmp_path, f"exp_path: {exp}\nlora_rank: 64\nlora_alpha:\n")
    loaded = load_config(path, ["lora_alpha=32,model_config.num_heads=2"])
    model = loaded.config.model
    assert (model.lora_rank, model.lora_alpha) == (64, 32)
    assert (model.dit_config.audio_hidden_size, model.dit_config.num_heads) == (48, 2)
    assert loaded.origins["model.lora_rank"] == f"{path}:2"
    assert loaded.origins["model.lora_alpha"] == "--hp"
    assert loaded.origins["model.use_audio"] == str(exp / "config.json")
    assert loaded.origins["model.dit_config"] == f"{exp / 'config.json'}, --hp"
    assert loaded.warnings == (f"{exp}/config.json: ignored keys: learning_rate",)
    below = load_config(write(tmp_path, f"exp_path: {exp}\nlora_alpha:\n")).config
    assert below.model.lora_alpha == 64, "an empty YAML value keeps the checkpoint's value"


def test_exp_path_of_the_override_decides_which_config_json_is_read(tmp_path: Path) -> None:
    for name, rank in (("a", 8), ("b", 16)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"lora_rank": rank}))
    path = write(tmp_path, f"exp_path: {tmp_path / 'a'}\n")
    assert load_config(path).config.model.lora_rank == 8
    assert load_config(path, [f"exp_path={tmp_path / 'b'}"]).config.model.lora_rank == 16


def test_pattern_becomes_sorted_shards_or_stays_without_matches(tmp_path: Path) -> None:
    for number in (2, 1, 3):
        (tmp_path / f"m-{number}.safetensors").touch()
    found = load_config(None, {"dit_path": f"{tmp_path}/m-*.safetensors"}).config.model.dit_path
    assert [path.name for path in found] == ["m-1.safetensors", "m-2.safetensors", "m-3.safetensors"]
    assert hp("dit_path=none/*.st").model.dit_path == (Path("none/*.st"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_steps: 5\nnum_steps: 6\n", r"c\.yaml:2: not valid YAML: key num_steps occurs twice"),
        ("sampling: {seed: 1, seed: 2}\n", "seed occurs twice"),
        ("num_steps 5\n", "must consist of `key: value` lines"),
        ("a: [1, 2\n", r"c\.yaml:\d+: not valid YAML"),
        ("- 1\n- 2\n", "must consist of `key: value` lines"),
        ("num_step: 5\n", r"c\.yaml:1: unknown key num_step; did you mean num_steps\?"),
        ("sampling:\n  fps: 5\n", r"c\.yaml:2: unknown key sampling\.fps; did you mean video\.fps\?"),
        ("x: 1\nnum_steps: -5\n", "unknown key x"),
        ("seed: 1\nnum_steps: -5\n", r"c\.yaml:2: num_steps: must be greater than or equal to 1; got -5"),
        (
            "model_config: {heads: 3}\n",
            r"unknown key model_config\.heads; did you mean model_config\.num_heads",
        ),
        ("sampling: 5\n", "sampling is a section"),
        (
            "output_dir: !!python/object/apply:os.system [ls]\n",
            "not valid YAML: could not determine a constructor",
        ),
    ],
)
def test_bad_files_give_one_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_unreadable_files_give_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config file not found"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(binary)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json:1: not valid JSON"):
        load_config(None, {"exp_path": tmp_path})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("overlap_frame=12", "overlap_frame: must be 1 \\+ 4n.*nearest is 13"),
        ("overlap_frame=57", "overlap_frame: must be smaller than the window; .*57 frames at 720x720"),
        ("max_tokens=100", "max_tokens: .*raise it to at least"),
        ("num_steps=0", "num_steps: must be greater"),
        ("num_steps=2.5", "num_steps: .*whole number"),
        ("num_steps=true", "num_steps: .*whole number"),
        ("fps=0", "fps: must be greater"),
        ("guidance_scale=-1", "guidance_scale: must be greater"),
        ("guidance_scale=high", "guidance_scale: .*number; got 'high'"),
        ("guidance_scale=1e999", "guidance_scale: .*finite"),
        ("audio_scale=-0.5", "audio_scale"),
        ("image_sizes_720=[[400,721]]", "image_sizes_720: .*multiples of 16"),
        ("image_sizes_720=[]", "image_sizes_720: .*at least 1"),
        ("timesteps=[]", "timesteps: must not be empty"),
        ("timesteps=[250,500]", "timesteps: must descend"),
        ("timesteps=[1001,5]", "timesteps: must descend"),
        ("timesteps=[5,0]", "timesteps: must descend"),
        ("sample_rate=8000", "sample_rate: must be 16000"),
        ("sp_size=0", "sp_size: must be greater"),
        ("cfg_parallel=4", "cfg_parallel: must be less"),
        ("use_fsdp=true", "use_fsdp: .*set sp_size to 2 or more"),
        ("use_fsdp=true,sp_size=2,num_persistent_param_in_dit=0", "use_fsdp.*set only one"),
        ("dtype=int8", "dtype: must be 'bf16'"),
        ("device=tpu", "device: must be auto"),
        ("sampler=heun", "sampler: must be 'euler', 'renoise', 'causal' or 'bridge'"),
        ("step_cache=teacache", "step_cache: .*set tea_cache_l1_thresh"),
        ("weights=random", "weights: .*set scale"),
        ("teacache_coefficients=7B", "teacache_coefficients: must be auto"),
        ("use_audio=1", "use_audio: must be true or false"),
        ("loras=[{path: a, power: 2}]", "loras: has an unknown key"),
        ("seed=-1", "seed"),
        ("max_hw=900", "max_hw: must be 720 or 1280"),
        ("negative_prompt=a, b", "'b' is not key=value"),
        ("num_steps", "not key=value"),
        ("timesteps=[1,2", "brackets do not match"),
        ("timesteps=[1,2}", "brackets do not match"),
        ('negative_prompt="a', "quote not closed"),
    ],
)
def test_invalid_values_name_field_and_remedy(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--hp: .*{message}") as caught:
        hp(text)
    line = str(caught.value)
    assert "\n" not in line and "pydantic" not in line and "Input should" not in line


# --hp


def test_hp_understands_every_kind_of_value() -> None:
    config = hp(
        "sp_size=1,max_tokens=30000,guidance_scale=4.5,overlap_frame=13,num_steps=25,tea_cache_l1_thresh=14e-2,"
        "image_sizes_720=[[400,720],[720,720]],timesteps=[1000, 937.5],negative_prompt='ugly, it''s bad',"
        "audio_scale=None,resume=False,loras=[{path: a.safetensors, strength: 0.5}, b.safetensors]"
    )
    assert config.sampling.tea_cache_l1_thresh == 0.14, "the original read 14e-2 as 0"
    assert config.sampling.timesteps == (1000.0, 937.5) and config.sampling.steps == 2
    assert config.sampling.negative_prompt == "ugly, it's bad"
    assert [(str(lora.path), lora.strength) for lora in config.model.loras] == [
        ("a.safetensors", 0.5),
        ("b.safetensors", 1.0),
    ]
    assert config.output.resume is False


def test_hp_unknown_key_is_an_error_where_the_original_created_it() -> None:
    with pytest.raises(ConfigError, match=r"unknown key num_stpes; did you mean num_steps\?"):
        hp("num_stpes=5")


def test_later_overrides_win_and_null_clears() -> None:
    loaded = load_config(None, ["seed=1,seed=2", "seed=3,audio_scale=2", "audio_scale="])
    assert loaded.config.sampling.seed == 3 and loaded.config.sampling.audio_scale is None


KEYS = st.from_regex(r"[a-z][a-z_]{0,8}(\.[a-z]{1,6})?", fullmatch=True)
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=12)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
    TEXT,
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


def spell(value: object) -> str:
    """`value` in `--hp` notation, with quotes around every text."""
    return json.dumps(value, ensure_ascii=False)


@given(st.lists(st.tuples(KEYS, VALUES), max_size=6))
def test_hp_round_trip(pairs: list[tuple[str, object]]) -> None:
    text = ",".join(f"{key}={spell(value)}" for key, value in pairs)
    assert [(entry.key, entry.value) for entry in parse_overrides(text)] == pairs


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_hp_numbers_in_every_spelling(number: float) -> None:
    for spelling in (repr(number), f"{number:e}", f"{number:.17g}"):
        value = parse_value(spelling)
        assert isinstance(value, int | float) and float(value) == float(spelling)


@given(st.text(max_size=40))
def test_hp_never_fails_with_anything_but_a_config_error(text: str) -> None:
    try:
        parse_overrides(text)
    except ConfigError as error:
        assert "\n" not in str(error) or "\n" in text
