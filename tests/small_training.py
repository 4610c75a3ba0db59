"""A configuration and data sets small enough to train every part for some steps in a second or two."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cosyvoice.bin import train
from cosyvoice.utils.train_utils import batch_source

TINY_CONFIG = Path(__file__).parents[1] / "CosyVoice/examples/tiny/conf/cosyvoice.yaml"
TEXT_TOKENS, CODES = 60, 40
SMALLER = {  # whatever the recipe says, by key; the order of lines does not matter
    "text_token_size": TEXT_TOKENS,
    **dict.fromkeys(("speech_token_size", "vocab_size"), CODES),
    **dict.fromkeys(("text_encoder_input_size", "llm_input_size", "llm_output_size"), 16),
    **dict.fromkeys(("base_channels", "cond_channels"), 16),
    "attention_heads": 2,
    "linear_units": 32,
    "num_blocks": 1,
    "attention_head_dim": 8,
}
TRAINING = """
train_conf:
    optim: adam
    optim_conf:
        lr: 0.01
    scheduler: warmuplr
    scheduler_conf:
        warmup_steps: 4
    max_epoch: 40
    grad_clip: 5
    accum_grad: 1
    log_interval: 2
    save_per_step: -1
train_conf_gan:
    optim: adam
    optim_conf:
        lr: 0.0005
    scheduler: constantlr
    optim_d: adam
    optim_conf_d:
        lr: 0.0005
    scheduler_d: constantlr
    max_epoch: 40
    grad_clip: 5
    accum_grad: 1
    log_interval: 2
    save_per_step: -1
"""
TRAIN_BATCHES, CV_BATCHES, ROWS, TOKENS, TEXT = 6, 2, 2, 12, 4
FRAMES_GAN = 16
CV_EPOCH = 99


class MadeUpDataset(torch.utils.data.IterableDataset):
    """Batches with the keys of the data pipeline, whose numbers depend on the epoch and their place in it."""

    def __init__(self, gan: bool, batches: int = TRAIN_BATCHES, spoiled: int | None = None) -> None:
        self.gan, self.batches, self.spoiled, self.epoch = gan, batches, spoiled, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        for number in range(self.batches):
            batch = made_up_batch(10_000 * rank + 100 * self.epoch + number, self.gan)
            if number == self.spoiled:
                batch["embedding"] *= float("nan")
            yield batch


def made_up_batch(seed: int, gan: bool) -> dict[str, Any]:
    """One batch; S3 tokens are a function of the text, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(0, TEXT_TOKENS, (ROWS, TEXT), generator=generator)
    token_lengths = torch.tensor([TOKENS - row for row in range(ROWS)], dtype=torch.int32)
    mel_lengths = [FRAMES_GAN if gan else int(int(count) / 50 * 22050 / 256) for count in token_lengths]
    frames = max(mel_lengths)
    return {
        "utts": [f"utt-{seed}-{row}" for row in range(ROWS)],
        "text_token": text,
        "text_token_len": torch.full((ROWS,), TEXT, dtype=torch.int32),
        "speech_token": text.repeat_interleave(TOKENS // TEXT, dim=1) % CODES,
        "speech_token_len": token_lengths,
        "speech_feat": torch.randn(ROWS, frames, 80, generator=generator),
        "speech_feat_len": torch.tensor(mel_lengths, dtype=torch.int32),
        "embedding": torch.randn(ROWS, 192, generator=generator),
        "speech": 0.1 * torch.randn(ROWS, frames * 256, generator=generator).clamp(-1, 1),
        "pitch_feat": 100 + 50 * torch.rand(ROWS, frames, generator=generator),
    }


def write_config(path: Path, changes: dict[str, str] | None = None) -> Path:
    """The tiny recipe's configuration with still smaller sizes, and further changes to its text."""
    text = TINY_CONFIG.read_text().partition("train_conf:")[0] + TRAINING
    for key, value in SMALLER.items():
        text = re.sub(rf"\b{key}: \d+", f"{key}: {value}", text)
    text = re.sub(r"(?<=[ _])(input_size|output_size): (?!80\b)\d+", r"\1: 16", text)  # 80: mel bands
    text = re.sub(r"channels: \[\d+, \d+\]", "channels: [16, 16]", text)  # of the flow's U-Net
    text = re.sub(r"channels: \[\d+(, \d+){4}\]", "channels: [2, 2]", text)  # of the discriminators of periods
    text = re.sub(r"(mrd: .*\n +channels): \d+", r"\1: 2", text)
    for old, new in (changes or {}).items():
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def use_made_up_data(train_module: Any = train, **dataset: Any) -> Callable[..., Any]:
    """Let train.py read made-up batches; gives what stood in its place."""
    earlier = train_module.open_data

    def open_data(settings: Any, cache: bool) -> Any:
        gan = settings.model == "hifigan"
        learned = batch_source(MadeUpDataset(gan, **dataset), settings.seed, settings.num_workers, settings.prefetch)
        checked = batch_source(MadeUpDataset(gan, CV_BATCHES), settings.seed, 0, settings.prefetch)
        return learned, lambda: checked(CV_EPOCH, 0)

    train_module.open_data = open_data
    return earlier


def training_flags(folder: Path, model: str, *flags: str, config: Path | None = None) -> list[str]:
    """The command line of a training in a folder."""
    data_list = folder.parent / "data.list"
    data_list.write_text("shard.tar\n")
    config = config or write_config(folder.parent / "cosyvoice.yaml")
    paths = {"--model": model, "--config": config, "--train_data": data_list, "--cv_data": data_list}
    words = [str(word) for pair in {**paths, "--model_dir": folder, "--device": "cpu"}.items() for word in pair]
    return [*words, *flags]


if __name__ == "__main__":  # as one of several processes
    import sys

    use_made_up_data()
    sys.exit(train.main(sys.argv[1:]))
