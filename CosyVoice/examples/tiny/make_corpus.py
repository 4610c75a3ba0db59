"""Make the tiny recipe's corpus: three hours of grammar sentences, read by flite as 44 speakers.

In: nothing but Debian's `flite` (2.2), `grammar.py` and the demo's manifests, none of whose sentences is used. Out, in
`<work-dir>/corpus`: `audio/<speaker>/<utterance>.flac` (16 kHz, 16 bit, mono), for each of train, dev and test
`wav.scp`, `text`, `utt2spk`, `spk2utt` and `phones` (what flite spoke, each phone with its end in seconds) and a
manifest, such as `train.jsonl`, then `corpus.json` with the counts and, last, `.done`; `settings.json` has what it was
made with. Three more splits: `phrases` has each word alone and two or three words cut out of train, from which the
language model learns how a word sounds before it can find its place in a sentence. In `lively` and `lively_dev` each
word has a rate and vowels of its own and pauses are put between words, which no text foretells: what TASTE is for.

    apt-get update && apt-get install -y flite
    python CosyVoice/examples/tiny/make_corpus.py --work-dir CosyVoice/examples/tiny/work               (4 minutes)
    python CosyVoice/examples/tiny/make_corpus.py --work-dir /tmp/work --hours 0.02 --lively-hours 0.01 (1 minute)

A speaker is one of flite's four voices at a pitch and a rate of its own. An interrupted run goes on where it stopped.
Exit codes: 0 done, 1 error, 2 wrong usage, 130/143 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import soundfile
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import PLAN_FILE
from flite_speech import (
    SAMPLE_RATE_HZ,
    VOICES,
    Reading,
    enliven,
    find_flite,
    pitch_on_grid,
    synthesise,
)
from grammar import SentenceMaker, sentence_key, words_of

import taste
from cosyvoice.utils.atomic import atomic_path, write_text
from cosyvoice.utils.interrupt import StopRequest
from cosyvoice.utils.settings import parse_settings
from taste.manifest import read_manifest

WORK_DIR = Path(__file__).resolve().parent / "work"  # corpus/ is made in it
HOURS = 3.0  # speech in train
LIVELY_HOURS = 1.0  # speech in lively; 0: none
DEV = 100  # utterances in dev, and in lively_dev
TEST = 200  # utterances in test
SEED = 7  # of sentences, speakers and their order

_SPEAKERS_PER_VOICE = 11
# Of the speakers: factors on the voice's own pitch. Beyond them pocketsphinx, which judges the model, mistakes at least
# a tenth of the words more than in the middle of the range.
_PITCH_RANGES = {"kal16": (0.98, 1.12), "awb": (0.96, 1.12), "rms": (0.98, 1.12), "slt": (0.86, 1.0)}
_RATE_RANGE = (0.78, 1.05)  # of the speakers: 1 = the voice's own rate
_RATE_JITTER = 0.03  # of an utterance, relative to its speaker's rate
_PEAK_RANGE = (0.35, 0.75)  # absolute peak of an utterance's waveform
_SECONDS_PER_CHARACTER = {"kal16": 0.0491, "awb": 0.0558, "rms": 0.0628, "slt": 0.0535}  # measured at rate 1
_EDGE_SECONDS = 0.16  # silence before and after the speech together
_PARALLEL = os.cpu_count() or 1  # flite processes at a time
_BATCH = 128  # utterances between two looks at Ctrl-C
_SPLITS = ("train", "phrases", "lively", "dev", "test", "lively_dev")
_LIVELY_SPLITS = ("lively", "lively_dev")
_READINGS_ALONE = 4  # of each word, in phrases
_PHRASES_A_SENTENCE = 0.6  # of 2 or 3 words, cut out of train's sentences
_PHRASE_WORDS = (2, 3)


class Speaker(NamedTuple):
    """One of the corpus's speakers."""

    speaker_id: str  # as in slt-07
    voice: str
    pitch: float  # factor on the voice's own
    rate: float  # 1 = the voice's own


class Planned(NamedTuple):
    """An utterance to make."""

    speaker_id: str
    reading: Reading


class Made(NamedTuple):
    """What was noted of a finished utterance."""

    seconds: float
    phones: tuple[str, ...]  # each with its end, as in dh:0.251


class Interrupted(Exception):  # noqa: N818  (no error: a person's wish)
    """Ctrl-C came and the batch in work has been saved; the argument is the exit code."""


def plan_speakers(seed: int) -> list[Speaker]:
    """Spread pitches evenly over each voice's speakers, and rates evenly but in random order.

    Args:
        seed: of the private random generator.

    Returns:
        44 speakers, voice by voice.
    """
    draw = random.Random(f"{seed}-speakers")
    speakers = []
    for voice in VOICES:
        steps = [number / (_SPEAKERS_PER_VOICE - 1) for number in range(_SPEAKERS_PER_VOICE)]
        rate_steps = draw.sample(steps, len(steps))
        for number, (pitch_step, rate_step) in enumerate(zip(steps, rate_steps, strict=True)):
            lowest, highest = _PITCH_RANGES[voice]
            pitch = lowest + pitch_step * (highest - lowest)
            rate = _RATE_RANGE[0] + rate_step * (_RATE_RANGE[1] - _RATE_RANGE[0])
            speakers.append(Speaker(f"{voice}-{number:02d}", voice, pitch_on_grid(pitch), round(rate, 3)))
    return speakers


def plan_corpus(
    hours: float, lively_hours: float, dev: int, test: int, seed: int, forbidden: Sequence[str]
) -> list[Planned]:
    """Decide what is said, by whom and how.

    Args:
        hours: speech in train, by an estimate that is a few per cent off.
        lively_hours: speech in lively, by the same estimate, pauses not counted; 0: neither lively nor lively_dev.
        dev: utterances in dev, and in lively_dev.
        test: utterances in test.
        seed: of everything drawn.
        forbidden: sentences that may not occur.

    Returns:
        the utterances of all splits, as flite would read them; the speakers take turns, and no sentence comes twice.
    """
    speakers = plan_speakers(seed)
    unseen = SentenceMaker(f"{seed}-unseen", forbidden)
    plan = [
        planned
        for split, utterances in (("dev", dev), ("test", test))
        for planned in _read_in_turns(split, unseen.sentence, speakers, seed, utterances, float("inf"))
    ]
    if lively_hours:
        plan += _read_in_turns("lively_dev", unseen.sentence, speakers, seed, dev, float("inf"))
    heldout = [planned.reading.text for planned in plan]
    train = SentenceMaker(f"{seed}-train", [*forbidden, *heldout])
    sentences = list(_read_in_turns("train", train.sentence, speakers, seed, None, hours * 3600))
    phrases = cut_phrases([planned.reading.text for planned in sentences], seed)
    next_phrase = iter(phrases).__next__
    short = _read_in_turns("phrases", next_phrase, speakers, seed, len(phrases), float("inf"))
    lively = _read_in_turns("lively", train.sentence, speakers, seed, None, lively_hours * 3600)
    return [*sentences, *short, *lively, *plan]


def read_some_lively(plan: Sequence[Planned], seed: int, flite: str) -> list[Planned]:
    """Have the utterances of the lively splits read lively.

    Args:
        plan: as `plan_corpus` makes it.
        seed: of what is drawn.
        flite: path of the flite program.

    Returns:
        the plan, in the same order.
    """
    lively = {
        reading.utt_id: reading
        for split in _LIVELY_SPLITS
        for reading in enliven(
            [planned.reading for planned in plan if planned.reading.split == split],
            random.Random(f"{seed}-{split}-words"),
            flite,
        )
    }
    return [planned._replace(reading=lively.get(planned.reading.utt_id, planned.reading)) for planned in plan]


def cut_phrases(sentences: Sequence[str], seed: int) -> list[str]:
    """Take sentences apart: every word alone, and stretches of two or three words.

    Args:
        sentences: train's.
        seed: of the private random generator.

    Returns:
        the phrases in random order, with a capital first letter and a full stop.
    """
    draw = random.Random(f"{seed}-phrases")
    phrases = sorted({word for text in sentences for word in words_of(text)}) * _READINGS_ALONE
    for text in draw.sample(sentences, round(_PHRASES_A_SENTENCE * len(sentences))):
        words = text.rstrip(".?").split()
        length = min(draw.randint(*_PHRASE_WORDS), len(words))
        first = draw.randint(0, len(words) - length)
        phrases.append(" ".join(words[first : first + length]).rstrip(","))
    draw.shuffle(phrases)
    return [phrase[0].upper() + phrase[1:] + "." for phrase in phrases]


def _read_in_turns(
    split: str,
    next_text: Callable[[], str],
    speakers: Sequence[Speaker],
    seed: int,
    utterances: int | None,
    seconds: float,
) -> Iterator[Planned]:
    """Give each speaker a sentence in turn until so many utterances or so many estimated seconds are reached."""
    draw = random.Random(f"{seed}-{split}")
    round_of_speakers: list[Speaker] = []
    for number in count():
        if number == utterances or seconds <= 0:
            return
        round_of_speakers = round_of_speakers or draw.sample(speakers, len(speakers))
        speaker = round_of_speakers.pop()
        text = next_text()
        rate = round(speaker.rate * draw.uniform(1 - _RATE_JITTER, 1 + _RATE_JITTER), 3)
        utt_id = f"{speaker.speaker_id}-{split}-{number:05d}"
        peak = round(draw.uniform(*_PEAK_RANGE), 2)
        yield Planned(speaker.speaker_id, Reading(split, utt_id, speaker.voice, text, rate, speaker.pitch, peak))
        seconds -= len(text) * _SECONDS_PER_CHARACTER[speaker.voice] / rate + _EDGE_SECONDS


def audio_path(corpus: Path, planned: Planned) -> Path:
    """Say where an utterance's recording is."""
    return corpus / "audio" / planned.speaker_id / f"{planned.reading.utt_id}.flac"


def make_recordings(corpus: Path, plan: Sequence[Planned], flite: str) -> dict[str, Made]:
    """Read aloud what has not been read yet.

    Args:
        corpus: the folder; finished recordings in it, and the notes on them in `made.tsv`, are kept.
        plan: the utterances.
        flite: path of the flite program.

    Returns:
        the notes on every utterance, by its id.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; what was made is kept.
    """
    notes = corpus / "made.tsv"
    made = _read_notes(notes)
    missing = [item for item in plan if item.reading.utt_id not in made or not audio_path(corpus, item).is_file()]
    if len(missing) < len(plan):
        print(f"{len(plan) - len(missing)} of {len(plan)} utterances are there already")
    torch.set_num_threads(1)

    def make(planned: Planned) -> Made:
        speech = synthesise(planned.reading, flite)
        with atomic_path(audio_path(corpus, planned)) as temporary:
            soundfile.write(temporary, speech.waveform, SAMPLE_RATE_HZ, subtype="PCM_16")
        phones = tuple(f"{phone}:{end:.3f}" for phone, end in speech.phones)
        return Made(round(len(speech.waveform) / SAMPLE_RATE_HZ, 4), phones)

    with StopRequest() as stop, ThreadPoolExecutor(_PARALLEL) as pool, tqdm(total=len(missing), unit="utt") as bar:
        for start in range(0, len(missing), _BATCH):
            batch = missing[start : start + _BATCH]
            with notes.open("a", encoding="utf-8") as file:
                for planned, result in zip(batch, pool.map(make, batch), strict=True):
                    made[planned.reading.utt_id] = result
                    file.write(f"{planned.reading.utt_id}\t{result.seconds}\t{' '.join(result.phones)}\n")
            bar.update(len(batch))
            if stop.requested:
                raise Interrupted(stop.exit_code)
    return made


def _read_notes(path: Path) -> dict[str, Made]:
    """Read the notes back; half a line, which a kill leaves at the end, is dropped from the file."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    rows = (line.split("\t") for line in whole.splitlines())
    return {utt_id: Made(float(seconds), tuple(phones.split())) for utt_id, seconds, phones in rows}


def write_lists(corpus: Path, plan: Sequence[Planned], made: dict[str, Made]) -> None:
    """Write each split's `wav.scp`, `text`, `utt2spk`, `spk2utt` and `phones`, and its manifest.

    Args:
        corpus: the folder.
        plan: the utterances.
        made: the notes on them.
    """
    for split in _SPLITS:
        items = sorted((item for item in plan if item.reading.split == split), key=lambda item: item.reading.utt_id)
        by_speaker: dict[str, list[str]] = {}
        for item in items:
            by_speaker.setdefault(item.speaker_id, []).append(item.reading.utt_id)
        lists = {
            "wav.scp": [f"{item.reading.utt_id} {audio_path(corpus, item).absolute()}" for item in items],
            "text": [f"{item.reading.utt_id} {item.reading.text}" for item in items],
            "utt2spk": [f"{item.reading.utt_id} {item.speaker_id}" for item in items],
            "spk2utt": [f"{speaker} {' '.join(utterances)}" for speaker, utterances in sorted(by_speaker.items())],
            "phones": [f"{item.reading.utt_id} {' '.join(made[item.reading.utt_id].phones)}" for item in items],
        }
        paths = {corpus / split / name: lines for name, lines in lists.items()}
        paths[corpus / f"{split}.jsonl"] = [json.dumps(_manifest_entry(corpus, item)) for item in items]
        for path, lines in paths.items():
            write_text(path, "".join(line + "\n" for line in lines))


def _manifest_entry(corpus: Path, planned: Planned) -> dict[str, str]:
    reading = planned.reading
    return {
        "utt_id": reading.utt_id,
        "audio_path": str(audio_path(corpus, planned).absolute()),
        "text": reading.text,
        "speaker": planned.speaker_id,
        "language": "en",
    }


def describe(plan: Sequence[Planned], made: dict[str, Made]) -> dict[str, Any]:
    """Count what the corpus holds.

    Args:
        plan: the utterances.
        made: the notes on them.

    Returns:
        speakers, and for each split hours, utterances, words, vocabulary, how often the rarest words come, and phones.
    """
    counts: dict[str, Any] = {"speakers": len({item.speaker_id for item in plan}), "voices": list(VOICES)}
    for split in _SPLITS:
        items = [item.reading for item in plan if item.reading.split == split]
        words = Counter(word for item in items for word in words_of(item.text))
        pairs = {pair for item in items for pair in pairwise(words_of(item.text))}
        phones = Counter(phone.split(":")[0] for item in items for phone in made[item.utt_id].phones)
        counts[split] = {
            "utterances": len(items),
            "hours": round(sum(made[item.utt_id].seconds for item in items) / 3600, 3),
            "words": words.total(),
            "vocabulary": len(words),
            "word_pairs": len(pairs),
            "rarest_word_comes": min(words.values(), default=0),
            "words_that_come_less_than_12_times": sum(number < 12 for number in words.values()),
            "speakers": len({item.speaker_id for item in plan if item.reading.split == split}),
            "phones": dict(phones.most_common()),
        }
    train_words = {word for item in plan if item.reading.split == "train" for word in words_of(item.reading.text)}
    test_words = {
        word for item in plan if item.reading.split in ("dev", "test") for word in words_of(item.reading.text)
    }
    counts["words_of_dev_and_test_not_in_train"] = sorted(test_words - train_words)
    return counts


def claim_folder(corpus: Path, plan: Sequence[Planned]) -> None:
    """Note which plan the folder is for, or check that it is this one.

    Args:
        corpus: the folder; made if missing.
        plan: the utterances.

    Raises:
        ValueError: the folder holds the recordings of another plan.
    """
    fingerprint = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    mark = corpus / PLAN_FILE
    if mark.exists() and mark.read_text(encoding="utf-8").strip() != fingerprint:
        raise ValueError(
            f"{corpus} holds a corpus made with other settings (--hours, --lively-hours, --dev, --test, --seed) or by "
            f"another grammar; remove it (rm -r {corpus}) or give another --work-dir"
        )
    write_text(mark, fingerprint + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    if settings.hours <= 0 or settings.lively_hours < 0 or settings.dev < 1 or settings.test < 1:
        print("error: --hours, --dev and --test must be positive, and --lively-hours not negative", file=sys.stderr)
        return 2
    corpus = settings.work_dir / "corpus"
    print(f"settings of {corpus}:\n{settings.describe()}\n", flush=True)
    try:
        flite = find_flite()
        demo = [
            item.text for split in ("train", "test") for item in read_manifest(taste.REPOSITORY / f"json/{split}.jsonl")
        ]
        plan = plan_corpus(settings.hours, settings.lively_hours, settings.dev, settings.test, settings.seed, demo)
        assert not {sentence_key(text) for text in demo} & {sentence_key(item.reading.text) for item in plan}
        plan = read_some_lively(plan, settings.seed, flite)
        claim_folder(corpus, plan)
        settings.save(corpus / "settings.json")
        made = make_recordings(corpus, plan, flite)
    except Interrupted as interrupted:
        print(f"stopped; the same command goes on: {len(_read_notes(corpus / 'made.tsv'))} utterances are made")
        return interrupted.args[0]
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: flite failed ({error}): {error.stderr}", file=sys.stderr)
        return 1
    write_lists(corpus, plan, made)
    counts = describe(plan, made)
    write_text(corpus / "corpus.json", json.dumps(counts, indent=1) + "\n")
    for split in _SPLITS:
        print(f"{split}: " + ", ".join(f"{counts[split][key]} {key}" for key in ("utterances", "hours", "vocabulary")))
    write_text(corpus / ".done", "complete\n")
    print(f"{counts['speakers']} speakers; the counts are in {corpus / 'corpus.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
