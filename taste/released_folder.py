"""Holds what the authors of TASTE released against the CosyVoice folder that it is to speak with."""

from pathlib import Path

from cosyvoice.utils.model_dir import SPEAKER_MODEL_FILE, ModelDir, sizes
from cosyvoice.utils.provenance import file_digest
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND
from taste.model import CosyVoiceS3Model

RELEASED_SPEAKER_MODEL = "cosyvoice/speaker_embed.onnx"  # in the released folder, the same under another name


def check_same_sizes(model: CosyVoiceS3Model, folder: str | Path, model_dir: str | Path) -> None:
    """Refuse a CosyVoice folder that a released TASTE was not trained with.

    Units and speaker vectors of another CosyVoice may have the same numbers, and then sound as noise.

    Args:
        model: the released one.
        folder: where it lies.
        model_dir: the CosyVoice folder, for text, speakers, flow and HiFT.

    Raises:
        FileNotFoundError: the CosyVoice folder has no configuration.
        ValueError: their sizes differ (all are named).
    """
    there = sizes(model_dir)
    pairs = {  # of the CosyVoice folder, of the released weights
        "text tokens": (there.text_vocab, model.llm.text_embedding.num_embeddings),
        "text width": (there.text_width, model.llm.text_embedding.embedding_dim),
        "LM width": (there.lm_width, model.llm.llm_input_size),
        "S3 units": (there.speech_vocab, model.llm.speech_token_size),
        "speaker width": (there.spk_width, model.llm.spk_embed_affine_layer.in_features),
        # what a released TASTE learned to say; its weights do not tell
        "S3 units a second": (there.token_rate, S3_UNITS_PER_SECOND),
    }
    differences = [f"{name} {got}, expected {wanted}" for name, (got, wanted) in pairs.items() if got != wanted]
    if differences:
        raise ValueError(
            f"the model folder {model_dir} is not the CosyVoice that {folder} was trained with: "
            f"{'; '.join(differences)}. Its flow, HiFT and speaker encoder would make noise of the units. Give that "
            "one: --cosyvoice-model-dir CosyVoice-300M (python setup_cosyvoice.py fetches it)"
        )


def speaker_model_warning(folder: str | Path, model_dir: str | Path) -> str | None:
    """Look whether a released TASTE and a CosyVoice folder know speakers by the same vectors.

    Args:
        folder: the released one; it may have no speaker encoder of its own.
        model_dir: the CosyVoice folder, whose speaker encoder is used.

    Returns:
        a warning, where both have one and their weights differ; else None.
    """
    theirs, used = Path(folder) / RELEASED_SPEAKER_MODEL, ModelDir(model_dir).file(SPEAKER_MODEL_FILE)
    if not (theirs.is_file() and used.is_file()) or file_digest(theirs) == file_digest(used):
        return None
    weights = _weights(theirs)
    if weights and weights == _weights(used):
        return None
    return (
        f"warning: {used}, whose speaker vectors are used, is another speaker encoder than {theirs}, whose vectors the "
        "released weights learned to read: voices may come out wrong. Give the CosyVoice that TASTE was trained with: "
        "--cosyvoice-model-dir CosyVoice-300M"
    )


def _weights(path: Path) -> list[bytes]:
    """The initialisers of an ONNX model, whatever they are called there; none where it cannot be read."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return sorted(onnx.numpy_helper.to_array(tensor).tobytes() for tensor in onnx.load(path).graph.initializer)
    except (DecodeError, ValueError):
        return []
