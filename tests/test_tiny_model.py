"""The embedded model folder, and the script that makes such folders, small and at the published sizes."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from s3tokenizer.model import ModelConfig, S3Tokenizer

from cosyvoice.utils.audio import speaker_fbank
from cosyvoice.utils.config import load_config
from cosyvoice.utils.model_dir import ModelDir, load_part, sizes
from cosyvoice.utils.onnx_session import OnnxSession
from taste.manifest import Utterance, read_manifest
from taste.s3_units import open_extractor, read_recording
from taste.speaker import SpeakerEncoder
from taste.threads import torch_threads_kept
from taste.whisper_encoder import WhisperEncoder
from utt2text_and_feature import MID_LAYER

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "CosyVoice-tiny"
PARTS = ("llm", "flow", "hift")
VOICES = ("kal16", "awb", "rms", "slt")
NUM_LAYERS = 6  # of the released S3 tokenizer


@pytest.fixture
def make_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "CosyVoice" / "examples" / "tiny"))
    with torch_threads_kept():  # the script works with one
        yield importlib.import_module("make_model")


@pytest.fixture(scope="module")
def utterances() -> list[Utterance]:
    return read_manifest(REPOSITORY / "json" / "test.jsonl")


# ---- the folder in the repository


def test_folder_has_the_released_files_and_stays_small() -> None:
    ModelDir(TINY).check()
    files = [path for path in TINY.rglob("*") if path.is_file()]
    names = {path.relative_to(TINY).as_posix() for path in files}
    assert {"spk2info.pt", "README.md", "whisper/config.json", "whisper/preprocessor_config.json"} <= names
    assert max(path.stat().st_size for path in files) <= 12_000_000
    assert sum(path.stat().st_size for path in files) <= 30_000_000


def test_sizes_are_the_released_ones_where_stages_depend_on_them() -> None:
    found = sizes(TINY)
    assert (found.text_vocab, found.speech_vocab, found.spk_width) == (51_866, 4096, 192)
    assert (found.sample_rate, found.token_rate) == (22_050, 50)


def test_units_become_finite_sound(utterances: list[Utterance]) -> None:
    waveform = read_recording(utterances[0].audio_path)
    units = open_extractor(TINY / "speech_tokenizer_v1.onnx").extract([waveform])
    speaker = torch.load(TINY / "spk2info.pt", weights_only=True)["slt"]["embedding"]
    none = torch.zeros(1, 0, dtype=torch.int32)
    no_length = torch.zeros(1, dtype=torch.int32)
    flow, hift = load_part(TINY, "flow"), load_part(TINY, "hift")
    mel, _ = flow.inference(
        *(torch.tensor(units), torch.tensor([len(units[0])]), none, no_length),
        *(torch.zeros(1, 0, 80), no_length, speaker, torch.zeros(1, 80, 0, 2)),
    )
    sound, _ = hift.inference(mel, torch.zeros(1, 1, 0))
    assert sound.isfinite().all()
    assert abs(sound.shape[-1] / 22_050 - len(waveform) / 16_000) < 0.03


def test_whisper_hears_more_than_positions(utterances: list[Utterance]) -> None:
    waveforms = [read_recording(utterance.audio_path) for utterance in utterances[:2]]
    encoder = WhisperEncoder(TINY / "whisper", MID_LAYER)
    for a, b in zip(*encoder.encode(waveforms), strict=True):  # mid and final states of the two
        frames = min(len(a), len(b))
        assert torch.nn.functional.cosine_similarity(a[:frames], b[:frames], dim=-1).mean() < 0.6


def test_speaker_vectors_tell_the_four_voices_apart(utterances: list[Utterance]) -> None:
    utterances = [*utterances, *read_manifest(REPOSITORY / "json" / "train.jsonl")]  # 15 would be left to chance
    speakers = torch.load(TINY / "spk2info.pt", weights_only=True)
    assert set(list(speakers)[: len(VOICES)]) == set(VOICES)  # the pseudo-speakers of the corpus follow
    assert all(entry["embedding"].shape == (1, 192) for entry in speakers.values())
    known = torch.nn.functional.normalize(torch.cat([speakers[voice]["embedding"] for voice in VOICES]), dim=1)
    encoder = SpeakerEncoder(TINY / "campplus.onnx")
    guesses = [VOICES[int((known @ encoder.embed(read_recording(u.audio_path))).argmax())] for u in utterances]
    correct = sum(guess == u.speaker for guess, u in zip(guesses, utterances, strict=True))
    assert correct >= 0.8 * len(utterances)  # a guess is right once in four


# ---- the script


def test_full_size_configuration_has_the_published_keys_and_shapes(
    make_model: ModuleType, golden_dir: Path, tmp_path: Path
) -> None:
    published = json.loads((golden_dir / "cosyvoice_300m_state_dict_shapes.json").read_text())
    make_model.write_config(tmp_path / "cosyvoice.yaml", "300m", make_model._FULL)
    for part in PARTS:
        with torch.device("meta"):
            module = load_config(tmp_path / "cosyvoice.yaml", [part])[part]
        assert {key: list(value.shape) for key, value in module.state_dict().items()} == published[part]


def test_speech_tokenizer_file_has_the_released_inputs_and_names(make_model: ModuleType, tmp_path: Path) -> None:
    mels = [torch.randn(128, 300, generator=torch.Generator().manual_seed(number)) for number in range(2)]
    size = replace(make_model._TINY, s3_layers=NUM_LAYERS)
    path = tmp_path / "speech_tokenizer_v1.onnx"
    make_model.write_speech_tokenizer(path, size, mels, seed=1)

    graph = onnx.load(path).graph
    shapes = [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input]
    kinds = [value.type.tensor_type.elem_type for value in graph.input]
    assert shapes == [[1, 128, 0], [1]]  # 0: any length
    assert kinds == [onnx.TensorProto.FLOAT, onnx.TensorProto.INT32]
    assert {f"onnx::Conv_{number}" for number in range(1519, 1523)} <= {weight.name for weight in graph.initializer}
    names = {node.name for node in graph.node}
    assert "/quantizer/rq/model/layers.0/_codebook/Pow_1" in names
    for layer in range(NUM_LAYERS):
        for part in ("attn/query/MatMul", "attn/key/MatMul", "attn/out/Add", "mlp/mlp.2/MatMul", "mlp_ln/Add_1"):
            assert f"/blocks.{layer}/{part}" in names

    config = ModelConfig(n_audio_state=128, n_audio_head=2, n_audio_layer=NUM_LAYERS)
    model = S3Tokenizer("speech_tokenizer_v1", config)
    model.init_from_onnx(str(path))  # strict: every name is found, every shape fits
    assert all(value.any() for key, value in model.state_dict().items() if key.endswith(("weight", "embed")))


def test_speech_tokenizer_file_computes_what_s3tokenizer_computes(make_model: ModuleType, tmp_path: Path) -> None:
    from s3_tokenizer_onnx import build_speech_tokenizer

    torch.manual_seed(0)
    model = S3Tokenizer("speech_tokenizer_v1", ModelConfig(n_audio_state=128, n_audio_head=2, n_audio_layer=2)).eval()
    mels = [torch.randn(128, 200) for _ in range(3)]
    with torch.no_grad():
        for weight in model.parameters():  # everything matters: attention, biases, norms
            weight.copy_(torch.randn_like(weight) * (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.5))
        states = torch.cat([model.encoder(mel[None], torch.tensor([200]))[0][0] for mel in mels])
        codes = torch.randn(4096, 128)
        codes[: len(states)] = states  # each state near a code of its own
        model.quantizer._codebook.embed.copy_(torch.nn.functional.normalize(codes, dim=1))
    path = tmp_path / "speech_tokenizer_v1.onnx"
    onnx.save(build_speech_tokenizer(model.state_dict(), num_heads=2), path)
    session = OnnxSession(path)
    for mel in mels:
        for num_frames in (1, 60, 121, 200):
            expected, _ = model.quantize(mel[None, :, :num_frames], torch.tensor([num_frames]))
            units = session.run(mel[None].numpy(), np.array([num_frames], dtype=np.int32))  # frames past it are ignored
            assert units.shape == (1, 100)
            assert units[0, : -(-num_frames // 2)].tolist() == expected[0].tolist()


def test_speaker_file_averages_over_time(make_model: ModuleType, utterances: list[Utterance], tmp_path: Path) -> None:
    from speaker_onnx import build_speaker_encoder

    fbanks = [speaker_fbank(read_recording(item.audio_path)) for item in utterances[:4]]
    onnx.save(build_speaker_encoder(fbanks, seed=3), tmp_path / "campplus.onnx")
    graph = onnx.load(tmp_path / "campplus.onnx").graph
    assert ([value.name for value in graph.input], [value.name for value in graph.output]) == (["input"], ["output"])
    encoder = SpeakerEncoder(tmp_path / "campplus.onnx")
    vectors = [encoder.embed(read_recording(item.audio_path)) for item in utterances[:4]]
    assert {vector.shape for vector in vectors} == {(192,)}
    torch.testing.assert_close(torch.stack(vectors).mean(dim=0), torch.zeros(192), atol=1e-3, rtol=0)


def test_same_seed_gives_the_same_files(make_model: ModuleType, tmp_path: Path) -> None:
    mels = [torch.randn(128, 300, generator=torch.Generator().manual_seed(number)) for number in range(2)]
    contents = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        folder = tmp_path / name
        folder.mkdir()
        make_model.write_config(folder / "cosyvoice.yaml", "tiny", make_model._TINY)
        make_model.write_speech_tokenizer(folder / "s3.onnx", make_model._TINY, mels, seed)
        make_model.write_part(folder, "hift", make_model._TINY, seed)
        hift = torch.load(folder / "hift.pt", weights_only=True)
        contents.append(((folder / "s3.onnx").read_bytes(), hift["conv_post.bias"].tolist()))
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0]
    assert contents[0][1] != contents[2][1]


def test_an_existing_folder_is_not_replaced_unasked(
    make_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("kept")
    assert make_model.main(["--output", str(tmp_path / "model")]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine.txt"]


def test_a_size_that_there_is_not_is_wrong_usage(
    make_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_model.main(["--output", str(tmp_path / "model"), "--size", "500m"]) == 2
    assert "'500m'; expected one of tiny, 300m" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_corpus_is_an_error_that_leaves_nothing_behind(
    make_model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make_model.main(["--output", str(tmp_path / "model"), "--manifest", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tiny_folder_is_built_whole_and_loads_strictly(make_model: ModuleType, tmp_path: Path) -> None:
    assert make_model.main(["--output", str(tmp_path / "model"), "--seed", "3"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]  # nothing unfinished is left
    ModelDir(tmp_path / "model").check()
    for part in PARTS:
        module = load_part(tmp_path / "model", part)
        assert all(value.isfinite().all() for value in module.state_dict().values())
    llm = load_part(tmp_path / "model", "llm")
    batch = {
        "text_token": torch.randint(0, 51_866, (1, 12), generator=torch.Generator().manual_seed(0)),
        "text_token_len": torch.tensor([12]),
        "speech_token": torch.randint(0, 4096, (1, 60), generator=torch.Generator().manual_seed(1)),
        "speech_token_len": torch.tensor([60]),
        "embedding": torch.randn(1, 192, generator=torch.Generator().manual_seed(2)),
    }
    assert llm(batch, torch.device("cpu"))["loss"].item() == pytest.approx(np.log(4097), abs=0.1)
