"""What the weights of TASTE are called where its authors published it, and here."""

from collections.abc import Sequence
from typing import NamedTuple

# Published names, and those in `OfficialTaste`; the first row that fits counts. None: not part of the tokenizer.
RENAMES: tuple[tuple[str, str | None], ...] = (
    ("audio_tower.audio_joint_encoder_segmenter.audio_encoder.encoder.", "whisper."),
    ("audio_tower.audio_joint_encoder_segmenter.audio_segmenter.decoder.", "model.aggregator."),
    ("audio_tower.vq.rvq.mlps.", None),  # built by the published code, never used
    ("audio_tower.vq.", "model.quantizer."),
    ("speech_decoder.audio_", "model.audio_branch.audio_"),
    ("speech_decoder.fuse_encoded_audio_text_module.", "model.fusion."),
    ("speech_decoder.", "model.llm."),
    ("spoken_lm.", None),  # the text LM that was taught to write codes, and its bridge
)
# The checkpoints of the authors' first training stage name the same weights otherwise.
STAGE1_RENAMES = (
    ("audio_tokenizer.audio_quantizer.", "audio_tower.vq."),
    ("audio_tokenizer.", "audio_tower."),
    ("", "speech_decoder."),
)


class Renamed(NamedTuple):
    """Published names, sorted by what becomes of them."""

    ours: dict[str, str]  # published name -> the name in `OfficialTaste`
    left_out: list[str]  # published names that no part of the tokenizer has
    unknown: list[str]  # published names that no row of the table fits


def rename(names: Sequence[str]) -> Renamed:
    """Look published names up in `RENAMES`.

    Args:
        names: of the weights of a released model.

    Returns:
        what becomes of each.
    """
    renamed = Renamed({}, [], [])
    for name in names:
        row = next(((theirs, ours) for theirs, ours in RENAMES if name.startswith(theirs)), None)
        if row is None:
            renamed.unknown.append(name)
        elif row[1] is None:
            renamed.left_out.append(name)
        else:
            renamed.ours[name] = row[1] + name.removeprefix(row[0])
    return renamed


def rename_stage1(name: str) -> str:
    """The name that a weight of the authors' first training stage has in the released model.

    Args:
        name: of a weight of `TransformerJointLM`.

    Returns:
        its name in `TasteForCausalLM`.
    """
    theirs, released = next(row for row in STAGE1_RENAMES if name.startswith(row[0]))
    return released + name.removeprefix(theirs)
