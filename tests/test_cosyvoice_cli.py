"""CosyVoice from a folder to sound: every way of speaking, whole and streamed, and every way it goes wrong."""

import io
import os
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from small_model_folder import NAMED_SPEAKER, write_small_model_folder

from cosyvoice.cli.cosyvoice import AutoModel, CosyVoice
from cosyvoice.cli.model import CosyVoiceModel
from cosyvoice.cli.token_stream import TokenStream
from cosyvoice.utils.config import ConfigError
from cosyvoice.utils.file_utils import load_wav
from cosyvoice.utils.onnx_session import OnnxSession

REPOSITORY = Path(__file__).parents[1]
SAMPLES_PER_FRAME = 256
CHUNK_TOKENS, OVERLAP_TOKENS, OVERLAP_FRAMES, CACHE_FRAMES = 100, 20, 34, 20
TEXT = "We speak a sentence that is long enough to be streamed."
PROMPT_TEXT = "What the prompt says."
MODES = ["sft", "zero_shot", "cross_lingual", "instruct", "vc"]


class SeededSampler:
    """Draws with a generator of its own, so that tokens do not depend on the flow's noise; by default never the end."""

    def __init__(self, fail_at: int | None = None, pause_at: int | None = None, may_end: bool = False):
        self.generator = torch.Generator().manual_seed(7)
        self.fail_at, self.pause_at, self.may_end = fail_at, pause_at, may_end
        self.go_on = threading.Event()
        self.drawn = 0

    def __call__(self, log_prob, decoded, sampling):
        self.drawn += 1
        if self.drawn == self.fail_at:
            raise ZeroDivisionError("the sampler broke")
        if self.drawn == self.pause_at:
            self.go_on.wait(60)
        choices = log_prob if self.may_end else log_prob[:-1]
        return int(choices.softmax(dim=0).multinomial(1, generator=self.generator))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden_dir):
    return write_small_model_folder(tmp_path_factory.mktemp("models") / "small", golden_dir)


@pytest.fixture(scope="module")
def loaded(folder):
    return CosyVoice(folder, device="cpu")


@pytest.fixture
def cosy(loaded):
    """The model with a sampler that draws the same tokens in every test."""
    published = loaded.model.llm.sampling
    loaded.model.llm.sampling = SeededSampler()
    yield loaded
    loaded.model.llm.sampling = published
    assert loaded.model.sessions == {}, "a session outlived its utterance"
    assert writing_threads() == [], "a writing thread outlived its utterance"


def write_tone(path: Path, seconds: float, rate: int, channels: int = 1) -> Path:
    """A chirp with noise, which has different mels at different moments."""
    times = np.arange(int(seconds * rate)) / rate
    noise = np.random.default_rng(3).standard_normal(len(times))
    wave = 0.3 * np.sin(2 * np.pi * (150 + 80 * times) * times) + 0.02 * noise
    soundfile.write(path, np.repeat(wave[:, None], channels, axis=1), rate, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def prompt_wav(tmp_path_factory):
    return write_tone(tmp_path_factory.mktemp("prompt") / "prompt with spaces ü.wav", 1.7, 16_000)


@pytest.fixture(scope="module")
def source_wav(tmp_path_factory):
    return write_tone(tmp_path_factory.mktemp("source") / "source.wav", 5.3, 16_000)


@pytest.fixture
def speak(cosy, prompt_wav, source_wav):
    def speak_in(mode: str, text: str = TEXT, **options):
        return {
            "sft": lambda: cosy.inference_sft(text, NAMED_SPEAKER, **options),
            "zero_shot": lambda: cosy.inference_zero_shot(text, PROMPT_TEXT, prompt_wav, **options),
            "cross_lingual": lambda: cosy.inference_cross_lingual(text, prompt_wav, **options),
            "instruct": lambda: cosy.inference_instruct(text, NAMED_SPEAKER, "Calmly.<|endofprompt|>", **options),
            "vc": lambda: cosy.inference_vc(source_wav, prompt_wav, **options),
        }[mode]()

    return speak_in


@pytest.fixture
def heard(cosy, monkeypatch):
    """Every list of tokens that becomes sound, with its `finalize`."""
    calls = []
    real = cosy.model.token2wav

    def token2wav(token, *args, **kwargs):
        calls.append((token[0].tolist(), kwargs["finalize"]))
        return real(token, *args, **kwargs)

    monkeypatch.setattr(cosy.model, "token2wav", token2wav)
    return calls


def writing_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("cosyvoice-llm")]


def mel_frames(tokens: int) -> int:
    return int(tokens / 50 * 22_050 / 256)


def sound(chunks) -> torch.Tensor:
    return torch.cat([chunk["tts_speech"] for chunk in chunks], dim=1)


# ---- speaking


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_makes_sound_of_its_tokens_length(speak, heard, mode, stream):
    chunks = [chunk["tts_speech"] for chunk in speak(mode, stream=stream)]
    speech = torch.cat(chunks, dim=1)
    frames = sum(mel_frames(len(tokens)) - (0 if last else OVERLAP_FRAMES) for tokens, last in heard)
    assert speech.shape == (1, frames * SAMPLES_PER_FRAME)
    assert speech.dtype == torch.float32 and speech.isfinite().all() and speech.std() > 0
    assert len(chunks) == len(heard) and (len(chunks) > 1) == stream
    assert [last for _, last in heard] == [False] * (len(heard) - 1) + [True]


@pytest.mark.parametrize("mode", MODES)
def test_streamed_and_whole_speech_are_made_of_the_same_tokens(cosy, speak, heard, mode):
    list(speak(mode, stream=False))
    whole = heard.pop()[0]
    cosy.model.llm.sampling = SeededSampler()
    list(speak(mode, stream=True))
    assert all(len(tokens) == CHUNK_TOKENS + OVERLAP_TOKENS for tokens, last in heard if not last)
    assert [token for tokens, last in heard for token in (tokens if last else tokens[:CHUNK_TOKENS])] == whole


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("speed", [0.5, 2.0])
def test_speed_divides_the_length(speak, speed, stream):
    plain = sound(speak("vc", stream=stream)).shape[1]
    changed = sound(speak("vc", stream=stream, speed=speed)).shape[1]
    frames_rounded_off = 3 * SAMPLES_PER_FRAME  # one for each chunk
    assert abs(changed - plain / speed) <= frames_rounded_off


@pytest.mark.parametrize("speed", [0.0, -1.0, 9.0, float("nan")])
def test_an_impossible_speed_is_an_error(speak, speed):
    with pytest.raises(ValueError, match="speed must be over 0 and at most 8"):
        list(speak("vc", speed=speed))


def test_the_fastest_speed_can_be_streamed(speak):
    assert sound(speak("vc", stream=True, speed=8.0)).shape[1] > 0


@pytest.mark.parametrize("tokens", [50, CHUNK_TOKENS + OVERLAP_TOKENS, 235])
@pytest.mark.parametrize("even_seams", [False, True])
def test_streamed_chunks_follow_the_published_arithmetic(loaded, tokens, even_seams):
    """The published loop written out straight: 100 new tokens and 20 of overlap, both ends of each seam faded."""
    llm, flow, hift = loaded.model.llm, loaded.model.flow, loaded.model.hift
    model = CosyVoiceModel(llm, flow, hift, device=loaded.model.device, even_seams=even_seams)
    source = torch.randint(0, 64, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    embedding = torch.randn(1, 192, generator=torch.Generator().manual_seed(1))
    no_tokens, no_mel = torch.zeros(1, 0, dtype=torch.int32), torch.zeros(1, 0, 80)
    mel_rise, mel_fall = torch.from_numpy(np.hamming(2 * OVERLAP_FRAMES)).float().chunk(2)
    rise, fall = torch.from_numpy(np.hamming(2 * CACHE_FRAMES * SAMPLES_PER_FRAME)).float().chunk(2)
    if even_seams:
        mel_rise, mel_fall = (part / (mel_rise + mel_fall) for part in (mel_rise, mel_fall))
        rise, fall = (part / (rise + fall) for part in (rise, fall))

    torch.manual_seed(4)
    expected, rest, flow_cache, mel_tail, before = [], source, torch.zeros(1, 80, 0, 2), None, None
    finished = False
    while not finished:
        finished = rest.shape[1] < CHUNK_TOKENS + OVERLAP_TOKENS
        piece = rest if finished else rest[:, : CHUNK_TOKENS + OVERLAP_TOKENS]
        rest = rest[:, CHUNK_TOKENS:]
        lengths = torch.tensor([piece.shape[1]]), torch.tensor([0])
        with torch.inference_mode():
            mel, flow_cache = flow.inference(
                piece, lengths[0], no_tokens, lengths[1], no_mel, lengths[1], embedding, flow_cache
            )
            mel = mel.clone()
            if mel_tail is not None:
                mel[:, :, :OVERLAP_FRAMES] = mel[:, :, :OVERLAP_FRAMES] * mel_rise + mel_tail * mel_fall
            if not finished:
                mel, mel_tail = mel[:, :, :-OVERLAP_FRAMES], mel[:, :, -OVERLAP_FRAMES:]
            if before is not None:
                mel = torch.cat([before[0], mel], dim=2)
            wave, excitation = hift.inference(mel, before[1] if before is not None else None)
            wave = wave.clone()
            if before is not None:
                wave[:, : len(rise)] = wave[:, : len(rise)] * rise + before[2] * fall
        before = mel[:, :, -CACHE_FRAMES:], excitation[:, :, -len(rise) :], wave[:, -len(rise) :]
        expected.append(wave if finished else wave[:, : -len(rise)])

    torch.manual_seed(4)
    got = [
        chunk["tts_speech"] for chunk in model.tts(source_speech_token=source, flow_embedding=embedding, stream=True)
    ]
    assert [chunk.shape for chunk in got] == [chunk.shape for chunk in expected]
    scale = torch.cat(expected, dim=1).abs().max()
    assert all((a - b).abs().max() <= 1e-5 * scale for a, b in zip(got, expected, strict=True))


def test_a_long_text_is_spoken_sentence_by_sentence(cosy):
    sentence = "This sentence has quite a few words in it so that it counts for something when they are joined. "
    pieces = cosy.frontend.text_normalize(sentence * 9)
    assert len(pieces) > 1
    cosy.model.llm.sampling = SeededSampler(may_end=True)
    assert len(list(cosy.inference_sft(sentence * 9, NAMED_SPEAKER))) == len(pieces)


def test_speech_may_be_changed_in_place_and_takes_part_in_gradients(speak):
    [chunk] = speak("vc")
    speech = chunk["tts_speech"]
    speech *= 0.5
    gain = torch.ones(1, requires_grad=True)
    (speech * gain).sum().backward()


def test_one_model_speaks_for_several_threads_at_once(cosy, source_wav, prompt_wav):
    lengths = []

    def run():
        lengths.append(sound(cosy.inference_vc(source_wav, prompt_wav, stream=True)).shape[1])

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(lengths) == 3 and len(set(lengths)) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_the_embedded_model_speaks_with_a_voice_from_the_demo_corpus(stream):
    cosy = CosyVoice(REPOSITORY / "CosyVoice-tiny", device="cpu")
    prompt = sorted((REPOSITORY / "json" / "demo_audio").rglob("*.flac"))[0]
    speech = sound(cosy.inference_zero_shot("Hello there.", "Hi.", prompt, stream=stream))
    assert speech.isfinite().all() and speech.shape[1] > 0.1 * cosy.sample_rate


# ---- prompts


@pytest.mark.parametrize("rate", [16_000, 22_050, 24_000, 44_100, 48_000])
def test_the_prompts_mel_is_computed_at_the_models_own_rate(cosy, tmp_path, rate):
    path = write_tone(tmp_path / "prompt.wav", 1.0, rate)
    mel, length = cosy.frontend._extract_speech_feat(path)
    waveform = torchaudio.functional.resample(torch.from_numpy(soundfile.read(path, dtype="float32")[0]), rate, 22_050)
    expected = cosy.frontend.feat_extractor(waveform.unsqueeze(0)).transpose(1, 2)
    assert mel.shape == (1, 22_050 // 256, 80) and length.tolist() == [22_050 // 256]
    assert torch.allclose(mel, expected, atol=1e-5)
    assert torch.equal(cosy.frontend.frontend_zero_shot("a", "b", path, 22_050)["prompt_speech_feat"], mel)


def test_a_waveform_at_16_khz_is_as_good_as_its_file(cosy, prompt_wav, source_wav):
    prompt, source = (
        torch.from_numpy(soundfile.read(path, dtype="float32")[0])[None] for path in (prompt_wav, source_wav)
    )
    frontend = cosy.frontend
    for of_tensor, of_path in (
        (
            frontend.frontend_zero_shot("a", "b", prompt, 22_050),
            frontend.frontend_zero_shot("a", "b", prompt_wav, 22_050),
        ),
        (frontend.frontend_vc(source, prompt, 22_050), frontend.frontend_vc(source_wav, prompt_wav, 22_050)),
    ):
        assert of_tensor.keys() == of_path.keys()
        assert all(torch.equal(of_tensor[name], of_path[name]) for name in of_path)


def test_the_extractors_give_the_published_shapes(cosy, prompt_wav):
    frontend = cosy.frontend
    tokens, length = frontend._extract_text_token("Hello, world.")
    assert tokens.tolist() == [[15947, 11, 1002, 13]] and length.tolist() == [4]
    speech_tokens, length = frontend._extract_speech_token(prompt_wav)
    assert speech_tokens.shape == (1, 85) and length.tolist() == [85]  # 1.7 s at 50 Hz
    assert {tokens.dtype, speech_tokens.dtype, length.dtype} == {torch.int32}
    assert frontend._extract_spk_embedding(prompt_wav).shape == (1, 192)


def test_stereo_prompts_are_averaged(cosy, tmp_path):
    one = write_tone(tmp_path / "one.wav", 0.5, 16_000)
    two = write_tone(tmp_path / "two.wav", 0.5, 16_000, channels=2)
    assert torch.equal(cosy.frontend._extract_spk_embedding(one), cosy.frontend._extract_spk_embedding(two))


def test_each_mode_hides_from_the_language_model_what_it_must_not_see(cosy, prompt_wav):
    frontend = cosy.frontend
    assert frontend.frontend_sft("a", NAMED_SPEAKER).keys() == {"text", "text_len", "llm_embedding", "flow_embedding"}
    instruct = frontend.frontend_instruct("a", NAMED_SPEAKER, "b")
    assert "llm_embedding" not in instruct and instruct["prompt_text"].shape[1] == 1
    zero_shot = frontend.frontend_zero_shot("a", "b", prompt_wav, 22_050)
    cross_lingual = frontend.frontend_cross_lingual("a", prompt_wav, 22_050)
    hidden = {"prompt_text", "prompt_text_len", "llm_prompt_speech_token", "llm_prompt_speech_token_len"}
    assert zero_shot.keys() - cross_lingual.keys() == hidden
    assert "llm_embedding" in cross_lingual


@pytest.mark.parametrize(
    ("seconds", "rate", "complaint"),
    [
        (30.1, 16_000, "30.1 s; S3 tokens are for 30 s"),
        (1.0, 8_000, "8000 Hz"),
        (0.01, 16_000, "0.010 s"),
        (0, 16_000, "0 samples"),
    ],
)
def test_a_prompt_that_cannot_be_used_says_why(cosy, tmp_path, seconds, rate, complaint):
    path = write_tone(tmp_path / "prompt.wav", seconds, rate)
    with pytest.raises(ValueError, match=r"prompt\.wav") as error:
        list(cosy.inference_zero_shot(TEXT, PROMPT_TEXT, path))
    assert complaint in str(error.value)


def test_a_prompt_that_is_no_recording_says_so(cosy, tmp_path):
    (tmp_path / "prompt.wav").write_text("no sound")
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        list(cosy.inference_cross_lingual(TEXT, tmp_path / "prompt.wav"))
    with pytest.raises(FileNotFoundError, match="there is no recording"):
        list(cosy.inference_vc(tmp_path / "missing.wav", tmp_path / "prompt.wav"))
    with pytest.raises(ValueError, match=r"must be \[1, N\] at 16 kHz; got \[16000\]"):
        list(cosy.inference_cross_lingual(TEXT, torch.zeros(16_000)))


# ---- speakers


def test_a_speaker_made_from_a_prompt_is_kept_in_the_folder(folder, cosy, prompt_wav, tmp_path):
    expected = cosy.frontend.frontend_zero_shot("Hi.", PROMPT_TEXT, prompt_wav, 22_050)
    cosy.model_dir, own_folder = str(tmp_path), cosy.model_dir
    try:
        assert cosy.add_zero_shot_spk(PROMPT_TEXT, prompt_wav, "mine") is True
        cosy.save_spkinfo()
    finally:
        cosy.model_dir = own_folder
        del cosy.frontend.spk2info["mine"]
    saved = torch.load(tmp_path / "spk2info.pt", weights_only=True)
    assert list(saved) == [NAMED_SPEAKER, "mine"] and list(tmp_path.iterdir()) == [tmp_path / "spk2info.pt"]

    cosy.frontend.spk2info["mine"] = saved["mine"]
    again = cosy.frontend.frontend_zero_shot("Hi.", "", "", 22_050, "mine")
    assert again.keys() == expected.keys() and all(torch.equal(again[name], expected[name]) for name in expected)
    assert cosy.list_available_spks() == [NAMED_SPEAKER, "mine"]
    assert sound(cosy.inference_zero_shot("Hi.", "", "", "mine")).shape[1] > 0
    assert sound(cosy.inference_cross_lingual("Hi.", "", "mine")).shape[1] > 0
    with pytest.raises(ValueError, match="made from a prompt"):
        list(cosy.inference_sft("Hi.", "mine"))
    del cosy.frontend.spk2info["mine"]


def test_saving_speakers_that_fails_leaves_the_old_file(cosy, tmp_path, monkeypatch):
    (tmp_path / "spk2info.pt").write_bytes(b"old")

    def full_disk(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    monkeypatch.setattr(cosy, "model_dir", str(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        cosy.save_spkinfo()
    assert (tmp_path / "spk2info.pt").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_speaker_that_does_not_exist_is_named_beside_those_that_do(cosy):
    with pytest.raises(ValueError, match=f"no speaker 'tenor'; speakers: '{NAMED_SPEAKER}'"):
        list(cosy.inference_sft(TEXT, "tenor"))
    with pytest.raises(ValueError, match=f"{NAMED_SPEAKER}' has no prompt"):
        list(cosy.inference_zero_shot(TEXT, "", "", NAMED_SPEAKER))
    with pytest.raises(ValueError, match="empty zero_shot_spk_id"):
        cosy.add_zero_shot_spk(PROMPT_TEXT, "", "")


def test_a_folder_without_named_speakers_says_how_to_get_some(cosy, monkeypatch):
    monkeypatch.setattr(cosy.frontend, "spk2info", {})
    with pytest.raises(ValueError, match="this folder has no named speakers") as error:
        list(cosy.inference_sft(TEXT, "tenor"))
    script, *words = str(error.value).partition("python ")[2].split()
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / script), *words, "--help"], capture_output=True, text=True, check=True
    )
    assert all(word in done.stdout for word in words if word.startswith("--"))


def test_a_folder_may_do_without_named_speakers(folder, tmp_path):
    frontend = CosyVoice(folder, device="cpu").frontend
    assert type(frontend)(lambda: None, frontend.feat_extractor, "a", "b", tmp_path / "none.pt").spk2info == {}
    (tmp_path / "bad.pt").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"bad\.pt .*truncated, damaged"):
        type(frontend)(lambda: None, frontend.feat_extractor, "a", "b", tmp_path / "bad.pt")


# ---- failures


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fail_at", [1, 130])
def test_an_error_of_the_language_model_reaches_the_caller(cosy, speak, stream, fail_at):
    cosy.model.llm.sampling = SeededSampler(fail_at=fail_at)
    chunks = speak("sft", stream=stream)
    with pytest.raises(ZeroDivisionError, match="the sampler broke"):
        list(chunks)
    cosy.model.llm.sampling = SeededSampler()
    assert sound(speak("sft", stream=stream)).shape[1] > 0, "the model works on"


def test_closing_the_stream_early_stops_the_language_model_and_forgets_the_session(cosy, speak):
    cosy.model.llm.sampling = sampler = SeededSampler(pause_at=CHUNK_TOKENS + OVERLAP_TOKENS + 1)
    chunks = speak("sft", stream=True, text=TEXT * 3)
    next(chunks)
    assert len(cosy.model.sessions) == 1 and len(writing_threads()) == 1
    sampler.go_on.set()
    chunks.close()
    assert cosy.model.sessions == {} and writing_threads() == []
    assert sampler.drawn < 2 * CHUNK_TOKENS, "it stopped long before the end"


@pytest.mark.parametrize("text", ["", "   ", "。", "?!..."])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "vc"])
def test_a_text_without_words_gives_no_sound_and_a_warning(speak, caplog, mode, text):
    assert list(speak(mode, text=text)) == []
    assert caplog.messages == [f"there is nothing to say in {text!r}"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["text", "source_speech_token"])
def test_no_token_to_speak_is_an_error(cosy, name, stream):
    with pytest.raises(ValueError, match=f"{name} is empty"):
        list(cosy.model.tts(**{name: torch.zeros(1, 0)}, flow_embedding=torch.ones(1, 192), stream=stream))


def test_a_length_that_disagrees_with_its_tensor_is_an_error(cosy):
    inputs = cosy.frontend.frontend_sft("Hello.", NAMED_SPEAKER)
    inputs["text_len"] += 1
    with pytest.raises(ValueError, match="text has 2 places but text_len says 3"):
        list(cosy.model.tts(**inputs))
    with pytest.raises(ValueError, match="needs flow_embedding"):
        list(cosy.model.tts(text=inputs["text"]))
    with pytest.raises(ValueError, match="needs either text or source_speech_token"):
        list(cosy.model.tts(flow_embedding=torch.ones(1, 192)))


def test_half_precision_without_cuda_warns_and_is_off(loaded):
    parts = loaded.model
    with pytest.warns(UserWarning, match="fp16 needs CUDA; running on cpu in float32"):
        model = CosyVoiceModel(parts.llm, parts.flow, parts.hift, fp16=True, device="cpu")
    assert model.fp16 is False


def test_all_utterances_share_one_cuda_stream_that_waits_for_their_inputs(monkeypatch):
    made, waited, entered = [], [], []

    class Stream:
        def __init__(self, device):
            made.append(device)

        def wait_stream(self, stream):
            waited.append(stream)

    @contextmanager
    def stream(chosen):
        entered.append(chosen)
        yield

    class Part(SimpleNamespace):
        def to(self, device):
            return self

        def eval(self):
            return self

        def inference(self, **arguments):
            return iter((1, 2))

    for name, value in {"Stream": Stream, "stream": stream, "current_stream": lambda device: "the caller's"}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    model = CosyVoiceModel(Part(), Part(input_frame_rate=50), Part(), device="cuda")
    writes = [model._writer(torch.ones(1, 3), None, None, None, None) for _ in range(3)]
    assert waited == ["the caller's"] * 3 and entered == []
    model.device = torch.device("cpu")  # where the tokens go; there may be no GPU here
    for write in writes:
        tokens = []
        write(tokens.append)
        assert tokens == [1, 2]
    assert made == [torch.device("cuda")] and entered == [model.llm_stream] * 3


def test_without_cuda_there_is_no_stream(loaded):
    assert loaded.model.llm_stream is None


def test_the_published_scripts_names_are_there(folder):
    from cosyvoice.utils.file_utils import logging

    assert logging.getLogger is not None
    cosy = AutoModel(model_dir=folder, device="cpu", trt_concurrent=2)
    assert isinstance(cosy, CosyVoice) and cosy.list_available_spks() == [NAMED_SPEAKER]
    assert CosyVoice(str(folder), False, False, False, 1, device="cpu").sample_rate == cosy.sample_rate


def test_a_recording_is_read_from_an_open_file_too(prompt_wav):
    with prompt_wav.open("rb") as file:
        assert torch.equal(load_wav(file, 16_000), load_wav(prompt_wav, 16_000))
    with pytest.raises(ValueError, match="cannot be read as a recording"):
        load_wav(io.BytesIO(b"no sound"), 16_000)


def test_a_rate_that_shares_no_factor_with_the_models_takes_no_filter_of_gigabytes(tmp_path, monkeypatch):
    asked = []
    resample = torchaudio.functional.resample
    monkeypatch.setattr(
        torchaudio.functional, "resample", lambda wave, *rates: asked.append(rates) or resample(wave, *rates)
    )
    seconds = 0.5
    got = load_wav(write_tone(tmp_path / "odd.wav", seconds, 44_099), 22_050)
    assert max(asked[0]) <= 4_000
    even = load_wav(write_tone(tmp_path / "even.wav", seconds, 44_100), 22_050)
    assert got.shape[1] == pytest.approx(seconds * 22_050, rel=1e-3)
    assert float(got.std()) == pytest.approx(float(even.std()), rel=0.05)


def test_tensorrt_is_refused_with_what_it_would_need(folder):
    with pytest.raises(NotImplementedError) as error:
        CosyVoice(folder, load_trt=True, device="cpu")
    for need in ("a CUDA device (not found)", "the package tensorrt", "flow.decoder.estimator.fp32.onnx (not found)"):
        assert need in str(error.value)


def test_a_mel_function_at_another_rate_than_the_model_is_refused(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    text = (folder / "cosyvoice.yaml").read_text()
    (tmp_path / "cosyvoice.yaml").unlink()
    (tmp_path / "cosyvoice.yaml").write_text(
        text.replace("num_mels: 80\n    sampling_rate: !ref <sample_rate>", "num_mels: 80\n    sampling_rate: 24000")
    )
    with pytest.raises(ConfigError, match="22050 Hz but feat_extractor works at 24000 Hz"):
        CosyVoice(tmp_path, device="cpu")


def test_a_mistyped_folder_starts_no_download(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"CosyVoice-30OM does not exist.*Nothing is downloaded"):
        CosyVoice("CosyVoice-30OM")
    assert list(tmp_path.iterdir()) == []


# ---- TorchScript archives


class Accumulator(torch.nn.Module):
    """Adds up all frames so far and their position; knows from cache and offset, and nothing else, what came before."""

    def forward(self, xs, xs_lens, decoding_chunk_size: int = 0, num_decoding_left_chunks: int = -1):
        positions = torch.arange(xs.size(1)).unsqueeze(1)
        return xs.cumsum(1) + positions, torch.ones(1, 1, xs.size(1), dtype=torch.bool)

    @torch.jit.export
    def forward_chunk(self, xs, offset: int, required_cache_size: int, att_cache, cnn_cache, att_mask):
        before = torch.zeros_like(xs[:, :1]) if att_cache.numel() == 0 else att_cache[0]
        assert att_mask.size(2) == xs.size(1)
        total = xs.cumsum(1) + before
        positions = torch.arange(offset, offset + xs.size(1)).unsqueeze(1)
        return total + positions, total[None, :, -1:], cnn_cache


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_stand_where_the_encoders_stood(folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(FileNotFoundError, match=r"llm\.text_encoder\.fp32\.zip.*load_jit=False"):
        CosyVoice(tmp_path, load_jit=True, device="cpu")
    for name in ("llm.text_encoder", "llm.llm", "flow.encoder"):
        torch.jit.script(Accumulator()).save(str(tmp_path / f"{name}.fp32.zip"))
    llm = CosyVoice(tmp_path, load_jit=True, device="cpu").model.llm
    frames = torch.randn(1, 5, 3)
    cache = llm.llm.new_cache(1, 5, torch.device("cpu"))
    steps = [llm.llm.step(part, cache) for part in (frames[:, :3], frames[:, 3:4], frames[:, 4:])]
    assert torch.allclose(torch.cat(steps, dim=1), llm.llm(frames, torch.tensor([5]))[0], atol=1e-6)
    assert llm.llm.output_size() == 32
    with pytest.raises(ValueError, match="decodes one sequence; got 2"):
        llm.llm.new_cache(2, 5, torch.device("cpu"))

    (tmp_path / "llm.llm.fp32.zip").write_bytes(b"PK")
    with pytest.raises(ValueError, match="is no TorchScript archive"):
        CosyVoice(tmp_path, load_jit=True, device="cpu")


# ---- threads and devices


def test_a_stream_of_tokens_waits_for_its_writer_and_ends_with_it():
    go_on = threading.Event()

    def write(emit):
        emit(1)
        emit(2)
        go_on.wait(5)
        emit(3)

    with TokenStream(write) as tokens:
        assert tokens.has(2) and tokens[0:] == [1, 2]
        go_on.set()
        assert tokens.has(3) and not tokens.has(4)
        assert tokens[1:] == [2, 3]


def test_onnx_on_a_machine_without_cuda_says_that_the_cpu_is_used(folder):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    session = OnnxSession(folder / "campplus.onnx", "cuda")
    with pytest.warns(UserWarning, match=r"campplus\.onnx: CUDA was wanted.*onnxruntime-gpu"):
        assert session.provider == "CPUExecutionProvider"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OnnxSession(folder / "campplus.onnx", "cpu").provider == "CPUExecutionProvider"


def test_onnx_files_that_cannot_be_opened_say_so_at_their_first_use(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"bad\.onnx cannot be opened as an ONNX model"):
        OnnxSession(tmp_path / "bad.onnx").run()
    with pytest.raises(FileNotFoundError, match=r"missing\.onnx"):
        OnnxSession(tmp_path / "missing.onnx").run()


def test_importing_the_command_line_imports_no_model_runtime():
    heavy = ["onnxruntime", "transformers", "whisper", "modelscope", "matplotlib", "wetext", "inflect"]
    script = f"import sys, cosyvoice.cli.cosyvoice; print([name for name in {heavy} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout.strip() == "[]"
