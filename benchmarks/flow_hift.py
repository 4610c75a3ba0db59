"""Measures how fast flow and HiFT turn S3 tokens into a waveform, with random weights.

    python benchmarks/flow_hift.py                 # 300M sizes: about a minute on two cores
    python benchmarks/flow_hift.py --size small    # a few seconds

Prints the real-time factor (seconds of computing a second of audio) of each part, and how the flow's one estimator call
on guided and unguided rows together compares with two calls a step, measured in the same run.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import taste  # noqa: F401 - makes `cosyvoice` importable
from benchmarks.flow_hift_models import build_flow, build_hift
from cosyvoice.flow.flow import EULER_STEPS
from cosyvoice.flow.flow_matching import ConditionalCFM
from cosyvoice.utils.rates import MEL_FRAMES_PER_SECOND
from cosyvoice.utils.settings import parse_settings, pick_device

SIZE = "300m"  # 300m: the released model; small: the scaled-down one of the tests
SECONDS = 4.0  # of audio to make
REPEATS = 3  # timed runs of each part, after one that is not timed
DEVICE = "auto"  # auto, cpu, cuda, cuda:1


def median_seconds(parts: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Time every part in turn, `repeats` rounds after one untimed, so that other load meets all alike."""
    elapsed: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats + 1):
        for name, run in parts.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in elapsed.items()}


@torch.no_grad()
def solve_with_two_calls(
    cfm: ConditionalCFM, x: Tensor, mu: Tensor, mask: Tensor, spks: Tensor, cond: Tensor
) -> Tensor:
    """Integrate as `ConditionalCFM.solve_euler` does, with an estimator call for each half of the guidance."""
    times = 1 - torch.cos(torch.linspace(0, 1, EULER_STEPS + 1, device=x.device) * 0.5 * torch.pi)
    nothing = torch.zeros_like(mu)
    for now, then in itertools.pairwise(times):
        guided = cfm.estimator(x, mask, mu, now.view(1), spks, cond)
        free = cfm.estimator(x, mask, nothing, now.view(1), torch.zeros_like(spks), nothing)
        x = x + (then - now) * ((1 + cfm.inference_cfg_rate) * guided - cfm.inference_cfg_rate * free)
    return x


def main(argv: Sequence[str] | None = None) -> None:
    """Build, time, print."""
    settings = parse_settings(__file__, globals(), argv)
    device = pick_device(settings.device)
    torch.manual_seed(0)
    flow = build_flow(settings.size).eval().to(device)
    hift = build_hift(settings.size).eval().to(device)

    tokens = torch.randint(flow.vocab_size, (1, round(settings.seconds * flow.input_frame_rate)), device=device)
    lengths = torch.tensor([tokens.size(1)], device=device)
    nothing = {
        "prompt_token": tokens[:, :0],
        "prompt_token_len": torch.zeros_like(lengths),
        "prompt_feat": torch.zeros(1, 0, 80, device=device),
        "prompt_feat_len": torch.zeros_like(lengths),
    }
    speaker = torch.randn(1, 192, device=device)

    def make_mel() -> Tensor:
        return flow.inference(tokens, lengths, **nothing, embedding=speaker, flow_cache=None).mel

    mel = make_mel()
    noise, mu, cond = torch.randn_like(mel), torch.randn_like(mel), torch.zeros_like(mel)
    mask, spks = torch.ones_like(mel[:, :1]), torch.randn(1, 80, device=device)
    audio_seconds = mel.size(2) / MEL_FRAMES_PER_SECOND
    parts: dict[str, Callable[[], object]] = {
        "flow": make_mel,
        "hift": lambda: hift.inference(mel),
        "solver, one call a step": lambda: flow.decoder(mu, mask, EULER_STEPS, spks=spks, cond=cond),
        "solver, two calls a step": lambda: solve_with_two_calls(flow.decoder, noise, mu, mask, spks, cond),
    }
    print(f"{settings.size}, {audio_seconds:.2f} s of audio, {device}, {torch.get_num_threads()} threads, float32")
    seconds = median_seconds(parts, settings.repeats, device)
    for name, value in seconds.items():
        print(f"  {name:<26} {value:8.3f} s   real-time factor {value / audio_seconds:.3f}")
    ratio = seconds["solver, two calls a step"] / seconds["solver, one call a step"]
    print(f"  two calls take {ratio:.2f} times as long as one")


if __name__ == "__main__":
    main()
