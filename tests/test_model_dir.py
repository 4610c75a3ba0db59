"""Opening a model folder: what loads, what is refused, and what each refusal says."""

import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from small_model_folder import SPEECH_CODES, TEXT_TOKENS, TEXT_WIDTH, deflate, write_small_model_folder

from cosyvoice.utils.config import ConfigError
from cosyvoice.utils.model_dir import (
    ModelDir,
    ModelSizes,
    get_tokenizer,
    load_part,
    load_weights,
    read_torch_file,
    read_weights,
    sizes,
    text_embedding_table,
)

SETUP_COMMAND = "python setup_cosyvoice.py --model-dir"


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory, golden_dir):
    return write_small_model_folder(tmp_path_factory.mktemp("model") / "Small model ü", golden_dir)


@pytest.fixture
def folder(whole_folder, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(whole_folder, tmp_path / "model"))


# ---- what loads


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_a_part_holds_exactly_the_weights_of_its_file(whole_folder, part):
    module = load_part(whole_folder, part)
    weights = torch.load(whole_folder / f"{part}.pt", weights_only=True)
    assert not module.training
    assert module.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_everything_a_part_holds_is_in_its_file(whole_folder, part):
    """Initialisation is skipped while a part is built, so nothing in it may depend on it."""
    module = load_part(whole_folder, part)
    held = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    assert held == module.state_dict().keys()
    plain = [name for child in module.modules() for name, value in vars(child).items() if torch.is_tensor(value)]
    assert plain == []


def test_loading_a_part_leaves_the_random_generator_alone(whole_folder):
    before = torch.get_rng_state()
    load_part(whole_folder, "flow")
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_files_load_as_the_dtype_asked_for(folder):
    weights = torch.load(folder / "flow.pt", weights_only=True)
    torch.save({name: tensor.half() for name, tensor in weights.items()}, folder / "flow.pt")
    for dtype in (torch.float32, torch.bfloat16):
        module = load_part(folder, "flow", dtype=dtype)
        assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
    name = "spk_embed_affine_layer.weight"
    assert torch.equal(load_part(folder, "flow").state_dict()[name], weights[name].half().float())


def test_the_checkpoint_of_a_whole_hifigan_gives_its_generator(folder):
    weights = torch.load(folder / "hift.pt", weights_only=True)
    whole = {f"generator.{name}": tensor for name, tensor in weights.items()}
    torch.save(whole | {"discriminator.mpd.weight": torch.zeros(3)}, folder / "hift.pt")
    assert torch.equal(load_part(folder, "hift").conv_pre.bias, weights["conv_pre.bias"])


def test_files_from_before_zip_archives_load(folder):
    weights = torch.load(folder / "hift.pt", weights_only=True)
    torch.save(weights, folder / "hift.pt", _use_new_zipfile_serialization=False)
    assert torch.equal(load_part(folder, "hift").conv_pre.bias, weights["conv_pre.bias"])


@pytest.mark.parametrize("part", ["llm", "flow", "hift"])
def test_a_compressed_file_gives_the_same_weights(whole_folder, folder, part):
    deflate(whole_folder / f"{part}.pt", folder / f"{part}.pt")
    module = load_part(folder, part).state_dict()
    assert all(torch.equal(tensor, module[name]) for name, tensor in load_part(whole_folder, part).state_dict().items())


def test_one_compressed_record_is_enough_for_a_file_not_to_be_mapped(whole_folder, folder):
    """Adding to a zip archive is what tools do that store a note beside the weights."""
    with zipfile.ZipFile(folder / "llm.pt", "a", zipfile.ZIP_DEFLATED) as archive:
        (prefix,) = {name.partition("/")[0] for name in archive.namelist()}
        archive.writestr(f"{prefix}/note", "a" * 1000)
    assert torch.equal(text_embedding_table(folder), text_embedding_table(whole_folder))


def test_a_compressed_file_is_held_against_the_configuration_and_its_halves_are_refused(folder, tmp_path):
    weights = torch.load(folder / "llm.pt", weights_only=True)
    bias = weights.pop("llm_decoder.bias")
    torch.save(weights | {"extra": bias, "text_embedding.weight": torch.zeros(7, 3)}, tmp_path / "other.pt")
    deflate(tmp_path / "other.pt", folder / "llm.pt")
    with pytest.raises(ValueError, match=r"missing: llm_decoder\.bias.*unexpected: extra.*\[7, 3\] \(configuration"):
        load_part(folder, "llm")
    with pytest.raises(ValueError, match=r"got \[7, 3\]"):
        text_embedding_table(folder)

    content = (folder / "llm.pt").read_bytes()
    for kept in (len(content) // 2, len(content) - 1, 4):
        (folder / "llm.pt").write_bytes(content[:kept])
        with pytest.raises(ValueError, match="truncated, damaged"):
            load_part(folder, "llm")


def test_sizes_come_from_the_configuration(whole_folder):
    assert sizes(whole_folder) == ModelSizes(
        text_vocab=TEXT_TOKENS,
        text_width=TEXT_WIDTH,
        lm_width=32,
        speech_vocab=SPEECH_CODES,
        spk_width=192,
        sample_rate=22_050,
        token_rate=50,
    )


def test_the_text_table_is_the_embedding_of_the_language_model_in_float32(folder):
    weights = torch.load(folder / "llm.pt", weights_only=True)
    table = weights["text_embedding.weight"].half()
    torch.save(weights | {"text_embedding.weight": table}, folder / "llm.pt")
    assert torch.equal(text_embedding_table(folder), table.float())
    assert text_embedding_table(folder).dtype == torch.float32


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the process's memory from /proc")
def test_reading_the_text_table_does_not_read_the_rest_of_the_weights(folder):
    ballast_bytes = 128 << 20
    weights = torch.load(folder / "llm.pt", weights_only=True)
    torch.save(weights | {"ballast": torch.zeros(ballast_bytes // 4)}, folder / "llm.pt")
    del weights
    script = (
        "import re, sys\n"
        "from cosyvoice.utils.model_dir import text_embedding_table\n"
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "text_embedding_table(sys.argv[1])\n"
        "print(peak() - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", script, folder], capture_output=True, text=True, check=True, env=environment
    )
    assert int(run.stdout) << 10 < ballast_bytes / 2


def test_the_tokenizer_gives_the_published_ids(whole_folder, golden_cases):
    tokenizer = get_tokenizer(whole_folder)
    assert len(golden_cases["tokenizer"]) > 0
    for case in golden_cases["tokenizer"]:
        assert tokenizer.encode(case["text"], allowed_special="all") == case["ids"].tolist(), case["text"]


def test_reading_weights_and_sizes_imports_no_other_library():
    heavy = ["onnxruntime", "transformers", "whisper", "modelscope", "matplotlib", "torchaudio", "soundfile"]
    script = f"import sys, cosyvoice.utils.model_dir; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "[]"


# ---- folders that are refused


def test_a_mistyped_folder_is_an_error_that_names_the_command_and_starts_no_download(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        ModelDir("iic/CosyVoice-300M").check()
    assert "iic/CosyVoice-300M does not exist" in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert f"{SETUP_COMMAND} iic/CosyVoice-300M" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_named(folder):
    with pytest.raises(FileNotFoundError, match="is a file, not a folder"):
        ModelDir(folder / "llm.pt").check()


def test_everything_missing_or_broken_is_listed_at_once(folder):
    (folder / "llm.pt").unlink()
    (folder / "campplus.onnx").unlink()
    (folder / "flow.pt").write_bytes(b"")
    (folder / "hift.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FileNotFoundError) as error:
        ModelDir(folder).check()
    for problem in (
        "llm.pt is missing",
        "campplus.onnx is missing",
        "flow.pt is empty",
        "hift.pt is a git-lfs pointer",
    ):
        assert problem in str(error.value)
    assert f"{SETUP_COMMAND} {folder}" in str(error.value)


def test_only_the_files_asked_for_are_looked_at(folder):
    (folder / "speech_tokenizer_v1.onnx").unlink()
    assert ModelDir(folder).check(("cosyvoice.yaml", "llm.pt")).path == folder
    assert load_part(folder, "llm") is not None


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("cosyvoice2.yaml", "llm: 1", "a CosyVoice2 folder"),
        ("cosyvoice3.yaml", "llm: 1", "a CosyVoice3 folder"),
        ("config.json", '{"model_type": "whisper"}', "a transformers folder of type 'whisper'"),
        ("config.json", "[1", "a transformers folder of type 'unknown'"),
    ],
)
def test_a_folder_of_another_model_is_told_apart(tmp_path, name, content, kind):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"is {kind}.*wanted a CosyVoice-300M folder"):
        ModelDir(tmp_path).check()


def test_an_unknown_part_is_an_error(whole_folder):
    with pytest.raises(ValueError, match="llm, flow, hift; got 'vocoder'"):
        load_part(whole_folder, "vocoder")


@pytest.mark.parametrize("value", ["!new:omegaconf.DictConfig {content: {a: 1}}", "22050", "!ref <hift>"])
def test_a_part_that_the_configuration_gives_as_something_else_is_refused(folder, value):
    text = (folder / "cosyvoice.yaml").read_text()
    start, end = text.index("llm: !new:"), text.index("flow: !new:")
    (folder / "cosyvoice.yaml").write_text(f"{text[:start]}llm: {value}\n{text[end:]}")
    with pytest.raises(ConfigError, match=r"llm is a .*wanted a TransformerLM"):
        load_part(folder, "llm")


@pytest.mark.parametrize(
    ("old", "new", "faulty"),
    [
        ("text_token_size: 51866", "text_token_size: 0", "llm.text_token_size"),
        ("    speech_token_size: 64\n", "", "llm.speech_token_size"),
        ("input_frame_rate: 50", "input_frame_rate: 'fifty'", "flow.input_frame_rate"),
    ],
)
def test_a_configuration_without_a_size_says_which(folder, old, new, faulty):
    text = (folder / "cosyvoice.yaml").read_text()
    assert old in text
    (folder / "cosyvoice.yaml").write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=faulty):
        sizes(folder)


# ---- weights that are refused


@pytest.mark.parametrize("kept", [0.9, 0.5, 0.01])
def test_a_truncated_file_is_reported_with_its_size_and_the_command(folder, kept):
    content = (folder / "flow.pt").read_bytes()
    (folder / "flow.pt").write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match="truncated, damaged") as error:
        load_part(folder, "flow")
    assert f"flow.pt ({int(len(content) * kept)} bytes)" in str(error.value)
    assert f"{SETUP_COMMAND} {folder}" in str(error.value)


def test_a_torchscript_archive_is_not_taken_for_a_state_dict(folder):
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "llm.pt"))
    with pytest.raises(ValueError, match=r"llm\.pt is a TorchScript archive"):
        load_part(folder, "llm")


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("payload-ran",))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": Payload()}, "bad.pt", _use_new_zipfile_serialization=zipped)
    Path("plain.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    for name in ("bad.pt", "plain.pt"):
        with pytest.raises(ValueError, match="truncated, damaged, or holds more than tensors"):
            read_torch_file(name)
    assert not Path("payload-ran").exists()


def test_the_published_trainers_counts_are_no_weights(tmp_path):
    torch.save({"weight": torch.ones(2), "epoch": 3, "step": 700}, tmp_path / "llm.pt")
    assert list(read_weights(tmp_path / "llm.pt")) == ["weight"]
    torch.save({"weight": torch.ones(2), "optimizer": {}}, tmp_path / "llm.pt")
    with pytest.raises(ValueError, match=r"a dict in which \['optimizer'\] are no tensors"):
        read_weights(tmp_path / "llm.pt")


@pytest.mark.parametrize("value", [{"epoch": 3, "model": {}}, [torch.zeros(1)], torch.zeros(1)])
def test_something_else_than_a_state_dict_is_said_to_be_so(tmp_path, value):
    torch.save(value, tmp_path / "llm.pt")
    with pytest.raises(ValueError, match="wanted a state dict"):
        read_weights(tmp_path / "llm.pt")


def test_weights_of_another_size_are_counted_and_the_first_are_listed(tmp_path):
    module = torch.nn.ModuleDict({f"layer{i}": torch.nn.Linear(2, 2, bias=False) for i in range(9)})
    weights = {f"layer{i}.weight": torch.zeros(2, 2) for i in range(1, 8)}
    weights |= {"layer8.weight": torch.zeros(3, 2), "extra": torch.zeros(1)}
    torch.save(weights, tmp_path / "llm.pt")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ValueError, match="does not fit ModuleDict") as error:
        load_weights(module, tmp_path / "llm.pt")
    message = str(error.value)
    assert "1 missing: layer0.weight" in message
    assert "1 unexpected: extra" in message
    assert "1 of another shape: layer8.weight [3, 2] (configuration: [2, 2])" in message
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items()), "nothing was loaded"

    torch.save({}, tmp_path / "llm.pt")
    with pytest.raises(ValueError, match=r"9 missing: .*layer4\.weight, and 4 more"):
        load_weights(module, tmp_path / "llm.pt")


def test_one_missing_weight_is_enough_to_refuse_a_part(folder):
    weights = torch.load(folder / "llm.pt", weights_only=True)
    del weights["llm_decoder.bias"]
    torch.save(weights, folder / "llm.pt")
    with pytest.raises(ValueError, match=r"1 missing: llm_decoder\.bias"):
        load_part(folder, "llm")


def test_a_text_table_of_another_shape_than_configured_is_refused(folder):
    weights = torch.load(folder / "llm.pt", weights_only=True)
    torch.save(weights | {"text_embedding.weight": torch.zeros(7, 3)}, folder / "llm.pt")
    with pytest.raises(ValueError, match=rf"got \[7, 3\], cosyvoice.yaml says \[{TEXT_TOKENS}, {TEXT_WIDTH}\]"):
        text_embedding_table(folder)
    del weights["text_embedding.weight"]
    torch.save(weights, folder / "llm.pt")
    with pytest.raises(ValueError, match="got no such table"):
        text_embedding_table(folder)
