import copy
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_taste import CONFIG, write_small_taste, write_speaking_taste

import model_code
from cosyvoice.utils.file_utils import write_wav
from cosyvoice.utils.model_dir import get_tokenizer
from taste.code_files import read_codes
from taste.generation import Sampling
from taste.official import OfficialTaste, build_official, load_taste_checkpoint, tokenize
from taste.official_names import rename, rename_stage1
from taste.released_folder import check_same_sizes, speaker_model_warning
from taste.text import TextTokens
from taste.tokenizer import TasteTokenizer
from taste.words import word_spans
from tests.small_model_folder import write_small_model_folder

TEXT = TextTokens([34542, 5567, 22126, 26914, 49026], [0, 0, 1, 2, 2])
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="session")
def case(golden_dir) -> dict[str, Any]:
    cases = torch.load(golden_dir / "taste" / "small_taste_cases.pt", weights_only=True)
    return cases["end_to_end"]["hf_port"]


@pytest.fixture(scope="session")
def released(case, tmp_path_factory):
    """A small folder in the released layout; treat it as read-only."""
    return write_small_taste(tmp_path_factory.mktemp("taste") / "released", case)


def sound(samples: int) -> torch.Tensor:
    return 0.1 * torch.randn(samples, generator=torch.Generator().manual_seed(0))


def encode(taste: OfficialTaste, waveform: torch.Tensor) -> torch.Tensor:
    """Codes of the words of TEXT."""
    codes = taste.model.encode(taste.batch(TEXT, waveform=waveform))[0]
    return codes[[start for start, _ in word_spans(TEXT.word_ids)]]


# ---- names


def test_every_weight_of_the_released_model_is_accounted_for(golden_dir, released):
    load_taste_checkpoint(released)  # imports what must not be imported on the meta device below
    groups = json.loads((golden_dir / "taste" / "taste_v0_state_dict_shapes.json").read_text())["groups"]
    shapes = {name: shape for group in groups.values() for name, shape in group.items()}
    renamed = rename(list(shapes))
    assert renamed.unknown == []
    assert len(shapes) == 1252
    unused = [name for name in renamed.left_out if name.startswith("audio_tower.vq.rvq.mlps.")]
    assert set(renamed.left_out) - set(unused) == set(groups["spoken_lm_bridge_rest"])
    assert (len(renamed.ours), len(unused), len(groups["spoken_lm_bridge_rest"])) == (819, 54, 379)

    expected = {ours: [] if ours.endswith("initted") else shapes[theirs] for theirs, ours in renamed.ours.items()}
    assert len(expected) == len(renamed.ours)  # no two names became one
    config = copy.deepcopy(CONFIG)
    config["asr_config"] |= {"encoder_attention_heads": 20, "decoder_attention_heads": 20}
    with torch.device("meta"):  # shapes only: the model has 0.9 thousand million weights
        taste = build_official(expected, config)
    assert {name: list(value.shape) for name, value in taste.state_dict().items()} == expected


def test_the_first_stages_names_are_the_released_ones(golden_dir, case):
    cases = torch.load(golden_dir / "taste" / "small_taste_cases.pt", weights_only=True)
    stage1 = cases["end_to_end"]["stage1"]["params"]
    assert sorted(rename_stage1(name) for name, _ in stage1) == sorted(name for name, _ in case["params"])


# ---- a released folder


def test_a_released_folder_opens_and_encodes_and_decodes(released):
    taste = load_taste_checkpoint(released)
    codes = encode(taste, sound(12_000))
    assert codes.shape == (3, 4)
    assert codes.dtype == torch.int64
    assert 0 <= codes.min() <= codes.max() < 16
    speaker = torch.randn(12)
    decoded = taste.model.prefix(taste.batch(TEXT, codes=codes, speaker=speaker))
    heard = taste.model.prefix(taste.batch(TEXT, waveform=sound(12_000), speaker=speaker))
    torch.testing.assert_close(decoded.vectors, heard.vectors)
    assert decoded.lengths.tolist() == [len(TEXT.tokens) + 3]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, golden_dir) -> Path:
    """A CosyVoice folder with the text, units and speakers of the small released one."""
    return write_small_model_folder(tmp_path_factory.mktemp("cosyvoice") / "model", golden_dir)


def test_a_cosyvoice_of_other_sizes_is_refused(case, tmp_path, capsys):
    folder = write_speaking_taste(tmp_path / "released", case)
    (tmp_path / "none.jsonl").write_text('{"audio_path": "none.wav", "text": "None."}')
    words = ["--variant", "taste", "--exp-dir", str(tmp_path / "exp"), "--encode-jsonl", str(tmp_path / "none.jsonl")]
    assert model_code.main([*words, "--taste-checkpoint", str(folder), "--mode", "encode"]) == 1
    told = capsys.readouterr().err
    assert f"the model folder CosyVoice-tiny is not the CosyVoice that {folder} was trained with" in told
    assert "text width 64, expected 24; LM width 192, expected 32; S3 units 4096, expected 64. " in told
    assert "--cosyvoice-model-dir CosyVoice-300M (python setup_cosyvoice.py fetches it)" in told


def test_a_cosyvoice_with_another_unit_rate_is_refused(case, model_dir, tmp_path):
    taste = load_taste_checkpoint(write_speaking_taste(tmp_path / "released", case))
    check_same_sizes(taste.model, "TASTE-V0", model_dir)
    slower = tmp_path / "slower"
    slower.mkdir()
    config = (model_dir / "cosyvoice.yaml").read_text()
    (slower / "cosyvoice.yaml").write_text(config.replace("input_frame_rate: 50", "input_frame_rate: 25"))
    with pytest.raises(ValueError, match=r"trained with: S3 units a second 25, expected 50\. "):
        check_same_sizes(taste.model, "TASTE-V0", slower)


def test_another_speaker_encoder_than_the_released_one_is_told(case, model_dir, tmp_path, capsys):
    folder = write_speaking_taste(tmp_path / "released", case)
    (folder / "cosyvoice").mkdir()
    own, used = folder / "cosyvoice" / "speaker_embed.onnx", model_dir / "campplus.onnx"
    shutil.copy(used, own)
    assert speaker_model_warning(folder, model_dir) is None
    exported = onnx.load(used)
    exported.producer_name = "another file of the same weights"
    onnx.save(exported, own)
    assert speaker_model_warning(folder, model_dir) is None
    TasteTokenizer.open_released(folder, model_dir)
    assert "warning" not in capsys.readouterr().out

    weights = exported.graph.initializer[0]
    weights.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weights) + 1, weights.name))
    for content in (exported.SerializeToString(), b"no ONNX model"):
        own.write_bytes(content)
        TasteTokenizer.open_released(folder, model_dir)
        assert f"warning: {used}, whose speaker vectors are used, is another" in capsys.readouterr().out


def test_a_recording_shorter_than_whispers_window_raises_no_doubts(case, model_dir, tmp_path):
    tokenizer = TasteTokenizer.open_released(write_speaking_taste(tmp_path / "released", case), model_dir)
    recording, text = sound(8_000), "A test."  # 25 of the window's 200 frames
    blurred = tokenizer.encode(recording, text)
    assert len(blurred.doubts) == 1 and "attention is" in blurred.doubts[0]  # random weights find nothing
    for layer in tokenizer.model.aggregator.layers:
        layer.encoder_attn.q_proj.weight.data.mul_(100.0)
    assert tokenizer.encode(recording, text).doubts == []


def test_a_released_folder_is_a_tokenizer_beside_a_cosyvoice_folder(case, model_dir, tmp_path):
    folder = write_speaking_taste(tmp_path / "released", case)
    tokenizer = TasteTokenizer.open_released(folder, model_dir)
    text = "An unbelievably short test."
    spoken = tokenizer.encode(sound(32_000), text)
    assert spoken.words == ["An", "unbelievably", "short", "test."]
    assert spoken.codes.shape == (4, 4)
    sampling = Sampling(method="top_k", top_k=10, max_units_per_token=4)
    waveform = tokenizer.decode(spoken.codes, text, spoken.speaker, sampling)
    assert waveform.dim() == 1
    assert waveform.isfinite().all()
    assert len(waveform) > 0.3 * tokenizer.sample_rate_hz

    write_wav(tmp_path / "one.wav", sound(32_000), 16_000)
    (tmp_path / "one.jsonl").write_text(json.dumps({"audio_path": str(tmp_path / "one.wav"), "text": text}))
    words = ["--variant", "taste", "--device", "cpu", "--exp-dir", str(tmp_path / "exp"), "--max-units-per-token", "4"]
    words += ["--cosyvoice-model-dir", str(model_dir)]
    words += ["--taste-checkpoint", str(folder), "--encode-jsonl", str(tmp_path / "one.jsonl"), "--mode"]
    assert model_code.main([*words, "encode"]) == 0
    assert read_codes(tmp_path / "exp/taste/codes/one.json").codes.tolist() == spoken.codes.tolist()
    assert model_code.main([*words, "decode"]) == 0
    assert (tmp_path / "exp/taste/decoded/one.wav").stat().st_size > 10_000


def test_every_weight_of_the_folder_arrives(released):
    state = load_taste_checkpoint(released).state_dict()
    theirs = load_file(released / WEIGHTS)
    renamed = rename(list(theirs))
    assert sorted(renamed.ours.values()) == sorted(state)
    for name, ours in renamed.ours.items():
        assert state[ours].dtype in (torch.float32, torch.bool)
        assert torch.equal(state[ours].float(), theirs[name].float().reshape(state[ours].shape)), name


def test_what_stands_behind_the_recording_matters_as_published(released):
    # the released weights were trained to look at padded silence
    taste = load_taste_checkpoint(released)
    batch = taste.batch(TEXT, waveform=sound(8_000))
    heard = taste.model.aggregator(
        batch.text, batch.speech_final, batch.speech_mid, batch.text_lengths, torch.tensor([25]), batch.text_tokens
    )
    silent = torch.arange(50)[None, :, None] >= 25
    other = taste.model.aggregator(
        batch.text,
        batch.speech_final.masked_fill(silent, 0.0),
        batch.speech_mid.masked_fill(silent, 0.0),
        batch.text_lengths,
        torch.tensor([25]),
        batch.text_tokens,
    )
    assert not torch.allclose(heard, other)


def test_weights_in_several_files_open_too(released, tmp_path):
    weights = load_file(released / WEIGHTS)
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number + 1:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, tmp_path / file)
        index |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    whole, parts = load_taste_checkpoint(released).state_dict(), load_taste_checkpoint(tmp_path).state_dict()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def test_words_get_a_space_before_them_the_first_one_too():
    tokenizer = get_tokenizer("CosyVoice-tiny")
    text = tokenize(tokenizer, "  Unbelievably  good, isn't it? ")
    assert tokenizer.decode(text.tokens) == " Unbelievably good, isn't it?"
    starts = [place for place, number in enumerate(text.word_ids) if place == 0 or number != text.word_ids[place - 1]]
    assert [tokenizer.decode([text.tokens[place]])[0] for place in starts] == [" "] * 4
    with pytest.raises(ValueError, match="empty"):
        tokenize(tokenizer, " ")


# ---- what is refused


def broken(released, tmp_path, change) -> Any:
    """A copy of the folder whose weights and configuration were changed."""
    weights, config = load_file(released / WEIGHTS), copy.deepcopy(CONFIG)
    change(weights, config)
    save_file(weights, tmp_path / WEIGHTS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_missing_folder_or_another_kind_of_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no TASTE folder: there is no .*config.json; get MediaTek"):
        load_taste_checkpoint(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(ValueError, match="describes 'whisper', expected a TASTE model"):
        load_taste_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_taste_checkpoint(tmp_path)


def test_a_folder_without_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor .*; get MediaTek"):
        load_taste_checkpoint(tmp_path)


def test_a_shard_that_is_missing_is_named_with_where_to_get_it(released, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    shards = {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    shutil.copy(released / WEIGHTS, tmp_path / "model-2.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks model-1\.safetensors, which .*; get MediaTek"):
        load_taste_checkpoint(tmp_path)


def test_a_missing_weight_is_an_error(released, tmp_path):
    def drop(weights, config):
        del weights["speech_decoder.llm.encoders.1.norm2.bias"]

    with pytest.raises(ValueError, match=r"1 weights .* model.llm.llm.encoders.1.norm2.bias is missing"):
        load_taste_checkpoint(broken(released, tmp_path, drop))


def test_a_missing_weight_that_sizes_come_from_is_an_error(released, tmp_path):
    def drop(weights, config):
        del weights["speech_decoder.llm_embedding.weight"]

    with pytest.raises(ValueError, match=r"model.llm.llm_embedding.weight is missing"):
        load_taste_checkpoint(broken(released, tmp_path, drop))


def test_an_unknown_weight_is_an_error(released, tmp_path):
    def add(weights, config):
        weights["vocoder.weight"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"1 weights that no TASTE model has: vocoder.weight"):
        load_taste_checkpoint(broken(released, tmp_path, add))


def test_a_weight_of_a_known_part_that_the_part_has_not_is_an_error(released, tmp_path):
    def add(weights, config):
        weights["speech_decoder.audio_extra.weight"] = torch.zeros(1)

    with pytest.raises(ValueError, match=r"model.audio_branch.audio_extra.weight is unknown"):
        load_taste_checkpoint(broken(released, tmp_path, add))


def test_a_weight_of_another_shape_is_an_error(released, tmp_path):
    def cut(weights, config):
        weights["speech_decoder.llm_decoder.bias"] = torch.zeros(7)

    with pytest.raises(ValueError, match=r"model.llm.llm_decoder.bias is \[7\], expected \[51\]"):
        load_taste_checkpoint(broken(released, tmp_path, cut))


def test_a_truncated_file_is_an_error(released, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / WEIGHTS).write_bytes((released / WEIGHTS).read_bytes()[:5000])
    with pytest.raises(ValueError, match="truncated, or no safetensors file"):
        load_taste_checkpoint(tmp_path)


def test_what_is_not_implemented_is_refused_all_at_once(released, tmp_path):
    def ask(weights, config):
        config["audio_tower_config"]["kwargs_for_joint_encoder_segmenter"]["forward_type"] = "add"
        config["speech_decoder_config"]["fuse_encoded_audio_text_type"] = "concat"

    with pytest.raises(ValueError, match=r"forward_type is 'add'.*asr_attn_pooling.*_type is 'concat'"):
        load_taste_checkpoint(broken(released, tmp_path, ask))


def test_entries_that_are_the_published_defaults_may_be_left_out(released, tmp_path):
    def shorten(weights, config):
        del config["asr_config"]
        config["speech_decoder_config"] = {
            name: value for name, value in config["speech_decoder_config"].items() if name.startswith("fuse_")
        }
        del config["audio_tower_config"]["encoder__target_hidden_layer"]

    whole, short = load_taste_checkpoint(released), load_taste_checkpoint(broken(released, tmp_path, shorten))
    assert torch.equal(encode(short, sound(12_000)), encode(whole, sound(12_000)))
    assert short.mid_layer == whole.mid_layer


def test_the_fusion_must_be_named(released, tmp_path):
    def drop(weights, config):
        del config["speech_decoder_config"]["fuse_encoded_audio_text_type"]

    with pytest.raises(ValueError, match=r"fuse_encoded_audio_text_type is None \(implemented: 'weighted_sum'\)"):
        load_taste_checkpoint(broken(released, tmp_path, drop))


def test_codes_of_another_text_are_refused(released):
    taste = load_taste_checkpoint(released)
    with pytest.raises(ValueError, match="codes of 2 words, the text has 3"):
        taste.batch(TEXT, codes=torch.zeros(2, 4, dtype=torch.int64))


def test_a_recording_that_is_too_long_is_refused(released):
    with pytest.raises(ValueError, match="1 to 16000 samples"):
        encode(load_taste_checkpoint(released), sound(16_001))
