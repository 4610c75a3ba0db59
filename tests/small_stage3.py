"""Random features and a small model for the tests of stage 3; the language model has the reference's weights."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.lm_models import build_language_model
from cosyvoice.utils.model_dir import ModelSizes
from cosyvoice.utils.rates import S3_UNITS_PER_SECOND
from taste.aggregator import SimpleTextSpeechAggregator
from taste.batch import Batch, Example, collate
from taste.build import TasteSizes, taste_parts
from taste.data import UtteranceDataset, open_dataset
from taste.feature_set import FeaturePaths
from taste.fitted_taste import start_quantizer
from taste.model import CosyVoiceS3Model
from taste.training_config import TrainingConfig

GOLDEN_LLM = Path(__file__).parent / "golden" / "small_llm.pt"
SIZES = ModelSizes(
    text_vocab=120, text_width=24, lm_width=32, speech_vocab=64, spk_width=192, sample_rate=22_050, token_rate=50
)
SPEECH_WIDTH = 20
CONFIG = TrainingConfig(
    num_epochs=2,
    batch_size=2,
    lr=1e-3,
    new_modules_lr=1e-3,
    warmup_steps=2,
    weight_decay=0.01,
    grad_clip=1.0,
    accumulation_steps=1,
    seed=0,
)
TASTE_SIZES = TasteSizes(
    aggregator_heads=4,
    audio_layers=1,
    audio_heads=4,
    audio_ffn_dim=40,
    num_quantizers=3,
    codebook_size=8,
    codebook_dim=12,
)


def small_model(
    variant: str = "simple", dropout: float | None = None, sizes: dict | None = None, started: bool = True, **options
) -> CosyVoiceS3Model:
    """A model in eval mode; `dropout` replaces the configured probability, `sizes` some of TASTE_SIZES."""
    sizes = sizes or {}
    llm = build_language_model("small")
    llm.load_state_dict(torch.load(GOLDEN_LLM, weights_only=True))
    torch.manual_seed(1)
    parts = {}
    if variant == "simple":
        parts = {"aggregator": SimpleTextSpeechAggregator(SIZES.text_width, SPEECH_WIDTH)}
    elif variant.startswith("taste"):
        parts = taste_parts(variant, SIZES.text_width, SPEECH_WIDTH, llm.llm_input_size, replace(TASTE_SIZES, **sizes))
    model = CosyVoiceS3Model(llm, variant=variant, **parts, **options)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout) and dropout is not None:
            part.p = dropout
    if model.quantizer is not None and started:
        start_quantizer(model, random_examples([(6, 20)] * 12, seed=9))
    return model.eval()


def random_examples(lengths: Sequence[tuple[int, int]], seed: int = 0) -> list[Example]:
    """Utterances of (text tokens, units) each; Whisper frames are as many as units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return [
        Example(
            utt_id=f"utt-{number:02d}",
            text=draw(tokens, SIZES.text_width),
            speech_final=draw(units, SPEECH_WIDTH),
            speech_mid=draw(units, SPEECH_WIDTH),
            speaker=draw(SIZES.spk_width),
            units=torch.randint(0, SIZES.speech_vocab, (units,), generator=generator),
            text_tokens=torch.arange(tokens) + 10 * number,
            word_ids=torch.arange(tokens) * 2 // 3,  # words of two tokens and of one take turns
        )
        for number, (tokens, units) in enumerate(lengths)
    ]


def random_batch(lengths: Sequence[tuple[int, int]], seed: int = 0) -> Batch:
    return collate(random_examples(lengths, seed))


def write_features(folder: Path, split: str, examples: Sequence[Example], speakers: Sequence[str] = ()) -> FeaturePaths:
    """The four files that stages 1 and 2 would have written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = FeaturePaths(
        units=folder / f"{split}_utt2s3.pt",
        text=folder / f"{split}_text_emb.pt",
        speech=folder / f"{split}_whisper_feats.pt",
        info=folder / f"{split}_utt2info.pt",
    )
    torch.save({example.utt_id: example.units.tolist() for example in examples}, paths.units)
    torch.save({example.utt_id: example.text for example in examples}, paths.text)
    layers = {"mid": "speech_mid", "final": "speech_final"}
    torch.save(
        {name: {e.utt_id: getattr(e, field).half() for e in examples} for name, field in layers.items()}, paths.speech
    )
    info = {
        example.utt_id: {
            "text": "some words",
            "spk_embedding": example.speaker,
            "duration_s": len(example.units) / S3_UNITS_PER_SECOND,
            "text_token": example.text_tokens,
            "word_id": example.word_ids,
        }
        for example in examples
    }
    for example, speaker in zip(examples, speakers, strict=False):
        info[example.utt_id]["speaker"] = speaker
    torch.save(info, paths.info)
    return paths


def small_dataset(folder: Path, split: str, lengths: Sequence[tuple[int, int]], seed: int = 0) -> UtteranceDataset:
    return open_dataset(write_features(folder, split, random_examples(lengths, seed)), SIZES)
