"""Cross-attention that turns a recording's frames into one vector for each text token."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from taste.lengths import valid_mask

# B batch   T text tokens   A Whisper frames, 50 Hz   D channels


class SimpleTextSpeechAggregator(nn.Module):
    """One attention head in which each text token looks for the frames that speak it.

    The queries come from the text embeddings, the keys from Whisper's last layer (which knows what was said) and the
    values from a middle layer (which still knows how it was said).

    Args:
        text_width: channels of the text embeddings, which is also the width of the attention.
        speech_width: channels of the Whisper features, the same for both layers.

    Source: arXiv 2504.07053, section 3.1, reduced to a single layer with a single head.
    """

    def __init__(self, text_width: int, speech_width: int) -> None:
        super().__init__()
        self.text_width = text_width
        self.speech_width = speech_width
        self.query = nn.Linear(text_width, text_width)
        self.key = nn.Linear(speech_width, text_width)
        self.value = nn.Linear(speech_width, text_width)
        self.output = nn.Linear(text_width, text_width)

    def forward(self, text: Tensor, final: Tensor, mid: Tensor, speech_lengths: Tensor) -> Tensor:
        """Gather what the recording says about each text token.

        Args:
            text: text embeddings, [B, T, text_width], float.
            final: Whisper's features after its last LayerNorm, [B, A, speech_width], float.
            mid: Whisper's features of a middle layer, [B, A, speech_width], float.
            speech_lengths: real frames of each recording, [B], int64, 1..A; later frames are never looked at.

        Returns:
            one vector a text token, [B, T, text_width]; a padded token's vector means nothing.

        Raises:
            ValueError: the features do not have the width this aggregator was built for.
        """
        self._check_width("final", final)
        self._check_width("mid", mid)
        real_frames = valid_mask(speech_lengths, final.shape[1])  # [B, A]
        attended = F.scaled_dot_product_attention(
            self.query(text), self.key(final), self.value(mid), attn_mask=real_frames[:, None, :]
        )
        return self.output(attended)

    def attention(self, text: Tensor, final: Tensor, speech_lengths: Tensor) -> Tensor:
        """Where each text token looks: the weights that `forward` uses without ever writing them down.

        Args:
            text: as for `forward`.
            final: as for `forward`.
            speech_lengths: as for `forward`.

        Returns:
            weights [B, T, A], float, each token's sum to 1; zero behind a recording's end.

        Raises:
            ValueError: the features do not have the width this aggregator was built for.
        """
        self._check_width("final", final)
        scores = self.query(text) @ self.key(final).mT / math.sqrt(self.text_width)  # [B, T, A]
        real_frames = valid_mask(speech_lengths, final.shape[1])  # [B, A]
        return scores.masked_fill(~real_frames[:, None, :], -math.inf).softmax(dim=-1)

    def _check_width(self, name: str, features: Tensor) -> None:
        if features.shape[-1] != self.speech_width:
            raise ValueError(
                f"the {name} Whisper features are {features.shape[-1]} wide, the aggregator was built for "
                f"{self.speech_width}; use features of the Whisper model it was trained with"
            )
