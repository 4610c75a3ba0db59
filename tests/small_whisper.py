"""Makes a Whisper of a few layers and a short window, in transformers' format, with random weights."""

from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

WIDTH = 32
LAYERS = 4
WINDOW_FRAMES = 150  # 3 s


def write_small_whisper(
    folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, shard_size: str = "1GB"
) -> Path:
    """Write the folder and return it."""
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=128,
        vocab_size=50,
        max_source_positions=WINDOW_FRAMES,
        max_target_positions=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config)
    for layer in model.model.encoder.layers:  # fresh weights hardly change the stream: make the blocks differ
        for parameter in layer.parameters():
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder
