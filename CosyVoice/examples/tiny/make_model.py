"""Build a model folder in the released CosyVoice-300M layout from a seed, small or at full size, without training.

    python CosyVoice/examples/tiny/make_model.py --size tiny --output CosyVoice-tiny      (10 seconds, 30 MB)
    python CosyVoice/examples/tiny/make_model.py --size 300m --output /tmp/CosyVoice-300M (minutes, 5.4 GB)

In: the sizes' training configurations (conf/cosyvoice.yaml), and the demo corpus (`json/`), to which the audio encoders
are scaled. Out: cosyvoice.yaml, llm.pt, flow.pt, hift.pt,
campplus.onnx, speech_tokenizer_v1.onnx, spk2info.pt, whisper/ and a README.md that says what the folder is. The 300m
folder has the published shapes and stands in for weights that cannot be had; it says nothing anyone could understand.
Exit codes: 0 done, 1 error, 2 wrong usage.
"""

from __future__ import annotations

import os
import shutil
import string
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from s3_tokenizer_onnx import build_speech_tokenizer
from s3tokenizer.model import ModelConfig
from seeded_encoders import FITTED_CODES, WHISPER_STATE_SCALE, seed_convolutions, seed_s3_tokenizer
from speaker_onnx import build_speaker_encoder

import taste
from cosyvoice.utils.audio import speaker_fbank, whisper_log_mel
from cosyvoice.utils.config import load_config, read_config
from cosyvoice.utils.onnx_session import OnnxSession
from cosyvoice.utils.rates import SPEECH_SAMPLE_RATE_HZ
from cosyvoice.utils.settings import Settings, run_script
from taste.audio import read_audio
from taste.manifest import Utterance, read_manifest
from taste.s3_units import HEAD_WIDTH

SIZE = "tiny"  # tiny (30 MB), 300m (the published sizes)
OUTPUT = taste.REPOSITORY / "CosyVoice-tiny"  # folder to make
SEED = 0  # of every random number
MANIFEST = taste.REPOSITORY / "json" / "train.jsonl"  # recordings that the encoders are scaled to
OVERWRITE = False  # replace OUTPUT if it exists

_EXAMPLES = taste.REPOSITORY / "CosyVoice" / "examples"
_README_TEMPLATE = Path(__file__).with_name("model_readme.md.in")
_PARTS = ("llm", "flow", "hift")
_MEL_BINS = 128
_S3_POSITIONS = 1500  # 30 s
_OUTPUT_HEAD_STD = 0.02  # the language model starts near a uniform guess, ln 4097 = 8.32
_SPECIAL_TOKENS = 8  # vocabulary of the tiny Whisper, whose decoder is never used


@dataclass(frozen=True)
class ModelSize:
    """Where the sizes of llm, flow and hift stand, and the sizes of the encoders."""

    config: Path  # cosyvoice.yaml
    s3_width: int
    s3_layers: int
    whisper_width: int
    whisper_heads: int
    whisper_encoder_layers: int
    whisper_decoder_layers: int
    whisper_tokens: int
    fitting_utterances: int  # of the demo corpus, to which the encoders are scaled
    half_on_disk: bool  # .pt files in float16


_TINY = ModelSize(
    config=_EXAMPLES / "tiny" / "conf" / "cosyvoice.yaml",
    s3_width=128,
    s3_layers=3,
    whisper_width=128,
    whisper_heads=4,
    whisper_encoder_layers=8,
    whisper_decoder_layers=1,
    whisper_tokens=_SPECIAL_TOKENS,
    fitting_utterances=60,
    half_on_disk=True,
)
_FULL = ModelSize(
    config=_EXAMPLES / "libritts" / "cosyvoice" / "conf" / "cosyvoice.yaml",
    s3_width=1280,
    s3_layers=6,
    whisper_width=1280,
    whisper_heads=20,
    whisper_encoder_layers=32,
    whisper_decoder_layers=32,
    whisper_tokens=51_866,
    fitting_utterances=8,
    half_on_disk=False,
)
_SIZES = {"tiny": _TINY, "300m": _FULL}


def build_folder(output: Path, size_name: str, seed: int, manifest: Path) -> None:
    """Write every file of a model folder.

    Args:
        output: an empty folder.
        size_name: a key of `_SIZES`.
        seed: of every random number.
        manifest: recordings that the encoders are scaled to, and whose speakers go into spk2info.pt.
    """
    size = _SIZES[size_name]
    utterances = read_manifest(manifest)
    waveforms = [read_audio(utterance.audio_path, SPEECH_SAMPLE_RATE_HZ).waveform for utterance in utterances]
    mels = [whisper_log_mel(waveform, _MEL_BINS) for waveform in waveforms[: size.fitting_utterances]]

    write_config(output / "cosyvoice.yaml", size_name, size)
    write_speech_tokenizer(output / "speech_tokenizer_v1.onnx", size, mels, seed)
    write_speakers(output, utterances, waveforms, seed)
    for part in _PARTS:
        write_part(output, part, size, seed)
    write_whisper(output / "whisper", size, mels, seed)


def write_config(path: Path, size_name: str, size: ModelSize) -> None:
    """Copy the size's training configuration, under a line that says what the weights are."""
    note = f"# {size_name} size: seeded, not trained (CosyVoice/examples/tiny/make_model.py)\n"
    path.write_text(note + size.config.read_text(encoding="utf-8"), encoding="utf-8")


def write_readme(path: Path, size_name: str, seed: int, output: str) -> None:
    """Fill the template of the folder's README."""
    size = _SIZES[size_name]
    dtype = "float16" if size.half_on_disk else "float32"
    template = string.Template(_README_TEMPLATE.read_text(encoding="utf-8"))
    values = asdict(size) | {"size": size_name, "seed": seed, "output": output, "codes": FITTED_CODES, "dtype": dtype}
    path.write_text(template.substitute(values), encoding="utf-8")


def write_speech_tokenizer(path: Path, size: ModelSize, mels: Sequence[Tensor], seed: int) -> None:
    """Seed an S3 tokenizer, fit it to log-mels [128, T], and write its graph."""
    codes = read_config(size.config, ["flow"])["flow"].arguments["vocab_size"]
    config = ModelConfig(
        n_mels=_MEL_BINS,
        n_audio_ctx=_S3_POSITIONS,
        n_audio_state=size.s3_width,
        n_audio_head=size.s3_width // HEAD_WIDTH,
        n_audio_layer=size.s3_layers,
        n_codebook_size=codes,
    )
    model = seed_s3_tokenizer(config, mels, seed)
    onnx.save(build_speech_tokenizer(model.state_dict(), config.n_audio_head), path)


def write_speakers(output: Path, utterances: Sequence[Utterance], waveforms: Sequence[Tensor], seed: int) -> None:
    """Write campplus.onnx, and spk2info.pt with what it gives for each speaker's recordings, averaged."""
    fbanks = [speaker_fbank(waveform) for waveform in waveforms]
    path = output / "campplus.onnx"
    onnx.save(build_speaker_encoder(fbanks, seed), path)
    session = OnnxSession(path)
    embeddings: dict[str, list[Tensor]] = {}
    for utterance, fbank in zip(utterances, fbanks, strict=True):
        vector = torch.from_numpy(session.run(fbank[None].numpy()))
        embeddings.setdefault(utterance.speaker or "unknown", []).append(vector)
    speakers = {name: {"embedding": torch.stack(vectors).mean(dim=0)} for name, vectors in embeddings.items()}
    torch.save(speakers, output / "spk2info.pt")


def write_part(output: Path, part: str, size: ModelSize, seed: int) -> None:
    """Build one part from the folder's own cosyvoice.yaml, with PyTorch's initialisation, and write its state dict."""
    torch.manual_seed(seed)
    module: nn.Module = load_config(output / "cosyvoice.yaml", [part])[part]
    if part == "llm":
        nn.init.normal_(module.llm_decoder.weight, std=_OUTPUT_HEAD_STD)
        nn.init.zeros_(module.llm_decoder.bias)
    weights = module.state_dict()
    if size.half_on_disk:
        weights = {key: value.half() if value.is_floating_point() else value for key, value in weights.items()}
    torch.save(weights, output / f"{part}.pt")


def write_whisper(folder: Path, size: ModelSize, mels: Sequence[Tensor], seed: int) -> None:
    """Write a Whisper in transformers' format, float16 as released, its front scaled to log-mels [128, T]."""
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    if size.whisper_tokens > _SPECIAL_TOKENS:
        special = {"bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50256, "decoder_start_token_id": 50258}
    else:
        special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 2}
    config = WhisperConfig(
        vocab_size=size.whisper_tokens,
        num_mel_bins=_MEL_BINS,
        d_model=size.whisper_width,
        encoder_layers=size.whisper_encoder_layers,
        encoder_attention_heads=size.whisper_heads,
        encoder_ffn_dim=4 * size.whisper_width,
        decoder_layers=size.whisper_decoder_layers,
        decoder_attention_heads=size.whisper_heads,
        decoder_ffn_dim=4 * size.whisper_width,
        init_std=size.whisper_width**-0.5,  # blocks that change what they get, at any width
        begin_suppress_tokens=None,
        dtype="float16",
        **special,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration._from_config(config, dtype=torch.float16)
    generator = torch.Generator().manual_seed(seed)
    encoder = model.model.encoder
    seed_convolutions(encoder.conv1, encoder.conv2, mels, WHISPER_STATE_SCALE, generator)
    model.save_pretrained(folder, max_shard_size="10GB")  # one file, as released
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for the owner only
    WhisperFeatureExtractor(feature_size=_MEL_BINS).save_pretrained(folder)


def run(settings: Settings) -> int:
    """Build the folder beside its place, and put it there.

    Args:
        settings: the script's constants.

    Returns:
        the exit code: 0, or 2 for a size that there is not.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    if settings.size not in _SIZES:
        print(f"error: --size is {settings.size!r}; expected one of {', '.join(_SIZES)}", file=sys.stderr)
        return 2
    output = settings.output.resolve()
    if output.exists() and not settings.overwrite:
        raise FileExistsError(f"{output} exists; choose another --output, or add --overwrite to replace it")

    torch.set_num_threads(1)  # sums, and so the weights, do not depend on the number of cores
    started = time.monotonic()
    unfinished = output.with_name(f".{output.name}.writing-{os.getpid()}")
    replaced = output.with_name(f".{output.name}.replaced-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        build_folder(unfinished, settings.size, settings.seed, settings.manifest)
        write_readme(unfinished / "README.md", settings.size, settings.seed, settings.output.name)
        if output.exists():
            output.rename(replaced)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)
    size_bytes = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {size_bytes / 1e6:.1f} MB in {time.monotonic() - started:.0f} s")
    print(f"next: python setup_cosyvoice.py --model-dir {settings.output} --verify-only --deep-verify")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    return run_script(__file__, globals(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
