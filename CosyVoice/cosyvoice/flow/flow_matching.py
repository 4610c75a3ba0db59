"""Carries noise to a mel spectrogram along the velocity that an estimator predicts.

Axes: B batch  F mel frames, 86.13 Hz  M mel bands, 80.  Masks are float, 1 where valid: [B, 1, F].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosyvoice.flow.length_regulator import STREAM_OVERLAP_TOKENS, mel_frames_of_tokens
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND

OVERLAP_FRAMES = mel_frames_of_tokens(STREAM_OVERLAP_TOKENS, S3_UNITS_PER_SECOND)  # 34: two chunks of a stream share
DEFAULT_SIGMA_MIN = 1e-4  # Matcha-TTS's value where a configuration leaves it out


class SolvedMel(NamedTuple):
    """A mel spectrogram and what the next chunk of a stream needs to continue it."""

    mel: Tensor  # [B, M, F], float32
    cache: Tensor  # noise and mu of the prompt and of the last 34 frames, [B, M, prompt + 34, 2]


class FlowLoss(NamedTuple):
    """The training loss and the noisy mel it was measured at."""

    loss: Tensor  # scalar
    noisy_mel: Tensor  # [B, M, F]


class ConditionalCFM(nn.Module):
    """Conditional flow matching with classifier-free guidance.

    Args:
        in_channels: recorded as published; the estimator brings its own sizes.
        cfm_params: `solver` ("euler"), `t_scheduler` ("cosine" or "linear"), `training_cfg_rate`, `inference_cfg_rate`,
            and optionally `sigma_min`; a dict or an omegaconf DictConfig. `reg_loss_type` in released files is read by
            no published code: the loss is the mean square.
        n_spks: recorded as published.
        spk_emb_dim: recorded as published.
        estimator: the velocity estimator, called as ConditionalDecoder is.

    Raises:
        ValueError: an unknown solver or time schedule, or no estimator.

    Source: FunAudioLLM/CosyVoice cosyvoice/flow/flow_matching.py @ ace7c47.
    """

    def __init__(
        self,
        in_channels: int,
        cfm_params: Mapping[str, Any],
        n_spks: int = 1,
        spk_emb_dim: int = 64,
        estimator: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if estimator is None:
            raise ValueError("ConditionalCFM needs an estimator, for example a ConditionalDecoder; got None")
        if cfm_params["solver"] != "euler":
            raise ValueError(f"cfm_params.solver is {cfm_params['solver']!r}, expected 'euler'")
        if cfm_params["t_scheduler"] not in ("cosine", "linear"):
            raise ValueError(f"cfm_params.t_scheduler is {cfm_params['t_scheduler']!r}, expected 'cosine' or 'linear'")
        self.n_feats = in_channels
        self.n_spks = n_spks
        self.spk_emb_dim = spk_emb_dim
        self.t_scheduler: str = cfm_params["t_scheduler"]
        self.sigma_min: float = cfm_params.get("sigma_min", DEFAULT_SIGMA_MIN)
        self.training_cfg_rate: float = cfm_params["training_cfg_rate"]
        self.inference_cfg_rate: float = cfm_params["inference_cfg_rate"]
        self.estimator = estimator

    @torch.no_grad()
    def forward(
        self,
        mu: Tensor,
        mask: Tensor,
        n_timesteps: int,
        temperature: float = 1.0,
        spks: Tensor | None = None,
        cond: Tensor | None = None,
        prompt_len: int = 0,
        cache: Tensor | None = None,
    ) -> SolvedMel:
        """Draw noise and carry it to a mel in `n_timesteps` Euler steps.

        Args:
            mu: encoder output, [B, M, F], float32.
            mask: 1 at valid frames, [B, 1, F].
            n_timesteps: Euler steps; each costs one estimator call on 2 B rows.
            temperature: standard deviation of the noise.
            spks: projected speaker vectors, [B, M].
            cond: mel that is known, zero elsewhere, [B, M, F].
            prompt_len: frames of the prompt at the beginning of `mu`.
            cache: `SolvedMel.cache` of the chunk before; its noise and mu replace the first frames, so that the frames
                both chunks cover come out alike. None or zero frames long for a first chunk.

        Returns:
            the mel and the cache for the next chunk.

        Raises:
            ValueError: the cache is longer than `mu`.
        """
        noise = torch.randn_like(mu) * temperature
        if cache is not None and cache.size(2) > 0:
            kept = cache.size(2)
            if kept > mu.size(2):
                raise ValueError(f"the flow cache covers {kept} mel frames, but this chunk has only {mu.size(2)}")
            noise = torch.cat([cache[..., 0], noise[:, :, kept:]], dim=2)
            mu = torch.cat([cache[..., 1], mu[:, :, kept:]], dim=2)
        start = torch.stack([noise, mu], dim=-1)
        next_cache = torch.cat([start[:, :, :prompt_len], start[:, :, -OVERLAP_FRAMES:]], dim=2)

        times = torch.linspace(0, 1, n_timesteps + 1, device=mu.device, dtype=mu.dtype)
        if self.t_scheduler == "cosine":
            times = 1 - torch.cos(times * 0.5 * torch.pi)
        return SolvedMel(self.solve_euler(noise, times, mu, mask, spks, cond), next_cache)

    def solve_euler(
        self, x: Tensor, t_span: Tensor, mu: Tensor, mask: Tensor, spks: Tensor | None, cond: Tensor | None
    ) -> Tensor:
        """Integrate the guided velocity over `t_span`; deterministic, and differentiable in its inputs.

        Args:
            x: noise, [B, M, F].
            t_span: increasing flow times from 0 to 1, [n_timesteps + 1].
            mu: encoder output, [B, M, F].
            mask: 1 at valid frames, [B, 1, F].
            spks: projected speaker vectors, [B, M].
            cond: mel that is known, zero elsewhere, [B, M, F].

        Returns:
            mel, [B, M, F].
        """
        # Rows b and B + b are the same noise with and without its conditions: guidance in one estimator call.
        masks = torch.cat([mask, mask])
        mus, speakers, knowns = (_with_and_without(condition) for condition in (mu, spks, cond))
        time = t_span[0]
        for next_time in t_span[1:]:
            step = next_time - time
            velocity = self.estimator(torch.cat([x, x]), masks, mus, time.expand(len(masks)), speakers, knowns)
            guided, free = velocity.chunk(2)
            x = x + step * ((1.0 + self.inference_cfg_rate) * guided - self.inference_cfg_rate * free)
            time = time + step
        return x

    def compute_loss(
        self, x1: Tensor, mask: Tensor, mu: Tensor, spks: Tensor | None = None, cond: Tensor | None = None
    ) -> FlowLoss:
        """Measure the estimator's squared error at a random time on the straight path from noise to mel.

        Each row loses all its conditions together with probability `training_cfg_rate`, which is what teaches the
        estimator the unguided velocity.

        Args:
            x1: true mel, [B, M, F].
            mask: 1 at valid frames, [B, 1, F].
            mu: encoder output, [B, M, F].
            spks: projected speaker vectors, [B, M].
            cond: mel that is known, zero elsewhere, [B, M, F].

        Returns:
            the loss, averaged over valid frames and bands, and the noisy mel.
        """
        rows = mu.size(0)
        time = torch.rand([rows, 1, 1], device=mu.device, dtype=mu.dtype)
        noise = torch.randn_like(x1)
        shrink = 1 - self.sigma_min
        noisy_mel = (1 - shrink * time) * noise + time * x1
        velocity = x1 - shrink * noise
        if self.training_cfg_rate > 0:
            keep = torch.rand(rows, device=x1.device) > self.training_cfg_rate
            mu = mu * keep.view(-1, 1, 1)
            spks = None if spks is None else spks * keep.view(-1, 1)
            cond = None if cond is None else cond * keep.view(-1, 1, 1)
        estimate = self.estimator(noisy_mel, mask, mu, time.flatten(), spks, cond)
        squares = F.mse_loss(estimate * mask, velocity * mask, reduction="sum")
        return FlowLoss(squares / (mask.sum() * x1.size(1)), noisy_mel)


def _with_and_without(condition: Tensor | None) -> Tensor | None:
    """Stack a condition [B, ...] on zeros of its shape, [2 B, ...]."""
    return None if condition is None else torch.cat([condition, torch.zeros_like(condition)])
