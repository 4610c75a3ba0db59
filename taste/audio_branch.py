"""Brings the vectors that stand for the speech of each text token to the language model's width."""

from torch import Tensor, nn

from cosyvoice.transformer.encoder import ConformerEncoder
from cosyvoice.transformer.options import CAUSAL, PUBLISHED_LAYER_NORM_EPS

# B batch   T text tokens   D channels of the aggregated speech


class AudioBranch(nn.Module):
    """Linear -> conformer without convolutions -> Linear: for speech what the text encoder is for text.

    It is causal like the text encoder, so a token's vector does not depend on what follows it.

    Args:
        speech_width: D.
        encoder_width: channels of the encoder's input; the published model has the text embedding's width here.
        llm_width: channels inside the encoder, and of the output.
        blocks: layers of the encoder.
        heads: attention heads; they divide `llm_width`.
        linear_units: width of the feed-forward networks.
        dropout: in the layers, after the input layer and on the positions.
        layer_norm_eps: eps of the LayerNorms inside the layers. CosyVoice's own encoders have 1e-12; TASTE's copy of
            them has 1e-5, and that is what its released weights were trained with.

    Raises:
        ValueError: `llm_width` is odd or cannot be split among the heads.

    Source: arXiv 2504.07053, section 3.2; taste_speech/modeling_taste.py @ 301bce2.
    """

    def __init__(
        self,
        speech_width: int,
        encoder_width: int,
        llm_width: int,
        *,
        blocks: int = 2,
        heads: int = 8,
        linear_units: int = 2048,
        dropout: float = 0.1,
        layer_norm_eps: float = PUBLISHED_LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.audio_embed_affine_layer = nn.Linear(speech_width, encoder_width)
        self.audio_token_encoder = ConformerEncoder(
            encoder_width,
            llm_width,
            attention_heads=heads,
            linear_units=linear_units,
            num_blocks=blocks,
            dropout_rate=dropout,
            positional_dropout_rate=dropout,
            attention_dropout_rate=0.0,
            input_layer="linear",
            pos_enc_layer_type="rel_pos_espnet",
            static_chunk_size=CAUSAL,
            macaron_style=False,
            use_cnn_module=False,
            layer_norm_eps=layer_norm_eps,
        )
        self.audio_token_encoder_affine_layer = nn.Linear(llm_width, llm_width)

    def forward(self, vectors: Tensor, text_lengths: Tensor) -> Tensor:
        """Encode the speech of each text token.

        Args:
            vectors: aggregated, and perhaps quantized, speech, [B, T, D], float.
            text_lengths: tokens of each row, [B], int64.

        Returns:
            [B, T, llm_width]; a padded token's vector means nothing.
        """
        encoded, _ = self.audio_token_encoder(self.audio_embed_affine_layer(vectors), text_lengths)
        return self.audio_token_encoder_affine_layer(encoded)
