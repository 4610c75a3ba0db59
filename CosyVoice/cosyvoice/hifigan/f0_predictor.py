"""Predicts the fundamental frequency of every mel frame.

Axes: B batch  F mel frames, 86.13 Hz  M mel bands.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

CONV_LAYERS = 5


class ConvRNNF0Predictor(nn.Module):
    """Five convolutions with ELU, then one linear layer a frame.

    Args:
        num_class: outputs of the linear layer; 1 for F0.
        in_channels: mel bands M.
        cond_channels: channels between the convolutions.

    Source: FunAudioLLM/CosyVoice cosyvoice/hifigan/f0_predictor.py @ ace7c47.
    """

    def __init__(self, num_class: int = 1, in_channels: int = 80, cond_channels: int = 512) -> None:
        super().__init__()
        self.num_class = num_class
        layers: list[nn.Module] = []
        for layer in range(CONV_LAYERS):
            width = in_channels if layer == 0 else cond_channels
            layers += [weight_norm(nn.Conv1d(width, cond_channels, 3, padding=1)), nn.ELU()]
        self.condnet = nn.Sequential(*layers)
        self.classifier = nn.Linear(cond_channels, num_class)

    def forward(self, x: Tensor) -> Tensor:
        """Predict F0 in Hz, [B, F] and never negative, from a log mel, [B, M, F]."""
        hidden = self.condnet(x).transpose(1, 2)
        return self.classifier(hidden).squeeze(-1).abs()
