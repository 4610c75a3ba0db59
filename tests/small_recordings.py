"""A corpus of the tiny recipe with two "speakers", and an S3 tokenizer with random weights, for its trainings."""

import math
from pathlib import Path

import onnx
import soundfile
import torch
from s3_tokenizer_onnx import build_speech_tokenizer
from s3tokenizer.model import ModelConfig, S3Tokenizer

RATE_HZ = 16_000


def write_corpus(work_dir: Path) -> Path:
    """Two "speakers", buzzes of two pitches, who say "the cat" in a few ways."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 6), ("dev", 2), ("test", 2)):
        folder = work_dir / "corpus" / split
        folder.mkdir(parents=True)
        lines: dict[str, list[str]] = {"wav.scp": [], "text": [], "utt2spk": [], "phones": []}
        for number in range(count):
            name, pitch_hz = ("low", 90.0) if number % 2 else ("high", 210.0)
            utt_id = f"{split}-{name}-{number}"
            time = torch.arange(RATE_HZ) / RATE_HZ
            wave = sum(torch.sin(2 * math.pi * pitch_hz * k * time) / k for k in range(1, 12)) * 0.2
            path = work_dir / "corpus" / f"{utt_id}.flac"
            soundfile.write(path, (wave + 0.01 * torch.randn(RATE_HZ, generator=generator)).numpy(), RATE_HZ)
            lines["wav.scp"].append(f"{utt_id} {path}")
            lines["text"].append(f"{utt_id} The cat.")
            lines["utt2spk"].append(f"{utt_id} {name}")
            lines["phones"].append(f"{utt_id} pau:0.100 dh:0.200 ax:0.300 k:0.450 ae:0.700 t:0.900 pau:1.000")
        for name, content in lines.items():
            (folder / name).write_text("\n".join(content) + "\n")
        torch.save({line.split()[0]: [7, 4, 9, 4, 4] * 10 for line in lines["text"]}, folder / "utt2speech_token.pt")
    return work_dir


def write_tokenizer(path: Path, width: int = 128, blocks: int = 2) -> Path:
    """An S3 tokenizer whose states depend on everything."""
    torch.manual_seed(3)
    sizes = ModelConfig(n_audio_state=width, n_audio_head=width // 64, n_audio_layer=blocks)
    model = S3Tokenizer("speech_tokenizer_v1", sizes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight[0].numel() ** -0.5 if weight.dim() > 1 else 0.2))
    onnx.save(build_speech_tokenizer(model.state_dict(), num_heads=width // 64), path)
    return path
