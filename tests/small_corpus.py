"""A corpus as make_corpus.py writes it, of words made of few phones, whose units follow from the phones."""

import random
from collections.abc import Mapping
from pathlib import Path

import torch

PHONES = ("pau", "ae", "ax", "dh", "eh", "ih", "iy", "k", "s", "t")
LEXICON = {
    "the": ("dh", "ax"),
    "cat": ("k", "ae", "t"),
    "sat": ("s", "ae", "t"),
    "tea": ("t", "iy"),
    "sick": ("s", "ih", "k"),
    "set": ("s", "eh", "t"),
}
UNITS_A_PHONE = 3
_UNIT_SECONDS = 0.02


def write_spoken_corpus(work_dir: Path, sizes: Mapping[str, int], words: int = 4) -> Path:
    """Write splits of so many utterances each: tables, units (below 40) and speaker vectors; no sound.

    Args:
        work_dir: corpus/ is made in it.
        sizes: utterances of each split.
        words: of an utterance.

    Returns:
        `work_dir`.
    """
    draw = random.Random(0)
    for split, count in sizes.items():
        folder = work_dir / "corpus" / split
        folder.mkdir(parents=True)
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": [], "phones": []}
        units = {}
        for number in range(count):
            utt_id, said = f"{split}-{number:03d}", draw.choices(sorted(LEXICON), k=words)
            phones = ["pau", *(phone for word in said for phone in LEXICON[word]), "pau"]
            ends = [_UNIT_SECONDS * UNITS_A_PHONE * (place + 1) for place in range(len(phones))]
            lines["wav.scp"].append(f"{utt_id} {folder}/{utt_id}.flac")
            lines["text"].append(f"{utt_id} {' '.join(said)}.")
            lines["utt2spk"].append(f"{utt_id} speaker")
            spoken = " ".join(f"{phone}:{end:.3f}" for phone, end in zip(phones, ends, strict=True))
            lines["phones"].append(f"{utt_id} {spoken}")
            units[utt_id] = [UNITS_A_PHONE * PHONES.index(phone) + n for phone in phones for n in range(UNITS_A_PHONE)]
        for name, content in lines.items():
            (folder / name).write_text("".join(line + "\n" for line in content))
        torch.save(units, folder / "utt2speech_token.pt")
        torch.save({utt_id: [1.0] * 192 for utt_id in units}, folder / "utt2embedding.pt")
    return work_dir
