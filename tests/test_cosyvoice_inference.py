"""Laws of bin/inference.py: what it says, with whose voice, and what it does when run again."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from cosyvoice.bin import inference
from cosyvoice.utils.config import load_config

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "CosyVoice/examples/tiny/conf/cosyvoice.yaml"
SAMPLE_RATE_HZ = 16_000
TEXTS = {"one": ["Yes.", "No."], "three": ["Oh."]}
KEYS = ["one_0", "one_1", "three_0"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model folder at the tiny recipe's sizes, untrained; HiFT's file is a checkpoint of its adversarial training."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    parts = load_config(CONFIG, ["llm", "flow", "hift"])
    states = {name: module.state_dict() for name, module in parts.items()}
    states["hift"] = {f"generator.{name}": value for name, value in states["hift"].items()}
    states["hift"]["discriminator.mpd.weight"] = torch.zeros(1)
    for name, state in states.items():
        torch.save(state, folder / f"{name}.pt")
    (folder / "cosyvoice.yaml").write_bytes(CONFIG.read_bytes())
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """Two shards of two utterances, with the lists that make_parquet_list.py writes."""
    folder = tmp_path_factory.mktemp("parquet")
    draw = np.random.default_rng(0)
    utt2data = []
    for number, utts in enumerate((["one", "two"], ["three", "long"])):
        rows = []
        for utt in utts:
            sound = io.BytesIO()
            seconds = 8 if utt == "long" else 0.5
            samples = draw.normal(0, 0.1, int(seconds * SAMPLE_RATE_HZ))
            soundfile.write(sound, samples, SAMPLE_RATE_HZ, format="FLAC")
            rows.append(
                {
                    "utt": utt,
                    "wav": f"{utt}.flac",
                    "audio_data": sound.getvalue(),
                    "text": "no " * 201 if utt == "long" else "no",
                    "spk": "a",
                    "utt_embedding": draw.normal(size=192).tolist(),
                    "spk_embedding": draw.normal(size=192).tolist(),
                    "speech_token": draw.integers(0, 4096, int(50 * seconds)).tolist(),
                }
            )
        shard = folder / f"parquet_{number}.tar"
        pq.write_table(pa.Table.from_pylist(rows), shard)
        utt2data.append(folder / f"utt2parquet_{number}.json")
        utt2data[-1].write_text(json.dumps(dict.fromkeys(utts, str(shard))))
    (folder / "data.list").write_text("".join(f"{folder}/parquet_{number}.tar\n" for number in range(2)))
    (folder / "utt2data.list").write_text("".join(f"{path}\n" for path in utt2data))
    return folder


@pytest.fixture
def arguments(weights, prompts, tmp_path):
    texts = tmp_path / "tts_text.json"
    texts.write_text(json.dumps(TEXTS))
    return [
        *("--model_dir", str(weights), "--result_dir", str(tmp_path / "said"), "--tts_text", str(texts)),
        *("--prompt_data", f"{prompts}/data.list", "--prompt_utt2data", f"{prompts}/utt2data.list"),
    ]


def wav_bytes(folder):
    return {path.stem: path.read_bytes() for path in folder.glob("*.wav")}


def test_published_command_line_says_every_text(weights, prompts, tmp_path):
    texts = tmp_path / "tts_text.json"
    texts.write_text(json.dumps(TEXTS))
    command = [
        *(sys.executable, REPOSITORY / "CosyVoice/cosyvoice/bin/inference.py", "--mode", "sft", "--gpu", "-1"),
        *("--config", CONFIG, "--prompt_data", prompts / "data.list", "--prompt_utt2data", prompts / "utt2data.list"),
        *("--tts_text", texts, "--llm_model", weights / "llm.pt", "--flow_model", weights / "flow.pt"),
        *("--hifigan_model", weights / "hift.pt", "--result_dir", tmp_path / "said"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    said = tmp_path / "said"
    assert (said / "wav.scp").read_text() == "".join(f"{key} {said}/{key}.wav\n" for key in KEYS)
    for key in KEYS:
        samples, rate = soundfile.read(said / f"{key}.wav")
        assert rate == 22_050 and len(samples) > 1000 and np.abs(samples).max() > 0


def test_zero_shot_goes_on_from_the_utterance_and_sft_from_its_speaker():
    prompt = {name: torch.tensor([[number]]) for number, name in enumerate(["text_token", "speech_token"])}
    prompt |= {name: torch.full((1, 192), number) for number, name in enumerate(["utt_embedding", "spk_embedding"])}
    prompt["speech_feat"] = torch.zeros(1, 3, 80)
    sft = inference.model_input("sft", [5, 6], prompt)
    assert sft["text"].tolist() == [[5, 6]]
    assert sft["llm_embedding"] is sft["flow_embedding"] is prompt["spk_embedding"]
    assert set(sft) == {"text", "llm_embedding", "flow_embedding"}
    zero_shot = inference.model_input("zero_shot", [5, 6], prompt)
    assert zero_shot["llm_embedding"] is zero_shot["flow_embedding"] is prompt["utt_embedding"]
    assert zero_shot["prompt_text"] is prompt["text_token"]
    assert zero_shot["llm_prompt_speech_token"] is zero_shot["flow_prompt_speech_token"] is prompt["speech_token"]
    assert zero_shot["prompt_speech_feat"] is prompt["speech_feat"]


def test_resumed_run_gives_what_an_uninterrupted_one_gives(arguments, tmp_path, monkeypatch):
    zero_shot = ["--mode", "zero_shot"]
    assert inference.main([*arguments, *zero_shot]) == 0
    whole = wav_bytes(tmp_path / "said")
    assert sorted(whole) == KEYS

    (tmp_path / "said/one_1.wav").unlink()
    (tmp_path / "said/wav.scp").unlink()
    kept = (tmp_path / "said/one_0.wav").stat().st_mtime_ns
    assert inference.main([*arguments, *zero_shot]) == 0
    assert wav_bytes(tmp_path / "said") == whole
    assert (tmp_path / "said/one_0.wav").stat().st_mtime_ns == kept

    monkeypatch.setattr(inference, "_say", None)  # nothing is left to be said
    assert inference.main([*arguments, *zero_shot]) == 0


def test_changed_text_is_said_again_and_another_model_is_refused(arguments, tmp_path, capsys):
    texts = tmp_path / "tts_text.json"
    texts.write_text(json.dumps({"one": ["Yes."]}))
    assert inference.main(arguments) == 0
    before = wav_bytes(tmp_path / "said")
    texts.write_text(json.dumps({"one": ["Perhaps."]}))
    assert inference.main(arguments) == 0
    assert wav_bytes(tmp_path / "said") != before
    assert inference.main([*arguments, "--seed", "7"]) == 1
    assert "seed: 1986 then, 7 now" in capsys.readouterr().err


def test_texts_are_said_again_when_their_prompts_have_changed(arguments, prompts, tmp_path):
    assert inference.main(arguments) == 0
    whole = wav_bytes(tmp_path / "said")
    times = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "said").glob("*.wav")}
    shard = prompts / "parquet_0.tar"
    rows = pq.read_table(shard).to_pylist()
    changed = [row | {"spk_embedding": row["spk_embedding"][::-1]} for row in rows]
    try:
        pq.write_table(pa.Table.from_pylist(changed), shard)
        assert inference.main(arguments) == 0
    finally:
        pq.write_table(pa.Table.from_pylist(rows), shard)
    again = {path.stem for path in (tmp_path / "said").glob("*.wav") if path.stat().st_mtime_ns != times[path.stem]}
    assert again == {key for key in whole if key.rsplit("_", 1)[0] in {row["utt"] for row in rows}}


def test_stop_keeps_what_is_finished_and_writes_no_list(arguments, tmp_path, monkeypatch, capsys):
    write = inference.write_wav

    def write_and_stop(*args):
        write(*args)
        os.kill(os.getpid(), 15)

    monkeypatch.setattr(inference, "write_wav", write_and_stop)
    assert inference.main(arguments) == 143
    assert list(wav_bytes(tmp_path / "said")) == ["one_0"]
    assert not (tmp_path / "said/wav.scp").exists()
    assert "goes on" in capsys.readouterr().err


def test_utterance_that_the_pipeline_drops_is_named_and_the_others_are_said(arguments, tmp_path, capsys):
    (tmp_path / "tts_text.json").write_text(json.dumps({"long": ["Yes."], "three": ["Oh."]}))
    assert inference.main(arguments) == 3
    assert "not said: long_0" in (err := capsys.readouterr().err) and "over 200 text tokens" in err
    assert (tmp_path / "said/wav.scp").read_text() == f"three_0 {tmp_path}/said/three_0.wav\n"


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"one": ["Yes."], "nobody": ["No."]}, "1 utterances of --tts_text are in no shard.*nobody"),
        ({"one": "Yes."}, "expected a list of texts"),
        ({"one": [" "]}, "none of them empty"),
        ({"../one": ["Yes."]}, "cannot name a file"),
        ({}, "expected {utterance"),
        ({"one": []}, "no utterance has a text"),
    ],
)
def test_texts_that_cannot_be_said_are_refused(arguments, tmp_path, capsys, texts, message):
    (tmp_path / "tts_text.json").write_text(json.dumps(texts))
    assert inference.main(arguments) == 1
    assert re.search(message, capsys.readouterr().err)


def test_all_missing_settings_are_said_at_once(capsys, tmp_path):
    assert inference.main(["--mode", "instruct", "--llm_model", str(tmp_path / "none.pt")]) == 1
    err = capsys.readouterr().err
    for problem in ("--prompt_data is missing", "--config is missing", "none.pt", "'instruct', expected sft or zero"):
        assert problem in err


def test_configuration_without_a_data_pipeline_says_which_one_to_give(arguments, weights, tmp_path, capsys):
    config = tmp_path / "cosyvoice.yaml"
    lines = CONFIG.read_text().splitlines()
    config.write_text("\n".join(lines[: next(n for n, line in enumerate(lines) if line.startswith("data_pipeline:"))]))
    assert inference.main([*arguments, "--config", str(config)]) == 1
    assert "no key 'data_pipeline'" in (err := capsys.readouterr().err) and "--config wants a recipe's file" in err
