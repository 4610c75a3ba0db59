"""The synthesised corpus of the tiny recipe keeps the promises of its grammar and of its lists."""

import json
import random
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import soundfile

from taste.manifest import read_manifest

REPOSITORY = Path(__file__).parents[1]
TINY = REPOSITORY / "CosyVoice" / "examples" / "tiny"
US_ENGLISH_PHONES = set(
    "aa ae ah ao aw ax ay b ch d dh eh er ey f g hh ih iy jh k l m n ng ow oy p r s sh t th uh uw v w y z zh".split()
)


@pytest.fixture(scope="module")
def maker() -> dict[str, Any]:
    earlier = list(sys.path)
    try:
        return runpy.run_path(str(TINY / "make_corpus.py"))
    finally:
        sys.path[:] = earlier


@pytest.fixture(scope="module")
def demo() -> list[str]:
    return [item.text for split in ("train", "test") for item in read_manifest(REPOSITORY / "json" / f"{split}.jsonl")]


@pytest.fixture(scope="module")
def plan(maker: dict[str, Any], demo: list[str]) -> list[Any]:
    return maker["plan_corpus"](0.12, 0.03, 44, 44, 7, demo)


@pytest.fixture(scope="module")
def lively_plan(maker: dict[str, Any], plan: list[Any], flite: str) -> list[Any]:
    return maker["read_some_lively"](plan, 7, flite)


def readings(plan: list[Any], split: str) -> list[Any]:
    return [item.reading for item in plan if item.reading.split == split]


def test_the_vocabulary_has_1500_words_and_all_of_the_demo(maker: dict[str, Any], demo: list[str]) -> None:
    vocabulary = maker["SentenceMaker"].__init__.__globals__["vocabulary"]()
    assert len(vocabulary) >= 1500
    assert {word for text in demo for word in maker["words_of"](text)} <= vocabulary | {"a", "an"}


@pytest.fixture(scope="module")
def sentences(plan: list[Any]) -> list[Any]:
    return [item for item in plan if item.reading.split != "phrases"]


def test_words_are_used_evenly(maker: dict[str, Any], sentences: list[Any]) -> None:
    used = [word for item in sentences for word in maker["words_of"](item.reading.text)]
    assert len(set(used)) > len(used) * 0.4


def test_sentences_have_4_to_14_words_a_capital_and_an_end(sentences: list[Any], maker: dict[str, Any]) -> None:
    for item in sentences:
        text = item.reading.text
        assert 4 <= len(maker["words_of"](text)) <= 14, text
        assert text[0].isupper() and text[-1] in ".?" and "{" not in text, text


def test_no_sentence_is_in_two_splits_or_comes_twice_or_is_of_the_demo(
    maker: dict[str, Any], sentences: list[Any], demo: list[str]
) -> None:
    keys = [maker["sentence_key"](item.reading.text) for item in sentences]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & {maker["sentence_key"](text) for text in demo}


def test_phrases_have_every_word_of_train_alone_and_nothing_but_cuts_of_train(
    maker: dict[str, Any], plan: list[Any]
) -> None:
    texts = [" ".join(maker["words_of"](reading.text)) for reading in readings(plan, "train")]
    phrases = [" ".join(maker["words_of"](reading.text)) for reading in readings(plan, "phrases")]
    assert {phrase for phrase in phrases if " " not in phrase} == {word for text in texts for word in text.split()}
    assert {len(phrase.split()) for phrase in phrases} == {1, 2, 3}
    assert all(any(f" {phrase} " in f" {text} " for text in texts) for phrase in phrases)


def test_articles_agree_with_the_sound_that_follows(plan: list[Any]) -> None:
    pairs = {pair for item in plan for pair in pairwise(item.reading.text.split())}
    articles = {word: article.lower() for article, word in pairs if article.lower() in ("a", "an")}
    assert {"an"} == {articles[word] for word in articles if word[0] in "aeio" and not word.startswith("one")}
    assert {"a"} == {articles[word] for word in articles if word[0] not in "aeiou" and word not in ("honest", "hour")}
    assert "an usual" not in text_of(plan) and "a honest" not in text_of(plan) and "an uni" not in text_of(plan)


def text_of(plan: list[Any]) -> str:
    return "\n".join(item.reading.text for item in plan)


def test_every_speaker_is_in_dev_and_test_and_has_one_pitch(maker: dict[str, Any], plan: list[Any]) -> None:
    speakers = {speaker.speaker_id: speaker for speaker in maker["plan_speakers"](7)}
    assert len(speakers) == 44
    assert len({(speaker.voice, speaker.pitch) for speaker in speakers.values()}) == 44
    for split in ("dev", "test", "lively_dev"):
        assert {item.speaker_id for item in plan if item.reading.split == split} == set(speakers)
    for item in plan:
        speaker = speakers[item.speaker_id]
        assert (item.reading.voice, item.reading.pitch) == (speaker.voice, speaker.pitch)
        assert abs(item.reading.rate / speaker.rate - 1) < 0.035


def test_the_same_seed_gives_the_same_plan_and_another_seed_another(
    maker: dict[str, Any], plan: list[Any], demo: list[str]
) -> None:
    again = maker["plan_corpus"](0.01, 0.01, 3, 3, 7, demo)
    assert again == maker["plan_corpus"](0.01, 0.01, 3, 3, 7, demo)
    assert again[-3:] != maker["plan_corpus"](0.01, 0.01, 3, 3, 8, demo)[-3:]


def test_words_of_lively_splits_have_rates_and_vowels_of_their_own_and_others_have_none(
    plan: list[Any], lively_plan: list[Any]
) -> None:
    for item, planned in zip(lively_plan, plan, strict=True):
        reading = item.reading
        if reading.split.startswith("lively"):
            assert len(reading.word_rates) == len(reading.said) == len(reading.text.split()) > len(set(reading.pauses))
            assert reading._replace(word_rates=(), pauses=(), said=()) == planned.reading
        else:
            assert item == planned and reading.word_rates == reading.pauses == reading.said == ()
    rates = [rate for item in lively_plan for rate in item.reading.word_rates]
    assert 0.6 <= min(rates) < 0.65 and 1.5 < max(rates) <= 1.6
    assert 0.4 < sum(rate < (0.6 * 1.6) ** 0.5 for rate in rates) / len(rates) < 0.6
    assert 0.05 < sum(len(item.reading.pauses) for item in lively_plan) / len(rates) < 0.2


def test_without_lively_hours_the_other_splits_are_the_same(
    maker: dict[str, Any], plan: list[Any], demo: list[str]
) -> None:
    without = maker["plan_corpus"](0.12, 0, 44, 44, 7, demo)
    assert without == [item for item in plan if not item.reading.split.startswith("lively")]


def test_verbs_are_inflected(maker: dict[str, Any]) -> None:
    forms = maker["SentenceMaker"].__init__.__globals__["verb_forms"]
    assert list(forms("carry").values()) == ["carry", "carries", "carrying", "carried", "carried"]
    assert list(forms("take").values()) == ["take", "takes", "taking", "took", "taken"]
    assert list(forms("stop").values()) == ["stop", "stops", "stopping", "stopped", "stopped"]
    assert list(forms("see").values()) == ["see", "sees", "seeing", "saw", "seen"]
    assert list(forms("play").values()) == ["play", "plays", "playing", "played", "played"]
    assert list(forms("go").values()) == ["go", "goes", "going", "went", "gone"]


def test_a_machine_without_flite_is_told_how_to_install_it(
    maker: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert maker["main"](["--work-dir", str(tmp_path)]) == 1
    assert "apt-get install -y flite" in capsys.readouterr().err


@pytest.fixture(scope="module")
def flite(maker: dict[str, Any]) -> str:
    try:
        return maker["find_flite"]()
    except FileNotFoundError:
        pytest.skip("flite is not installed")


@pytest.fixture(scope="module")
def work_dir(maker: dict[str, Any], flite: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    assert maker["main"]([*SMALL, "--work-dir", str(folder)]) == 0
    return folder


SMALL = ["--hours", "0.003", "--lively-hours", "0.003", "--dev", "2", "--test", "2"]


def test_lists_recordings_and_phones_agree(work_dir: Path) -> None:
    corpus = work_dir / "corpus"
    assert (corpus / ".done").is_file()
    for split in ("train", "phrases", "lively", "dev", "test", "lively_dev"):
        tables = {
            name: dict(line.split(maxsplit=1) for line in (corpus / split / name).read_text().splitlines())
            for name in ("wav.scp", "text", "utt2spk", "phones")
        }
        assert len({tuple(table) for table in tables.values()}) == 1
        listed = read_manifest(corpus / f"{split}.jsonl")
        assert [item.utt_id for item in listed] == list(tables["text"])
        assert {item.utt_id: item.text for item in listed} == tables["text"]
        assert {item.utt_id: item.speaker for item in listed} == tables["utt2spk"]
        assert {item.utt_id: str(item.audio_path) for item in listed} == tables["wav.scp"]
        by_speaker = dict(line.split(maxsplit=1) for line in (corpus / split / "spk2utt").read_text().splitlines())
        assert {u: s for s, utts in by_speaker.items() for u in utts.split()} == tables["utt2spk"]
        for utt_id, path in tables["wav.scp"].items():
            info = soundfile.info(path)
            assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", 16_000, 1)
            phones = [item.split(":") for item in tables["phones"][utt_id].split()]
            ends = [float(end) for _, end in phones]
            assert ends == sorted(ends)
            assert ends[-1] == pytest.approx(info.duration, abs=0.15)
            assert {phone for phone, _ in phones} <= US_ENGLISH_PHONES | {"pau"}
    assert json.loads((corpus / "corpus.json").read_text())["train"]["hours"] > 0


def read_aloud(maker: dict[str, Any], flite: str, text: str = "The grey heron waited.", **changes: Any) -> Any:
    reading = maker["Reading"]("train", "utt", "slt", text, 1.0, 1.0, 0.5)._replace(**changes)
    return maker["synthesise"](reading, flite)


def test_words_at_a_rate_of_one_are_read_as_without_rates(maker: dict[str, Any], flite: str) -> None:
    plain, lively = (read_aloud(maker, flite, rate=0.9, word_rates=rates) for rates in ((), (1.0,) * 4))
    assert (plain.waveform == lively.waveform).all() and plain.phones == lively.phones


def test_a_word_at_half_the_rate_lasts_twice_as_long_and_the_others_as_long_as_before(
    maker: dict[str, Any], flite: str
) -> None:
    plain = read_aloud(maker, flite)
    slow = read_aloud(maker, flite, word_rates=(1.0, 1.0, 0.5, 1.0))
    assert [phone for phone, _ in plain.phones] == [phone for phone, _ in slow.phones]
    seconds = [[end - start for (_, start), (_, end) in pairwise(speech.phones)] for speech in (plain, slow)]
    phones = [phone for phone, _ in plain.phones][1:]
    heron = slice(phones.index("hh"), phones.index("w"))  # dh ax g r ey | hh eh r ax n | w ey t ax d
    before, after = (sum(row[heron]) for row in seconds)
    assert after == pytest.approx(2 * before, rel=0.02)
    assert sum(seconds[1]) - after == pytest.approx(sum(seconds[0]) - before, abs=0.02)


def test_half_of_the_vowels_are_others_near_them_and_consonants_stay(
    maker: dict[str, Any], lively_plan: list[Any], flite: str
) -> None:
    enliven = maker["read_some_lively"].__globals__["enliven"].__globals__
    lexicon = enliven["pronounce_texts"](["Market, the"], flite)  # m aa r k ax t, dh ax
    sentence = lively_plan[0].reading._replace(text=" ".join(["Market, the"] * 400))
    said = enliven["read_lively"](sentence, random.Random(3), lexicon).said
    changed = {phones for phones in said[::2] if phones}
    assert changed == {f"m {vowel} r k ax t" for vowel in enliven["NEAR_VOWELS"]["aa"]}
    assert 0.4 < sum(phones != "" for phones in said[::2]) / 400 < 0.6
    assert set(said[1::2]) == {""}


def test_a_word_is_said_by_the_phones_it_is_given(maker: dict[str, Any], flite: str) -> None:
    plain = read_aloud(maker, flite, word_rates=(1.0,) * 4)
    other = read_aloud(maker, flite, word_rates=(1.0,) * 4, said=("", "g r iy", "", ""))
    before, after = ([phone for phone, _ in speech.phones] for speech in (plain, other))
    place = before.index("ey")
    assert after == [*before[:place], "iy", *before[place + 1 :]]


def test_a_pause_is_heard_behind_its_word(maker: dict[str, Any], flite: str) -> None:
    spoken = read_aloud(maker, flite, word_rates=(1.0,) * 4, pauses=(1,)).phones
    phones = [phone for phone, _ in spoken]
    place = phones.index("ey") + 1
    assert phones[place : place + 2] == ["pau", "hh"]
    assert spoken[place][1] - spoken[place - 1][1] > 0.05


def test_a_rerun_makes_only_what_is_missing(maker: dict[str, Any], work_dir: Path) -> None:
    recordings = sorted((work_dir / "corpus" / "audio").rglob("*.flac"))
    before = {path: path.stat().st_mtime_ns for path in recordings}
    samples = soundfile.read(recordings[0], dtype="int16")[0]
    recordings[0].unlink()
    assert maker["main"]([*SMALL, "--work-dir", str(work_dir)]) == 0
    assert [path for path in recordings if path.stat().st_mtime_ns != before[path]] == recordings[:1]
    assert (soundfile.read(recordings[0], dtype="int16")[0] == samples).all()


def test_another_plan_is_refused_in_the_same_folder(
    maker: dict[str, Any], work_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert maker["main"]([*SMALL, "--work-dir", str(work_dir), "--seed", "8"]) == 1
    assert "rm -r" in capsys.readouterr().err


def test_a_size_of_nothing_is_wrong_usage(
    maker: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--hours", "0"], ["--lively-hours", "-1"], ["--dev", "0"], ["--test", "0"]):
        assert maker["main"]([*words, "--work-dir", str(tmp_path)]) == 2
        assert "must be positive" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_every_phone_of_american_english_is_spoken(plan: list[Any], flite: str) -> None:
    command = [flite, "-voice", "kal16", "-ps", "-t", text_of(plan), "-o", "none"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert set(printed.split()) >= US_ENGLISH_PHONES
