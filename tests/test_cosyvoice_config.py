"""What a cosyvoice.yaml may name, what it may not, and that reading one leaves no trace."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cosyvoice.utils.config import MAX_FILE_BYTES, MODEL_KEYS, Call, ConfigError, has_key, load_config, read_config
from cosyvoice.utils.train_utils import pipeline_key

DATA_DIR = Path(__file__).parent / "data"
RELEASED_STYLE = DATA_DIR / "cosyvoice_300m.yaml"
EXAMPLES = Path(__file__).parents[1] / "CosyVoice" / "examples"
RELEASED_SIZES = EXAMPLES / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml"
TINY_SIZES = EXAMPLES / "tiny" / "conf" / "cosyvoice.yaml"
TRAINING_KEYS = ("data_pipeline", "data_pipeline_gan", "train_conf", "train_conf_gan")


@pytest.fixture
def write(tmp_path):
    def write_text(text: str | bytes) -> Path:
        path = tmp_path / "cosyvoice.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that leaves a file behind when it is imported, and another when its function is called."""
    (tmp_path / "trap.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\n"
        f"def spring(*args, **kwargs):\n    open({str(tmp_path / 'called')!r}, 'w')\n"
        "class Spring:\n    def __init__(self, *args, **kwargs):\n        spring()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda: [name for name in ("imported", "called") if (tmp_path / name).exists()]
    sys.modules.pop("trap", None)


NAMED = [
    "!apply:trap.spring [1]",
    "!apply:trap.spring",
    "!new:trap.Spring {a: 1}",
    "!new:trap.Spring",
    "!name:trap.spring {a: 1}",
    "!name:trap.Spring",
    "!module:trap",
    "!applyref:trap.spring [1]",
    "!!python/object/apply:trap.spring [1]",
    "!!python/object/new:trap.Spring [1]",
    "!!python/name:trap.spring",
    "!!python/module:trap",
    "!<tag:yaml.org,2002:python/object/apply:trap.spring> [1]",
    "!apply%3Atrap.spring [1]",
    "!apply:os.system [ls]",
    "!apply:random.seed.__globals__ [1]",
    "!apply:random [1]",
    "!new:subprocess.Popen {args: ls}",
    "!name:builtins.eval",
    "!name:cosyvoice",
    "!name:matcha..spring",
    "!new:omegaconf.OmegaConf",
    "!include:../../secret.yaml",
    "!include:/etc/passwd {a: 1}",
    "!copy <sample_rate>",
    "!PLACEHOLDER",
    "!tuple (1, 2)",
    "!eval 1 + 1",
    "!!set {a}",
    "!!binary aGk=",
    "!!timestamp 2001-01-01",
    "!ref [a]",
]


OF_OTHER_PACKAGES = [  # those of them that are well-formed
    "!new:trap.Spring {a: 1}",
    "!new:trap.Spring",
    "!name:trap.spring {a: 1}",
    "!name:trap.Spring",
    "!name:builtins.eval",
    "!new:subprocess.Popen {args: ls}",
    "!new:omegaconf.OmegaConf",
]


@pytest.mark.parametrize("place", ["sample_rate: {}", "unneeded: {}", "unneeded: [[{} ]]", "sample_rate: {{a: [{} ]}}"])
@pytest.mark.parametrize("value", NAMED)
def test_a_name_outside_the_list_is_refused_wherever_it_stands_and_nothing_is_imported(write, trap, value, place):
    unneeded = not place.startswith("sample_rate")
    path = write(("sample_rate: 1\n" if unneeded else "") + place.format(value) + "\n")
    if unneeded and value in OF_OTHER_PACKAGES:  # never imported, so it may be anything
        assert load_config(path, ["sample_rate"]) == {"sample_rate": 1}
    else:
        with pytest.raises(ConfigError, match=r"cosyvoice\.yaml:\d+: refused"):
            load_config(path, ["sample_rate"])
    assert trap() == []


@pytest.mark.parametrize(
    "other_package",
    [
        "pitch_extractor: !name:torchaudio.functional.compute_kaldi_pitch",
        "audio: !new:funasr.frontends.Frontend {n: 1}",
    ],
)
def test_parts_of_other_packages_that_nothing_needs_are_left_alone(write, other_package):
    path = write(f"{RELEASED_STYLE.read_text()}\n{other_package}\nuses: [!ref <{other_package.partition(':')[0]}>]\n")
    assert without_places(read_config(path)) == without_places(read_config(RELEASED_STYLE))
    with pytest.raises(ConfigError, match=r"refused .*(kaldi|funasr).*this project builds"):
        read_config(path, ["uses"])


@pytest.mark.parametrize("value", NAMED[:18])
def test_the_refusal_says_the_name(write, value):
    name = value.split()[0].replace("!!", "").replace("%3A", ":").strip("!<>")
    with pytest.raises(ConfigError) as refusal:
        load_config(write(f"sample_rate: {value}\n"), ["sample_rate"])
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        "%TAG ! tag:yaml.org,2002:python/object/apply:\n---\nsample_rate: !trap.spring []\n",
        "%TAG !e! !apply:trap.\n---\nsample_rate: !e!spring []\n",
        "%YAML 1.1\n---\nsample_rate: 1\n",
        "sample_rate: 1\n---\nsample_rate: 2\n",
        "a: &x {b: 1}\nsample_rate: *x\n",
        "a: &x [*x]\nsample_rate: 1\n",
        "a: {b: 1}\nsample_rate:\n  <<: {c: 1}\n",
        "sample_rate: 1\nsample_rate: 2\n",
        "? [a]\n: 1\nsample_rate: 1\n",
        "1: 1\nsample_rate: 1\n",
        "? !name:trap.spring\n: 1\nsample_rate: 1\n",
        "? !!str a\n: !apply:trap.spring\nsample_rate: 1\n",
        "sample_rate: " + "[" * 100 + "]" * 100,
        "sample_rate: " + "[" * 100_000,
        "- 1\n- 2\n",
        "just text",
        "",
        "a: [\n",
        "a: \x07\n",
        b"a: \xff\xfe\n",
        "sample_rate: " + "9" * 5000,
        "# " + "x" * MAX_FILE_BYTES,
    ],
)
def test_what_is_no_plain_single_document_is_refused(write, trap, text):
    with pytest.raises(ConfigError, match=r"cosyvoice\.yaml"):
        load_config(write(text), ["sample_rate"])
    assert trap() == []


@pytest.mark.parametrize(
    "reference",
    [
        "<a.__class__>",
        "<a[b]>",
        "<a>/etc",
        "<a> * 9**9**9",
        "a",
        "<>",
        "<<a>>",
        "<a><a>",
        "<missing>",
        "<sample_rate>",
    ],
)
def test_a_reference_is_one_plain_key_that_exists_and_ends(write, reference):
    with pytest.raises(ConfigError, match=r"refused !ref|never end"):
        load_config(write(f"a: {{b: 1}}\nsample_rate: !ref {reference}\n"), ["sample_rate"])


def test_references_that_double_at_each_step_do_not_fill_the_memory(write):
    lines = ["k0: [x, x]"] + [f"k{i}: [!ref <k{i - 1}>, !ref <k{i - 1}>]" for i in range(1, 30)]
    with pytest.raises(ConfigError, match="expand"):
        load_config(write("\n".join(lines)), ["k29"])


def test_a_chain_of_references_has_an_end(write):
    lines = ["k0: 1"] + [f"k{i}: !ref <k{i - 1}>" for i in range(1, 2000)]
    with pytest.raises(ConfigError, match="never end"):
        load_config(write("\n".join(lines)), ["k1999"])


@pytest.mark.parametrize(
    "value",
    [
        "!apply:random.seed [1986]",
        "!new:cosyvoice.llm.llm.Qwen2LM {a: 1}",
        "!new:cosyvoice.utils.file_utils.load_wav {wav: x, target_sr: 16000}",
        "!new:cosyvoice.utils.tensor_file.save_tensors {path: x, content: 1}",
        "!name:cosyvoice.llm.llm.TransformerLM",
        "!new:whisper.tokenizer.get_tokenizer",
        "!new:omegaconf.DictConfig [{a: 1}]",
        "!new:omegaconf.DictConfig text",
        "!new:cosyvoice.dataset.processor.parquet_opener {data: /etc/passwd}",
        "!name:cosyvoice.dataset.processor.soundfile.write {file: x}",
        "!name:cosyvoice.dataset.dataset.read_data_list {path: /etc/passwd}",
    ],
)
def test_a_key_that_is_built_takes_only_the_parts_this_project_builds(write, value):
    for text in (f"sample_rate: {value}\n", f"sample_rate: [!ref <other>]\nother: {value}\n"):
        with pytest.raises(ConfigError, match=r"refused .*(this project builds|unnamed arguments)"):
            load_config(write(text), ["sample_rate"])


def test_a_value_cannot_read_the_environment_through_omegaconf(write):
    text = "sample_rate: !new:omegaconf.DictConfig {content: {home: '${oc.env:HOME}'}}\n"
    with pytest.raises(ConfigError, match="environment"):
        load_config(write(text), ["sample_rate"])


def test_a_scalar_in_parentheses_stays_text(write, trap):
    """HyperPyYAML parses it once more, with a loader that runs python tags."""
    text = "(!!python/object/apply:trap.spring [1])"
    assert load_config(write(f"sample_rate: {text}\n"), ["sample_rate"]) == {"sample_rate": text}
    assert trap() == []


def test_seeding_calls_of_a_released_file_never_run():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with torch.device("meta"):
        load_config(RELEASED_STYLE)
    load_config(RELEASED_STYLE, ["sample_rate", "get_tokenizer"])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_building_modules_draws_from_no_generator_that_others_see(golden_dir):
    before = torch.get_rng_state()
    first = load_config(golden_dir / "small_cosyvoice.yaml")["hift"].conv_pre.bias
    assert torch.equal(before, torch.get_rng_state())
    assert first.abs().sum() > 0, "the module is built as PyTorch builds it"


def test_only_the_wanted_keys_are_built(write):
    path = write("llm: !new:cosyvoice.llm.llm.TransformerLM {nonsense: 1}\nsample_rate: 22050\n")
    assert load_config(path, ["sample_rate"]) == {"sample_rate": 22050}
    with pytest.raises(ConfigError, match=r"yaml:1: cosyvoice\.llm\.llm\.TransformerLM cannot be built.*nonsense"):
        load_config(path, ["llm"])


def test_an_absent_key_is_named_beside_those_there_are(write):
    with pytest.raises(ConfigError, match="no key 'flow', 'hift'; it has sample_rate, llm"):
        load_config(write("sample_rate: 1\nllm: 2\n"), ["llm", "flow", "hift"])


def test_a_missing_file_is_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_config(tmp_path / "cosyvoice.yaml")


def test_two_references_to_one_object_give_one_object(write):
    config = load_config(write("a: !new:omegaconf.DictConfig {content: {b: 1}}\nc: [!ref <a>, !ref <a>]\n"), ["c", "a"])
    assert config["c"][0] is config["c"][1] is config["a"]


def test_the_mel_function_of_released_files_is_ours():
    feat_extractor = load_config(RELEASED_STYLE, ["feat_extractor"])["feat_extractor"]
    assert feat_extractor.func.__module__ == "cosyvoice.utils.audio"
    assert feat_extractor.keywords["sampling_rate"] == 22_050


def test_the_default_keys_are_those_of_the_model_that_are_there(golden_dir):
    assert list(read_config(RELEASED_STYLE)) == list(MODEL_KEYS)
    assert list(read_config(golden_dir / "small_cosyvoice.yaml")) == ["sample_rate", "llm", "flow", "hift"]
    assert isinstance(read_config(RELEASED_STYLE)["llm"], Call)


def test_plain_values_read_as_hyperpyyaml_reads_them(write):
    hyperpyyaml = pytest.importorskip("hyperpyyaml")
    text = """
    numbers: [1, -2, 0x1f, 0o17, 010, 1_000, 1e-06, .5, 3., -1.5e3, .inf, 12e03]
    words: [yes, no, on, True, false, null, ~, 'single', "dou\\tble", plain text, 1.2.3, 1:30]
    block: |
        two
        lines
    nested: {a: {b: [1, {c: !ref <numbers>}]}}
    """
    text = "\n".join(line[4:] for line in text.splitlines())
    keys = ["numbers", "words", "block", "nested"]
    assert load_config(write(text), keys) == hyperpyyaml.load_hyperpyyaml(text)


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_the_300m_configuration_has_the_published_keys_and_shapes(part, golden_dir):
    with torch.device("meta"):
        module = load_config(RELEASED_STYLE, [part])[part]
    published = json.loads((golden_dir / "cosyvoice_300m_state_dict_shapes.json").read_text())[part]
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == published


def without_places(value):
    """A checked value, with no file and line in it."""
    if isinstance(value, Call):
        return value.tag, value.name, without_places(value.arguments)
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    return [without_places(item) for item in value] if isinstance(value, list) else value


def test_the_libritts_configuration_describes_the_released_model():
    assert without_places(read_config(RELEASED_SIZES)) == without_places(read_config(RELEASED_STYLE))


@pytest.mark.parametrize(
    ("path", "schedule"), [(RELEASED_SIZES, "warmuplr"), (TINY_SIZES, "warmupcosine")], ids=["libritts", "tiny"]
)
def test_a_training_configuration_gives_both_pipelines_and_both_trainings(path, schedule):
    built = load_config(path, [*TRAINING_KEYS, "hifigan"] if path == TINY_SIZES else TRAINING_KEYS)
    names = [step.func.__name__ for step in built["data_pipeline"]]
    assert names[:2] == ["parquet_opener", "tokenize"] and names[-2:] == ["batch", "padding"]
    assert {step.func.__name__ for step in built["data_pipeline_gan"]} > {"truncate", "compute_f0"}
    assert built["train_conf"]["scheduler"] == schedule and built["train_conf_gan"]["accum_grad"] == 1


def test_a_model_has_the_pipeline_of_its_own_where_the_configuration_has_one(write):
    assert [pipeline_key(TINY_SIZES, model) for model in ("llm", "flow", "hifigan")] == [
        *("data_pipeline_llm", "data_pipeline", "data_pipeline_gan")
    ]
    assert {pipeline_key(RELEASED_SIZES, model) for model in ("llm", "flow")} == {"data_pipeline"}
    steps = [step.func.__name__ for step in load_config(TINY_SIZES, ["data_pipeline_llm"])["data_pipeline_llm"]]
    assert "frames_of_tokens" in steps and not {"filter", "resample", "compute_fbank"} & set(steps)
    path = write("data_pipeline: []\ndata_pipeline_gan_hifigan: []\n")
    assert [pipeline_key(path, model) for model in ("llm", "hifigan")] == ["data_pipeline", "data_pipeline_gan_hifigan"]


def test_a_key_is_found_without_building_anything(write, trap):
    path = write("llm: !new:cosyvoice.llm.llm.TransformerLM {nonsense: 1}\nnested: {deep: 1}\n")
    assert has_key(path, "llm") and not has_key(path, "deep")
    with pytest.raises(ConfigError):
        has_key(write("llm: !apply:trap.spring\n"), "llm")
    assert trap() == []


def test_the_tiny_configuration_has_the_keys_of_the_released_one():
    tiny, released = (read_config(path, TRAINING_KEYS) for path in (TINY_SIZES, RELEASED_SIZES))
    own = {"cache", "adversarial_from", "scheduler_conf"}
    for key in ("train_conf", "train_conf_gan"):
        assert set(tiny[key]) - own == set(released[key]) - own
