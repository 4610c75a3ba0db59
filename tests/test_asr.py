"""What listens writes words and their times down, and says what it needs where it cannot."""

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import setup_cosyvoice
from cosyvoice.utils.settings import parse_settings
from taste.asr import find_recogniser
from taste.audio import read_audio
from taste.manifest import read_manifest
from taste.pocketsphinx_recogniser import Pocketsphinx
from taste.text_normalisation import normalise
from taste.whisper_recogniser import WhisperRecogniser, whisper_lacks
from taste.word_timing import Word, timed_words
from tests.small_whisper import write_small_whisper, write_writing_whisper

ROOT = Path(__file__).parents[1]
RATE_HZ = 22_050


def publish_tokenizer(folder: Path) -> None:
    """Turn the tokenizer of a folder into the files, and the layout, in which Whisper-large-v3's is published."""
    whole = json.loads((folder / "tokenizer.json").read_text())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {token["content"]: token["id"] for token in whole["added_tokens"]}
    special = {"additional_special_tokens": settings.pop("extra_special_tokens")}
    special |= {name: settings[name] for name in ("bos_token", "eos_token", "unk_token")}
    described = {str(token.pop("id")): token for token in whole["added_tokens"]}
    settings |= special | {"added_tokens_decoder": described, "processor_class": "WhisperProcessor"}
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for name, content in {
        "added_tokens.json": added,
        "normalizer.json": {"colour": "color"},
        "special_tokens_map.json": special,
        "tokenizer_config.json": settings,
        "vocab.json": whole["model"]["vocab"],
    }.items():
        (folder / name).write_text(json.dumps(content))


def demo_recordings() -> Iterator[tuple[torch.Tensor, str]]:
    for utterance in read_manifest(ROOT / "json" / "test.jsonl"):
        yield read_audio(utterance.audio_path, RATE_HZ).waveform, utterance.text


@pytest.fixture(scope="module")
def spoken() -> tuple[torch.Tensor, str]:
    return next(demo_recordings())


@pytest.fixture(scope="module")
def sphinx() -> Pocketsphinx:
    pytest.importorskip("pocketsphinx")
    return Pocketsphinx()


@pytest.fixture(scope="module")
def understood(sphinx) -> tuple[torch.Tensor, str]:
    """A recording that pocketsphinx writes down without a mistake; a voice of flite's is hard to understand."""
    for waveform, text in demo_recordings():
        if [word.text for word in sphinx.words(waveform, RATE_HZ)] == normalise(text).split():
            return waveform, text
    pytest.fail("pocketsphinx understands none of the demo corpus's test recordings")


def test_what_cannot_be_heard_is_left_out_of_words():
    assert normalise("It's six o'clock, Mr. GREY!") == "it's six o'clock mister gray"
    assert normalise("and(2) 'quoted' — déjà vu") == "and quoted déjà vu"
    assert normalise("三百 ok，好") == "三 百 ok 好"
    assert normalise(" … ") == ""
    assert normalise("3,000,000 of 1,2 or 12,3456") == "3000000 of 1 2 or 12 3456"


def test_pocketsphinx_writes_down_words_in_order_of_time(sphinx, understood):
    waveform, _ = understood
    heard = sphinx.words(waveform, RATE_HZ)
    assert all(word.start_s < word.end_s for word in heard)
    assert all(a.end_s <= b.start_s + 1e-6 for a, b in itertools.pairwise(heard))
    seconds = len(waveform) / RATE_HZ
    assert sum(word.end_s - word.start_s for word in heard) > 0.8 * seconds  # pauses are few and short
    assert heard[-1].end_s <= seconds
    sphinx.words(torch.randn(RATE_HZ), RATE_HZ)
    assert sphinx.words(waveform, RATE_HZ) == heard  # whatever was heard between


def test_a_word_of_the_dictionary_that_is_heard_as_several_is_several(monkeypatch):
    segments = [("<s>", 0, 9), ("and(2)", 10, 19), ("twenty-one", 20, 59), ("[SPEECH]", 60, 69), ("so-called", 70, 89)]

    class Decoder:
        """Hears these segments, whatever the sound; a frame is 10 ms."""

        config: ClassVar = {"frate": 100}

        def __init__(self, **options: object) -> None:
            self.reinit_feat = self.start_utt = self.end_utt = lambda: None
            self.process_raw = lambda *sound, **how: None

        def seg(self) -> Iterator[SimpleNamespace]:
            return (SimpleNamespace(word=word, start_frame=first, end_frame=last) for word, first, last in segments)

    monkeypatch.setitem(sys.modules, "pocketsphinx", SimpleNamespace(Decoder=Decoder))
    heard = Pocketsphinx().words(torch.zeros(RATE_HZ), RATE_HZ)
    assert [word.text for word in heard] == ["and", "twenty", "one", "so", "called"]
    times = [(word.start_s, word.end_s) for word in heard]
    assert times == [pytest.approx(pair) for pair in ((0.1, 0.2), (0.2, 0.4), (0.4, 0.6), (0.7, 0.8), (0.8, 0.9))]


def test_a_transcript_is_found_where_it_is_heard(sphinx, understood):
    waveform, text = understood
    heard, found = sphinx.words(waveform, RATE_HZ), sphinx.align(waveform, RATE_HZ, text)
    assert [word.text for word in found] == [word.text for word in heard]
    assert max(abs(a.start_s - b.start_s) for a, b in zip(heard, found, strict=True)) <= 0.1
    padded = torch.cat([torch.zeros(RATE_HZ), waveform])
    moved = sphinx.align(padded, RATE_HZ, text)
    assert moved[3].start_s - found[3].start_s == pytest.approx(1, abs=0.03)


def test_a_whole_transcript_is_found_in_any_sound(sphinx, spoken):
    text = spoken[1]
    noise = 0.1 * torch.randn(2 * RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert [word.text for word in sphinx.align(noise, RATE_HZ, text)] == normalise(text).split()
    assert [word.text for word in sphinx.align(noise, RATE_HZ, "the zyxxab house")] == ["the", "zyxxab", "house"]


def test_a_transcript_that_cannot_be_said_or_does_not_fit_is_not_found(sphinx, spoken):
    waveform, text = spoken
    assert sphinx.align(waveform, RATE_HZ, "三百") is None
    assert sphinx.align(waveform, RATE_HZ, "room 12") is None
    assert sphinx.align(waveform, RATE_HZ, "...") is None
    assert sphinx.align(waveform[: RATE_HZ // 5], RATE_HZ, text) is None
    assert sphinx.words(waveform[:100], RATE_HZ) == []


def test_pocketsphinx_refuses_another_language(sphinx, spoken):
    assert sphinx.hears("en") and not sphinx.hears("zh")
    with pytest.raises(ValueError, match="English only, got the language 'zh'"):
        sphinx.words(spoken[0], RATE_HZ, "zh")


def test_a_whole_whisper_is_preferred_and_times_what_it_writes(tmp_path, spoken):
    write_writing_whisper(tmp_path / "whisper")
    found = find_recogniser(tmp_path)
    assert isinstance(found.recogniser, WhisperRecogniser)
    assert found.reason == f"Whisper in {tmp_path / 'whisper'}"
    assert found.recogniser.hears("en") and not found.recogniser.hears("zh")
    heard = found.recogniser.words(spoken[0], RATE_HZ)  # random weights: any words, but words
    assert heard and all(word.text == normalise(word.text) and word.start_s <= word.end_s for word in heard)
    assert found.recogniser.words(spoken[0][:100], RATE_HZ) == []
    assert found.recogniser.align(spoken[0], RATE_HZ, spoken[1]) is None


@pytest.mark.parametrize("lacks", [(), ("tokenizer.json",), ("vocab.json", "merges.txt", "added_tokens.json")])
def test_a_whisper_as_published_writes_the_same_without_a_network(tmp_path, spoken, no_network, lacks):
    folder = write_writing_whisper(tmp_path / "whisper")
    expected = WhisperRecogniser(folder).words(spoken[0], RATE_HZ)
    publish_tokenizer(folder)
    for name in lacks:
        (folder / name).unlink()

    found = find_recogniser(tmp_path)
    assert found.reason == f"Whisper in {folder}"
    assert found.recogniser.words(spoken[0], RATE_HZ) == expected != []


def test_what_setup_fetches_of_whisper_is_what_the_recogniser_needs(tmp_path):
    settings = parse_settings(setup_cosyvoice.__file__, vars(setup_cosyvoice), [])
    fetched = setup_cosyvoice.model_parts(settings)[1]
    whole = write_writing_whisper(tmp_path / "whole")
    publish_tokenizer(whole)
    assert {path.name for path in whole.iterdir()} == {*fetched.required, *fetched.optional} - {"README.md", "LICENSE"}


class WrittenDown:
    """In place of Whisper's pipeline: takes this text as what was written, a tenth of a second for each token."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text

    def __call__(self, sound, return_timestamps, generate_kwargs):
        tokens = torch.tensor([self.tokenizer(self.text, add_special_tokens=False).input_ids])
        times = 0.1 * torch.arange(1, tokens.shape[1] + 1)[None]
        outputs = [{"tokens": tokens, "token_timestamps": times}]
        text, more = self.tokenizer._decode_asr(  # what the pipeline calls
            outputs, return_timestamps=return_timestamps, return_language=None, time_precision=0.02
        )
        return {"text": text, **more}


@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("zh", "你好，世", [("你", 0.0, 0.3), ("好", 0.3, 0.9), ("世", 0.9, 1.2)]),  # a token is a byte here
        ("ja", "あ ok い", [("あ", 0.0, 0.3), ("ok", 0.3, 0.6), ("い", 0.6, 1.0)]),
        ("zh", "好ok'd", [("好", 0.0, 0.3), ("ok'd", 0.3, 0.7)]),
        ("en", "so long", [("so", 0.0, 0.2), ("long", 0.2, 0.7)]),
    ],
)
def test_each_character_has_its_own_time_where_a_language_writes_no_blanks(tmp_path, language, text, expected):
    recogniser = WhisperRecogniser(write_writing_whisper(tmp_path / "whisper"))
    tokenizer = recogniser._pipeline.tokenizer
    recogniser._pipeline = WrittenDown(tokenizer, text)
    heard = recogniser.words(torch.ones(RATE_HZ), RATE_HZ, language)
    assert [word.text for word in heard] == [word for word, _, _ in expected]
    for word, (_, start, end) in zip(heard, expected, strict=True):
        assert (word.start_s, word.end_s) == pytest.approx((start, end), abs=0.011)
    assert tokenizer.language is None  # as it was


@pytest.mark.parametrize("language", ["en", None])
def test_a_transcript_keeps_capitals_and_punctuation(tmp_path, language):
    recogniser = WhisperRecogniser(write_writing_whisper(tmp_path / "whisper"))
    assert isinstance(recogniser.transcript(torch.ones(RATE_HZ), RATE_HZ, language), str)  # random weights: any text
    assert recogniser.transcript(torch.ones(10), RATE_HZ, language) == ""
    asked = []
    recogniser._pipeline = lambda sound, generate_kwargs: asked.append(generate_kwargs) or {"text": " So long. "}
    assert recogniser.transcript(torch.ones(RATE_HZ), RATE_HZ, language) == "So long."
    assert asked == [{"language": language, "task": "transcribe"}]


def test_pieces_of_a_word_are_put_together_and_words_of_a_piece_share_its_time():
    pieces = [
        {"text": "我们", "timestamp": (0.0, 0.4)},  # one token
        {"text": "用", "timestamp": (0.4, 0.6)},
        {"text": "Py", "timestamp": (0.6, 0.7)},
        {"text": "thon", "timestamp": (0.7, 1.0)},
        {"text": "。", "timestamp": (1.0, 1.2)},
        {"text": "OK", "timestamp": (1.2, 1.4)},
        {"text": " go", "timestamp": (1.4, 1.6)},
        {"text": "ne", "timestamp": (1.6, None)},
    ]
    assert timed_words(pieces) == [
        Word("我", 0.0, 0.2),
        Word("们", 0.2, 0.4),
        Word("用", 0.4, 0.6),
        Word("python", 0.6, 1.0),
        Word("ok", 1.2, 1.4),
    ]
    number = [{"text": " 3", "timestamp": (0.0, 0.2)}, {"text": ",000", "timestamp": (0.2, 0.5)}]
    assert timed_words(number) == [Word("3000", 0.0, 0.5)]
    apart = [{"text": " well", "timestamp": (0.0, 0.2)}, {"text": "-known", "timestamp": (0.2, 0.5)}]
    assert timed_words(apart) == [Word("well", 0.0, 0.2), Word("known", 0.2, 0.5)]
    assert timed_words([]) == []


def test_a_whisper_that_cannot_write_says_what_it_lacks(tmp_path):
    assert whisper_lacks(tmp_path / "none") == "it has no config.json"
    encoder_only = write_small_whisper(tmp_path / "encoder")
    assert "no tokenizer" in whisper_lacks(encoder_only)
    whole = write_writing_whisper(tmp_path / "whole")
    assert whisper_lacks(whole) is None
    settings = json.loads((whole / "generation_config.json").read_text())
    del settings["alignment_heads"]
    (whole / "generation_config.json").write_text(json.dumps(settings))
    assert "alignment_heads" in whisper_lacks(whole)
    (whole / "model.safetensors").unlink()
    assert whisper_lacks(whole) == "it has no weights"


def test_where_nobody_can_listen_the_reason_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pocketsphinx", None)
    found = find_recogniser(tmp_path)
    assert found.recogniser is None
    assert found.reason.startswith("skipped: needs pocketsphinx (pip install")
    assert "whisper (it has no config.json)" in found.reason
