"""Make the demo corpus: short English sentences of our own, read by four flite voices.

In: nothing but Debian's `flite` (2.2) and the sentences below. Out: `json/demo_audio/<voice>/*.flac` (16 kHz, 16 bit,
mono) and the manifests `json/train.jsonl` (60 utterances) and `json/test.jsonl` (15 utterances, no sentence of which
occurs in train). The corpus is committed; this script is only needed to make it again:

    apt-get update && apt-get install -y flite
    python CosyVoice/examples/tiny/make_demo_corpus.py --output-dir json

Every utterance has its own pitch, and every word its own rate and vowels, drawn from `--seed` (see `flite_speech.py`):
as with people, and not as with flite, the text does not say how its words sound. The samples depend on the seed and
flite's version only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
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

RATE_RANGE = (0.82, 1.00)  # speaking rate, 1 = the voice's own (flite is a fast reader)
PITCH_RANGE = (0.92, 1.08)  # factor on the voice's own pitch
PEAK_RANGE = (0.35, 0.75)  # absolute peak of the waveform
MAX_CORPUS_BYTES = 5_000_000

TRAIN_SENTENCES = (
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
TEST_SENTENCES = (
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
    for split, sentences in (("train", TRAIN_SENTENCES), ("test", TEST_SENTENCES)):
        for number, text in enumerate(sentences):
            voice = VOICES[number % len(VOICES)]
            pitch = pitch_on_grid(draw.uniform(*PITCH_RANGE))
            rate, peak = round(draw.uniform(*RATE_RANGE), 2), round(draw.uniform(*PEAK_RANGE), 2)
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
        ValueError: the corpus came out larger than 4 MB.
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
    if size_bytes > MAX_CORPUS_BYTES:
        raise ValueError(f"the corpus has {size_bytes} bytes, over {MAX_CORPUS_BYTES}: shorten or drop sentences")
    for split, split_lines in lines.items():
        manifest = output_dir / f"{split}.jsonl"
        unfinished = manifest.with_suffix(".jsonl.tmp")
        unfinished.write_text("\n".join(split_lines) + "\n", encoding="utf-8")
        os.replace(unfinished, manifest)
    return size_bytes


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and make the corpus; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_dir = taste.REPOSITORY / "json"
    parser.add_argument("--output-dir", "--output_dir", type=Path, default=default_dir, help="folder of the manifests")
    parser.add_argument("--seed", type=int, default=7, help="of rates, pitches and levels")
    args = parser.parse_args(argv)
    try:
        size_bytes = write_corpus(args.output_dir, args.seed)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(TRAIN_SENTENCES)} train and {len(TEST_SENTENCES)} test utterances, {size_bytes / 1e6:.2f} MB")
    print(f"next: python utt2text_and_feature.py --jsonl {args.output_dir / 'train.jsonl'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
