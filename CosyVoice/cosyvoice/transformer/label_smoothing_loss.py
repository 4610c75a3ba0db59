"""Cross-entropy against smoothed targets.

# B batch  L positions  V classes
"""

import math

from torch import Tensor, nn


class LabelSmoothingLoss(nn.Module):
    """Kullback-Leibler divergence of the prediction from targets that give `smoothing` to the wrong classes.

    With `smoothing` 0 it is the cross-entropy.

    Args:
        size: V.
        padding_idx: target of the positions that do not count.
        smoothing: probability spread evenly over the V - 1 wrong classes, 0 <= smoothing < 1.
        normalize_length: divide by the number of counted positions (True) or by B (False).

    Raises:
        ValueError: `smoothing` is outside its range.

    Source: FunAudioLLM/CosyVoice cosyvoice/transformer/label_smoothing_loss.py @ ace7c47.
    """

    def __init__(self, size: int, padding_idx: int, smoothing: float, normalize_length: bool = False) -> None:
        super().__init__()
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.size = size
        self.padding_idx = padding_idx
        self.smoothing = smoothing
        self.normalize_length = normalize_length

    def forward(self, x: Tensor, target: Tensor, batch: int | None = None) -> Tensor:
        """Compare a batch of predictions with their targets.

        Args:
            x: logits, [B, L, V], or [N, V] for the positions that count.
            target: classes, [B, L] or [N], int64; `padding_idx` where a position does not count.
            batch: B, where `x` does not tell it.

        Returns:
            0-d loss; nan where `normalize_length` is set and no position counts.

        Raises:
            ValueError: the last axis of `x` is not V.
        """
        if x.size(-1) != self.size:
            raise ValueError(f"the loss was made for {self.size} classes, got logits for {x.size(-1)}")
        counted = target != self.padding_idx
        log_prob = x.log_softmax(dim=-1)
        right_log_prob = log_prob.gather(-1, target.where(counted, 0).unsqueeze(-1)).squeeze(-1)

        right, wrong = 1.0 - self.smoothing, self.smoothing / (self.size - 1)
        divergence = -right * right_log_prob
        if self.smoothing > 0.0:
            # sum of t * (log t - log p) over the classes, without a [B, L, V] tensor of targets
            entropy = right * math.log(right) + self.smoothing * math.log(wrong)
            divergence = divergence + wrong * right_log_prob - wrong * log_prob.sum(dim=-1) + entropy
        loss = divergence.where(counted, 0.0).sum()
        return loss / (counted.sum() if self.normalize_length else batch or len(x))
