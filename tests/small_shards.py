"""A data folder as stages 0 to 2 leave it, with made-up sounds, and the shards of stage 3."""

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import soundfile
import torch

RATE_HZ = 16_000
VOICES = 2


def make_folder(folder: Path, utterances: int, seconds: float = 0.6) -> Path:
    """Write wav.scp, text, utt2spk, embeddings and tokens of buzzing sounds, different in length and pitch."""
    folder.mkdir(parents=True)
    lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": []}
    tokens, by_utterance = {}, {}
    generator = torch.Generator().manual_seed(0)
    for number in range(utterances):
        utt, path = f"utt{number:02d}", folder / f"utt{number:02d}.wav"
        samples = int((seconds + 0.1 * (number % 4)) * RATE_HZ)
        soundfile.write(path, buzz(100 + 20 * number, samples), RATE_HZ)
        lines["wav.scp"].append(f"{utt} {path}")
        lines["text"].append(f"{utt} sound number {number}")
        lines["utt2spk"].append(f"{utt} voice{number % VOICES}")
        tokens[utt] = torch.randint(0, 4096, (round(50 * samples / RATE_HZ),), generator=generator).tolist()
        by_utterance[utt] = torch.randn(192, generator=generator)
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    torch.save(by_utterance, folder / "utt2embedding.pt")
    torch.save({f"voice{n}": torch.randn(192, generator=generator) for n in range(VOICES)}, folder / "spk2embedding.pt")
    torch.save(tokens, folder / "utt2speech_token.pt")
    return folder


def make_shards(folder: Path, utterances_a_shard: int) -> Path:
    """Run stage 3 on a data folder; returns data.list."""
    shards = folder / "parquet"
    flags = ["--src_dir", str(folder), "--des_dir", str(shards), "--num_utts_per_parquet", str(utterances_a_shard)]
    assert parquet_tool().main(flags) == 0
    return shards / "data.list"


def parquet_tool() -> ModuleType:
    """The script of stage 3, as a module."""
    return importlib.import_module("CosyVoice.tools.make_parquet_list")


def buzz(pitch_hz: float, samples: int, rate_hz: int = RATE_HZ) -> np.ndarray:
    """A sound with ten harmonics of a pitch, [samples]."""
    time = np.arange(samples) / rate_hz
    return 0.05 * sum(np.sin(2 * np.pi * harmonic * pitch_hz * time) / harmonic for harmonic in range(1, 11))
