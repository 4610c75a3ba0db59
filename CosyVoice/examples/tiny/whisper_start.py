"""A small Whisper, and the weights that its encoder begins with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from s3tokenizer.utils import onnx2torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration
from whisper_training import FrameTeacher, encode

from taste.linear_fits import ridge

WIDTH, LAYERS, MID_LAYER = 128, 8, 6
MEL_BINS = 128
_HEADS = 2  # as wide as the released ones, and the S3 tokenizer's
_HIDDEN = 6 * WIDTH
_POSITIONS = 1_500  # 30 s
_INITIAL_STD = 0.05
_GRAFT_RIDGE = 1e-5  # of a channel's mean square
_NAMES = {  # of the S3 tokenizer's weights, and of transformers' Whisper
    "blocks": "layers",
    "attn_ln": "self_attn_layer_norm",
    "mlp_ln": "final_layer_norm",
    "attn.query": "self_attn.q_proj",
    "attn.key": "self_attn.k_proj",
    "attn.value": "self_attn.v_proj",
    "attn.out": "self_attn.out_proj",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
}


def build_whisper(heads: int = _HEADS) -> WhisperForConditionalGeneration:
    """A Whisper with weights drawn from torch's global generator; its decoder is as small as transformers allows."""
    config = WhisperConfig(
        vocab_size=8,
        num_mel_bins=MEL_BINS,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        encoder_attention_heads=heads,
        encoder_ffn_dim=_HIDDEN,
        decoder_layers=1,
        decoder_attention_heads=heads,
        decoder_ffn_dim=WIDTH,
        max_source_positions=_POSITIONS,
        max_target_positions=16,
        init_std=_INITIAL_STD,
        begin_suppress_tokens=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
        decoder_start_token_id=2,
    )
    return WhisperForConditionalGeneration(config)


def begin_as_tokenizer(path: Path) -> WhisperForConditionalGeneration:
    """Build a Whisper that begins with the S3 tokenizer's convolutions and blocks.

    The blocks from there up to the middle one add nothing at first, so that the middle states are the tokenizer's.

    Args:
        path: speech_tokenizer_v1.onnx of the recipe.

    Returns:
        the model; all of it can learn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is wider than the encoder, or deeper than the middle block.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; run stage 1 of run.sh, or give --s3-tokenizer")
    whisper = build_whisper()
    encoder = whisper.model.encoder
    found = {_whisper_name(name): value for name, value in onnx2torch(str(path)).items()}
    found.pop(None, None)
    known = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("layers."))
    state = encoder.state_dict()
    found = _widened(found, state)
    unlike = [name for name, value in found.items() if name not in state or state[name].shape != value.shape]
    if known > MID_LAYER or unlike:
        raise ValueError(
            f"{path} has {known} blocks, {len(unlike)} weights of other sizes; expected a tokenizer of width {WIDTH} "
            f"with at most {MID_LAYER} blocks, as train_s3_tokenizer.py makes it"
        )
    encoder.load_state_dict(state | found)
    for layer in encoder.layers[known:MID_LAYER]:
        for part in (layer.self_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(part.weight)
            torch.nn.init.zeros_(part.bias)
    return whisper


class TokenizerSizes(NamedTuple):
    """How large an S3 tokenizer is."""

    blocks: int
    hidden: int  # channels between the two linear layers of a block


def tokenizer_sizes(path: Path) -> TokenizerSizes:
    """Read how large an S3 tokenizer is."""
    shapes = {name: value.shape for name, value in onnx2torch(str(path)).items() if name.startswith("encoder.blocks.")}
    return TokenizerSizes(1 + max(int(name.split(".")[2]) for name in shapes), shapes["encoder.blocks.0.mlp.0.bias"][0])


@torch.no_grad()
def graft(
    lower: WhisperForConditionalGeneration,
    upper: WhisperForConditionalGeneration,
    sizes: TokenizerSizes,
    batches: Iterable[Tensor],
    sampled_frames: int,
) -> float:
    """Put the blocks of an encoder on top of those that another one has from the S3 tokenizer.

    The feed-forward layer of the last of these is made anew, by least squares: from what the tokenizer's hidden
    channels compute, and a linear map of what they listen to, in those that it did not have (gelu(x) - gelu(-x) = x),
    it gives the states that the next block knows.

    Args:
        lower: began as the tokenizer, see `begin_as_tokenizer`; gets the other one's later blocks.
        upper: what these are taken from.
        sizes: of the tokenizer.
        batches: log-mels [B, 128, 2 (L + 4)] to fit with.
        sampled_frames: of the silence behind them, see `encode`.

    Returns:
        the share of the variance of the states that the next block knows which it is given.

    Raises:
        ValueError: the tokenizer's hidden channels leave too few, or the encoders differ in size.
    """
    encoder, other = lower.model.encoder, upper.model.encoder
    hidden, linear = sizes.hidden, slice(sizes.hidden, sizes.hidden + WIDTH)
    opposite = slice(sizes.hidden + WIDTH, sizes.hidden + 2 * WIDTH)
    if opposite.stop > _HIDDEN or lower.config.encoder_attention_heads != upper.config.encoder_attention_heads:
        raise ValueError(
            f"a tokenizer with {hidden} hidden channels and {lower.config.encoder_attention_heads} heads, and a "
            f"Whisper with {upper.config.encoder_attention_heads} heads; expected at most {_HIDDEN - 2 * WIDTH} and as "
            "many heads in both"
        )
    last = encoder.layers[sizes.blocks - 1]
    found: dict[str, Tensor] = {}
    taps = [
        last.final_layer_norm.register_forward_pre_hook(lambda _, given: found.update(before=given[0])),
        other.layers[sizes.blocks].self_attn_layer_norm.register_forward_pre_hook(
            lambda _, given: found.update(wanted=given[0])
        ),
    ]
    inputs, targets, states = [], [], []
    for number, mels in enumerate(batches):
        for part in (encoder, other):  # both hear the same of the silence
            encode(part, mels, MID_LAYER, sampled_frames, torch.Generator().manual_seed(number))
        before = found["before"].flatten(0, 1)
        heard = last.final_layer_norm(before)
        inputs.append(torch.cat([F.gelu(last.fc1(heard))[:, :hidden], heard], dim=1))
        states.append(found["wanted"].flatten(0, 1))
        targets.append(states[-1] - before)
    for tap in taps:
        tap.remove()
    x, y = torch.cat(inputs).double(), torch.cat(targets).double()
    weight, bias = ridge(x, y, _GRAFT_RIDGE)
    lost = (x @ weight.T + bias - y).square().mean() / torch.cat(states).double().var(dim=0).mean()
    last.fc1.weight[linear], last.fc1.bias[linear] = torch.eye(WIDTH), 0.0
    last.fc1.weight[opposite], last.fc1.bias[opposite] = -torch.eye(WIDTH), 0.0
    last.fc2.weight.zero_()
    last.fc2.weight[:, :hidden] = weight[:, :hidden].float()
    last.fc2.weight[:, linear], last.fc2.weight[:, opposite] = weight[:, hidden:].float(), -weight[:, hidden:].float()
    last.fc2.bias.copy_(bias)
    for mine, theirs in zip(encoder.layers[sizes.blocks :], other.layers[sizes.blocks :], strict=True):
        mine.load_state_dict(theirs.state_dict())
    encoder.layer_norm.load_state_dict(other.layer_norm.state_dict())
    return 1.0 - lost.item()


def begin_as_earlier(path: Path) -> tuple[WhisperForConditionalGeneration, dict[str, Tensor] | None]:
    """Build a Whisper whose encoder computes what an earlier one does.

    Args:
        path: last.pt of an earlier training, or a folder in transformers' format; the folder's feed-forward layers may
            be narrower.

    Returns:
        the model, and the state of the earlier training's teacher, which a folder has not.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another size.
    """
    if not (path / "model.safetensors" if path.is_dir() else path).is_file():
        raise FileNotFoundError(
            f"{path}: expected last.pt of train_whisper.py, or a folder with a Whisper's config.json and "
            "model.safetensors in it, as CosyVoice-tiny/whisper; run train_whisper.py, or name the right one"
        )
    if path.is_dir():
        earlier = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
        heads, found, teacher = earlier.config.encoder_attention_heads, earlier.model.encoder.state_dict(), None
    else:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if "heads" not in checkpoint["settings"]:
            raise ValueError(f"{path} is of a training without S3 units; give the folder with its model instead")
        heads = checkpoint["settings"]["heads"]
        found, teacher = (checkpoint["parts"][name] for name in ("encoder", "teacher"))
    whisper = build_whisper(heads)
    state = whisper.model.encoder.state_dict()
    found = _widened(found, state)
    if {name: value.shape for name, value in found.items()} != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"{path} holds an encoder of other sizes; expected {LAYERS} blocks of width {WIDTH}")
    whisper.model.encoder.load_state_dict(found)
    return whisper, teacher


def take_teacher(teacher: FrameTeacher, earlier: Mapping[str, Tensor]) -> None:
    """Put in the weights of an earlier training's teacher, but for its text embeddings.

    Raises:
        ValueError: its S3 units or its text tokens are others.
    """
    kept = {"embeddings": teacher.embeddings}
    if earlier["embeddings"].shape != teacher.embeddings.shape or not torch.equal(earlier["codes"], teacher.codes):
        raise ValueError(
            "START_FROM is a training on other text tokens or S3 units; give its folder instead of last.pt"
        )
    teacher.load_state_dict({**earlier, **kept})


def _whisper_name(name: str) -> str | None:
    """What transformers' Whisper encoder calls a weight of the S3 tokenizer; None for one that it has not."""
    part, _, rest = name.partition(".")
    if part != "encoder" or rest == "positional_embedding":
        return None
    for old, new in _NAMES.items():
        rest = rest.replace(old, new)
    return rest


def _widened(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Embed feed-forward layers into wider ones that compute the same: what is new listens, but says nothing yet.

    Args:
        found: weights by name.
        state: those of the encoder, as drawn; what is new keeps them where it listens.
    """
    wide = dict(found)
    for name, value in found.items():
        if name not in state or ".fc" not in name or value.dim() != state[name].dim():
            continue
        own = state[name].clone()
        if any(narrow > size for narrow, size in zip(value.shape, own.shape, strict=True)):
            continue
        if name.endswith("fc2.weight"):
            own.zero_()
        own[tuple(slice(size) for size in value.shape)] = value
        wide[name] = own
    return wide
