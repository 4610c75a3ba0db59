"""A small stand-in for what the hubs publish: the right names, formats that hold, content without meaning."""

import io
import json
import random
import zipfile
from collections.abc import Mapping

COSYVOICE_REPOSITORIES = {"ModelScope": "iic/CosyVoice-300M", "Hugging Face": "FunAudioLLM/CosyVoice-300M"}
WHISPER_REPOSITORIES = {"ModelScope": "AI-ModelScope/whisper-large-v3", "Hugging Face": "openai/whisper-large-v3"}


def published(hub: str, seed: int = 0, llm_bytes: int = 40_000) -> dict[str, dict[str, bytes]]:
    """The repositories of one hub; the same seed gives the same files on either.

    Args:
        hub: `ModelScope` or `Hugging Face`.
        seed: another one gives files of the same names and sizes with other content.
        llm_bytes: about the size of llm.pt.

    Returns:
        repository -> path -> content.
    """
    noise = random.Random(seed)
    cosyvoice = {
        "cosyvoice.yaml": b"sample_rate: 22050\nllm: null\n" + b"# seed %d\n" % seed,
        "llm.pt": _zip(noise, "llm/data.pkl", llm_bytes),
        "flow.pt": _zip(noise, "flow/data.pkl", 20_000),
        "hift.pt": _zip(noise, "hift/data.pkl", 5_000),
        "campplus.onnx": _onnx(noise, 3_000),
        "speech_tokenizer_v1.onnx": _onnx(noise, 7_000),
        "README.md": b"# CosyVoice\n",
        "llm.llm.fp16.zip": _zip(noise, "llm/constants.pkl", 9_000),
        "flow.decoder.estimator.fp32.onnx": _onnx(noise, 4_000),
        "asset/dingding.png": noise.randbytes(2_000),
    }
    whisper = {
        "config.json": b'{"model_type": "whisper"}\n',
        "preprocessor_config.json": b"{}\n",
        "model.safetensors": _safetensors(noise, 30_000),
        "pytorch_model.bin": noise.randbytes(8_000),
        "added_tokens.json": b'{"<|en|>": 1}\n',
        "generation_config.json": b"{}\n",
        "merges.txt": b"#version: 0.2\n",
        "normalizer.json": b'{"colour": "color"}\n',
        "special_tokens_map.json": b"{}\n",
        "tokenizer.json": b'{"version": "1.0"}\n',
        "tokenizer_config.json": b"{}\n",
        "vocab.json": b'{"a": 0}\n',
    }
    return {COSYVOICE_REPOSITORIES[hub]: cosyvoice, WHISPER_REPOSITORIES[hub]: whisper}


def write_folder(folder, files: Mapping[str, bytes]) -> None:
    """Write files under a folder.

    Args:
        folder: made if missing.
        files: path -> content.
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _zip(noise: random.Random, name: str, size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), noise.randbytes(size))
    return buffer.getvalue()


def _onnx(noise: random.Random, size: int) -> bytes:
    """ir_version 8 (field 1, a number), then a graph (field 7, `size` bytes)."""
    length = bytes([size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
    return b"\x08\x08\x3a" + length + noise.randbytes(size)


def _safetensors(noise: random.Random, size: int) -> bytes:
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + noise.randbytes(size)
