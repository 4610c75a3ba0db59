"""Makes a Whisper of a few layers and a short window, in transformers' format, with random weights."""

from pathlib import Path

import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

WIDTH = 32
LAYERS = 4
WINDOW_FRAMES = 150  # 3 s
SPECIAL = ["endoftext", "startoftranscript", "en", "translate", "transcribe", "startofprev", "nospeech", "notimestamps"]


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


def write_writing_whisper(folder: Path) -> Path:
    """A Whisper of two layers with random weights, a tokenizer of bytes, and all that writing with times needs."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": [f"<|{name}|>" for name in SPECIAL]})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    end = ids["endoftext"]
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=80,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=ids["startoftranscript"],
    )
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(config)
    settings = dict(
        _from_model_config=False,
        lang_to_id={"<|en|>": ids["en"]},
        task_to_id={"transcribe": ids["transcribe"]},
        is_multilingual=True,
        no_timestamps_token_id=ids["notimestamps"],
        prev_sot_token_id=ids["startofprev"],
        alignment_heads=[[1, 0], [1, 1]],
        return_timestamps=False,
        max_length=30,
        max_initial_timestamp_index=50,
        begin_suppress_tokens=None,
        suppress_tokens=[end, *(n for n, letter in enumerate(alphabet) if letter not in "abcdefgh")],  # letters only
    )
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder
