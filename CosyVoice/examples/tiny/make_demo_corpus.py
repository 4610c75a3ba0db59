"""Make the demo corpus: short English sentences of our own, read by four flite voices.

In: nothing but Debian's `flite` (2.2) and the sentences below. Out: `json/demo_audio/<voice>/*.flac` (16 kHz, 16 bit,
mono) and the manifests `json/train.jsonl` (60 utterances) and `json/test.jsonl` (15 utterances, no sentence of which
occurs in train). The corpus is committed; this script is only needed to make it again:

    apt-get update && apt-get install -y flite
    python CosyVoice/examples/tiny/make_demo_corpus.py --output-dir json                              (10 seconds)

Every utterance has its own pitch, and every word its own rate and vowels, drawn from `--seed` (see `flite_speech.py`):
as with people, and not as with flite, the text does not say how its words sound. The samples depend on the seed and
flite's version only. Exit codes: 0 done, 1 error, 2 wrong usage.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from flite_speech import (
    SAMPLE_RATE_HZ,
    VOICES,
    Reading,
    enliven,
    find_flite,
    pitch_on_grid,
    synthesise,
)

import taste
from cosyvoice.utils.atomic import write_text
from cosyvoice.utils.settings import Settings, run_script

OUTPUT_DIR = taste.REPOSITORY / "json"  # folder of the manifests; the recordings go to its demo_audio/
SEED = 7  # of rates, pitches and levels

_RATE_RANGE = (0.82, 1.00)  # speaking rate, 1 = the voice's own (flite is a fast reader)
_PITCH_RANGE = (0.92, 1.08)  # factor on the voice's own pitch
_PEAK_RANGE = (0.35, 0.75)  # absolute peak of the waveform
_MAX_CORPUS_BYTES = 5_000_000

_TRAIN_SENTENCES = (
    "The grey heron waited beside the quiet river.",
    "Please bring the blue kettle back to the kitchen.",
    "Seven small boats left the harbour before noon.",
    "She measured the garden with a piece of yellow rope.",
    "Our train was late, so we walked across the bridge.",
    "A warm wind carried the smell of fresh bread.",
    "He keeps his father's watch in a wooden box.",
    "The children were singing under the old oak tree.",
    "I thought the moon looked larger last night.",
    "Nobody could explain why the bell rang twice.",
    "Put the heavy books on the lowest shelf.",
    "They painted the front door a bright shade of green.",
    "The doctor asked me to breathe slowly and relax.",
    "We usually buy cheese and apples at the market.",
    "A young fox jumped over the broken fence.",
    "The teacher wrote three questions on the board.",
    "My sister plays the violin every Thursday evening.",
    "There is enough water in the well for the village.",
    "The pilot saw a thin layer of cloud above the coast.",
    "Can you hear the rain falling on the roof?",
    "He found five silver coins inside the clay jar.",
    "The judge read the letter in a low voice.",
    "Fresh snow covered the road to the valley.",
    "She opened the window and called her brother's name.",
    "The engine made a strange noise and then stopped.",
    "Both of them enjoy fishing in the early morning.",
    "The baker sold his last loaf of brown bread.",
    "We should leave the house before the storm begins.",
    "A dozen yellow birds rested on the garden wall.",
    "The museum closes at six o'clock on Sunday.",
    "I will join you after I finish this short letter.",
    "The farmer pushed his cart along the muddy path.",
    "Her new shoes are too tight for a long walk.",
    "The orange cat slept beside the kitchen fire.",
    "Why did you choose the road across the hills?",
    "The soldiers marched through the empty square.",
    "Thick smoke rose from the chimney of the small house.",
    "You may borrow my bicycle until next Friday.",
    "The judge and the doctor are very old friends.",
    "A wide river runs between the two villages.",
    "The nurse gave the boy a spoon of bitter syrup.",
    "Light from the harbour shone on the dark water.",
    "He usually drinks his coffee without any sugar.",
    "The little girl drew a picture of a huge whale.",
    "Nine of the ten questions were easy to answer.",
    "The garden behind the school is full of roses.",
    "Please close the window, the wind is too cold.",
    "My uncle repairs clocks in a shop near the bridge.",
    "The captain knew every rock along the coast.",
    "Choose a ripe pear and cut it into thin pieces.",
    "The azure vase on the shelf was a treasure.",
    "They could not measure the height of the waves.",
    "Two brown horses stood quietly in the shade.",
    "The old bridge was built from stone and iron.",
    "She has heard that story a thousand times before.",
    "The boy threw a smooth stone into the pond.",
    "We watched the stars above the empty beach.",
    "The village choir will sing again this evening.",
    "Vivid colours appeared in the evening sky.",
    "He rubbed his hands together to keep them warm.",
)
_TEST_SENTENCES = (
    "The old doctor lives in the house near the bridge.",
    "A thin layer of snow covered the garden wall.",
    "She closed the door and walked to the market.",
    "The boy found a silver watch on the beach.",
    "We heard the village bell in the early morning.",
    "My brother keeps two brown horses in the valley.",
    "The wind carried the smoke across the river.",
    "Please put the bread and cheese on the shelf.",
    "Three yellow boats rested in the quiet harbour.",
    "The teacher asked why the train was late.",
    "He drew a picture of the moon above the hills.",
    "Her sister will join us on Friday evening.",
    "The cat jumped through the kitchen window.",
    "I usually read a letter before I answer it.",
    "Cold water runs under the stone bridge.",
)


def plan_readings(seed: int) -> list[Reading]:
    """Give every sentence a voice, a rate, a pitch and a level.

    Args:
        seed: of the private random generator; the global one is not touched.

    Returns:
        one reading a sentence, train before test; the voices take turns.
    """
    draw = random.Random(seed)
    readings = []
    for split, sentences in (("train", _TRAIN_SENTENCES), ("test", _TEST_SENTENCES)):
        for number, text in enumerate(sentences):
            voice = VOICES[number % len(VOICES)]
            pitch = pitch_on_grid(draw.uniform(*_PITCH_RANGE))
            rate, peak = round(draw.uniform(*_RATE_RANGE), 2), round(draw.uniform(*_PEAK_RANGE), 2)
            readings.append(Reading(split, f"demo-{split}-{voice}-{number:03d}", voice, text, rate, pitch, peak))
    return readings


def write_corpus(output_dir: Path, seed: int) -> int:
    """Write the recordings and then the two manifests.

    Args:
        output_dir: the folder of the manifests; the recordings go to its `demo_audio/`.
        seed: see `plan_readings`.

    Returns:
        the corpus's size in bytes.

    Raises:
        FileNotFoundError: flite or a voice is missing.
        ValueError: the corpus came out larger than 5 MB.
    """
    flite = find_flite()
    lines: dict[str, list[str]] = {"train": [], "test": []}
    size_bytes = 0
    for reading in enliven(plan_readings(seed), random.Random(f"{seed}-words"), flite):
        relative_path = Path("demo_audio") / reading.voice / f"{reading.utt_id}.flac"
        path = output_dir / relative_path
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(
            path, synthesise(reading, flite).waveform, SAMPLE_RATE_HZ, subtype="PCM_16", compression_level=1.0
        )
        size_bytes += path.stat().st_size
        entry = {
            "utt_id": reading.utt_id,
            "audio_path": relative_path.as_posix(),
            "text": reading.text,
            "speaker": reading.voice,
            "language": "en",
        }
        lines[reading.split].append(json.dumps(entry, ensure_ascii=False))
    if size_bytes > _MAX_CORPUS_BYTES:
        raise ValueError(f"the corpus has {size_bytes} bytes, over {_MAX_CORPUS_BYTES}: shorten or drop sentences")
    for split, split_lines in lines.items():
        write_text(output_dir / f"{split}.jsonl", "\n".join(split_lines) + "\n")
    return size_bytes


def run(settings: Settings) -> None:
    """Make the corpus and say what comes next.

    Args:
        settings: OUTPUT_DIR and SEED.
    """
    size_bytes = write_corpus(settings.output_dir, settings.seed)
    print(f"{len(_TRAIN_SENTENCES)} train and {len(_TEST_SENTENCES)} test utterances, {size_bytes / 1e6:.2f} MB")
    print(f"next: python utt2text_and_feature.py --jsonl {settings.output_dir / 'train.jsonl'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
