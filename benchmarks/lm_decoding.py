"""Compare step-by-step decoding of CosyVoice's language model: the growing cache against the preallocated one.

Random weights at the released sizes and random S3 tokens go in; a table comes out, and a JSON file. `forward_chunk` is
the published way (it projects every relative position again at each step and copies the whole cache); `step` is what
`TransformerLM.inference` uses. Both take the same token in turn, so whatever else the machine does slows both alike.

    python benchmarks/lm_decoding.py                          # 300M sizes, 250 tokens: about 2 minutes on 2 cores
    python benchmarks/lm_decoding.py --size small --tokens 50  # a few seconds
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import taste  # noqa: F401 - makes `cosyvoice` importable
from benchmarks.lm_models import SIZES, build_language_model
from cosyvoice.llm.llm import TransformerLM
from cosyvoice.transformer.encoder import TransformerEncoder
from cosyvoice.utils.atomic import atomic_path
from cosyvoice.utils.settings import parse_settings, pick_device

SIZE = "300m"  # 300m: the released sizes; small: those of the tests
TOKENS = 250  # S3 tokens to decode, 50 a second of speech
PREFIX_FRAMES = 64  # frames before the first S3 token: marks, speaker and text
STRETCH = 50  # tokens at the start and at the end whose speed is shown separately
BATCH_SIZES = (1, 8)  # rows decoded at once by `step`, after the comparison
DEVICE = "auto"  # auto, cpu, cuda, cuda:1
THREADS = None  # int: CPU threads; none leaves PyTorch's choice
SEED = 0  # of the weights and tokens
OUTPUT = Path("exp/benchmarks/lm_decoding.json")  # where the numbers are written

# B batch  L frames  D channels


@dataclass
class Speed:
    """One row of the table; rates are S3 tokens a second over all rows of the batch."""

    name: str
    batch_size: int
    prefix_seconds: float
    tokens_per_second: float
    tokens_per_second_first: float
    tokens_per_second_last: float


@dataclass
class Decoded:
    """What `decode` measured."""

    seconds: list[list[float]]  # for each way, of the prefix and of each token
    difference: float  # largest difference of the log-probabilities from the first way's, relative to their scale


def growing_cache(llm: TransformerEncoder) -> Callable[[Tensor], Tensor]:
    """The published way: a cache that each step returns longer.

    Args:
        llm: the encoder.

    Returns:
        a function from the next frames [1, L, D] to their hidden states [1, L, D].
    """
    offset, att_cache, cnn_cache = 0, None, None

    def advance(frames: Tensor) -> Tensor:
        nonlocal offset, att_cache, cnn_cache
        mask = torch.ones(1, frames.size(1), frames.size(1), dtype=torch.bool, device=frames.device).tril()
        hidden, att_cache, cnn_cache = llm.forward_chunk(frames, offset, -1, att_cache, cnn_cache, mask)
        offset += frames.size(1)
        return hidden

    return advance


def preallocated_cache(llm: TransformerEncoder, batch_size: int, max_frames: int) -> Callable[[Tensor], Tensor]:
    """Our way: a cache allocated once.

    Args:
        llm: the encoder.
        batch_size: B.
        max_frames: frames a row will have at most.

    Returns:
        a function from the next frames [B, L, D] to their hidden states [B, L, D].
    """
    cache = llm.new_cache(batch_size, max_frames)
    return lambda frames: llm.step(frames, cache)


def decode(lm: TransformerLM, ways: Sequence[Callable[[Tensor], Tensor]], prefix: Tensor, tokens: Tensor) -> Decoded:
    """Give every way the prefix and then the same tokens, one after another.

    Args:
        lm: the language model.
        ways: functions that take the next frames.
        prefix: [B, L, D].
        tokens: [B, S], int64.

    Returns:
        the times, and by how much the ways disagree.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    difference = 0.0
    for index in range(tokens.size(1) + 1):
        scores = []
        for way, times in zip(ways, seconds, strict=True):
            _synchronise(prefix.device)
            start = time.perf_counter()
            frames = prefix if index == 0 else lm.speech_embedding(tokens[:, index - 1 : index])
            scores.append(lm.llm_decoder(way(frames)[:, -1]).log_softmax(dim=-1))
            _synchronise(prefix.device)
            times.append(time.perf_counter() - start)
        for other in scores[1:]:
            difference = max(difference, float((other - scores[0]).abs().max() / scores[0].abs().max()))
    return Decoded(seconds, difference)


def speed(name: str, batch_size: int, seconds: Sequence[float], stretch: int) -> Speed:
    """Turn times into rates.

    Args:
        name: what was timed.
        batch_size: rows decoded at once.
        seconds: of the prefix, then of each token.
        stretch: tokens at either end to show separately.

    Returns:
        one row of the table.
    """
    prefix, *steps = seconds

    def rate(part: Sequence[float]) -> float:
        return batch_size * len(part) / sum(part)

    return Speed(name, batch_size, prefix, rate(steps), rate(steps[:stretch]), rate(steps[-stretch:]))


def print_table(rows: Sequence[Speed], stretch: int) -> None:
    """Print the rates.

    Args:
        rows: what was measured.
        stretch: tokens of the first and last columns.
    """
    print(f"{'':24s}{'rows':>5s}{'prefix, s':>11s}{'token/s':>9s}{f'first {stretch}':>10s}{f'last {stretch}':>10s}")
    for row in rows:
        print(
            f"{row.name:24s}{row.batch_size:5d}{row.prefix_seconds:11.3f}{row.tokens_per_second:9.1f}"
            f"{row.tokens_per_second_first:10.1f}{row.tokens_per_second_last:10.1f}"
        )


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write.

    Args:
        argv: command-line words without the program's name; None takes those of the process.

    Returns:
        the exit code.
    """
    settings = parse_settings(__file__, globals(), argv)
    if settings.size not in SIZES:
        print(f"error: --size is {settings.size!r}; expected one of {', '.join(SIZES)}", file=sys.stderr)
        return 2
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)
    lm = build_language_model(settings.size).to(device).eval()
    rows = max(1, *settings.batch_sizes)
    prefix = torch.randn(rows, settings.prefix_frames, lm.llm_input_size, device=device)
    tokens = torch.randint(lm.speech_token_size, (rows, settings.tokens), device=device)
    max_frames = settings.prefix_frames + settings.tokens

    decode(lm, [preallocated_cache(lm.llm, 1, max_frames)], prefix[:1], tokens[:1, :3])  # warm up
    ways = [growing_cache(lm.llm), preallocated_cache(lm.llm, 1, max_frames)]
    compared = decode(lm, ways, prefix[:1], tokens[:1])
    table = [
        speed(name, 1, seconds, settings.stretch)
        for name, seconds in zip(("forward_chunk, growing", "step, preallocated"), compared.seconds, strict=True)
    ]
    ratio = table[1].tokens_per_second / table[0].tokens_per_second
    for size in settings.batch_sizes:
        alone = decode(lm, [preallocated_cache(lm.llm, size, max_frames)], prefix[:size], tokens[:size])
        table.append(speed("step alone", size, alone.seconds[0], settings.stretch))

    print(f"{settings.size}, {device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print_table(table, settings.stretch)
    print(f"step / forward_chunk: {ratio:.2f}x; largest relative difference {compared.difference:.1e}")
    with atomic_path(settings.output) as temporary:
        temporary.write_text(
            json.dumps(
                {
                    "settings": settings.to_dict(),
                    "device": str(device),
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "speeds": [asdict(row) for row in table],
                    "ratio": ratio,
                    "difference": compared.difference,
                },
                indent=2,
            )
            + "\n"
        )
    print(f"written to {settings.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
