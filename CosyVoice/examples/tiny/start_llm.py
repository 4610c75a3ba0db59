"""Give the tiny recipe's language model a start from which it learns to read: sounds of its text and of its units.

In: `<work-dir>/corpus/{train,phrases,lively,dev}`, the S3 tokenizer, the configuration. Out, in
`<work-dir>/llm_start/`: llm.pt, from which teach_reading.py goes on, and metrics.json: how many phones of a token the
text encoder's output tells.

    python CosyVoice/examples/tiny/start_llm.py --work-dir CosyVoice/examples/tiny/work     (4 minutes)
    python CosyVoice/examples/tiny/start_llm.py --work-dir /tmp/work --steps 20             (a look)

A language model that starts at random first learns which unit follows which, and then hardly ever what its text is
for: in three hours of speech each word comes some twenty times. So its text side first learns, from text alone, how
flite pronounces each token, and its unit side begins with the tokenizer's codes, which lie close where units sound
alike. Tokens that the corpus does not have are never taught anything: they get random signs as embeddings, which tell
them apart and compress well. The rest stays as drawn. Exit codes: 0 done, 1 error, 2 unknown flag, 130/143 stopped;
begin again then.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from corpus_reader import PAUSE, PHONES, Spoken, read_split
from flite_speech import find_flite
from resumable import learning_rate, run_to_the_end
from word_times import Span, pronounce_texts, time_tokens

from cosyvoice.llm.llm import TransformerLM
from cosyvoice.utils.atomic import write_json
from cosyvoice.utils.config import load_config
from cosyvoice.utils.settings import Settings, parse_settings, pick_device
from cosyvoice.utils.tensor_file import save_tensors
from cosyvoice.utils.train_utils import load_model
from taste.s3_units import load_s3_tokenizer

# B texts   T text tokens   H phones of a token   D channels of the language model

WORK_DIR = Path("CosyVoice/examples/tiny/work")  # holds corpus/; llm_start/ is made in it
CONFIG = Path(__file__).with_name("conf") / "cosyvoice.yaml"  # sizes of the language model
S3_TOKENIZER = None  # str: speech_tokenizer_v1.onnx; none: <work-dir>/s3_tokenizer/speech_tokenizer_v1.onnx
STEPS = 1500  # of the text side
BATCH_SIZE = 64  # texts a step
LR = 3e-3  # highest learning rate of AdamW
SEED = 1986  # of weights and order
THREADS = 1  # of the CPU
DEVICE = "auto"  # auto, cpu, cuda

_MOST_PHONES = 8  # of a token that are asked for; behind its last one stands the pause
_GRAD_CLIP = 1.0
_SPLITS = ("train", "phrases", "lively")  # all that the language model will read
_TEXT_SIDE = ("text_embedding", "text_encoder", "text_encoder_affine_layer")


class Pronounced(NamedTuple):
    """A text and how it is said."""

    tokens: Tensor  # [T] int64
    phones: Tensor  # class of each phone of each token, [T, H] int64


def main(argv: Sequence[str] | None = None) -> int:
    """Run with the constants above, as the command line changes them; return the exit code."""
    settings = parse_settings(__file__, globals(), argv)
    return run_to_the_end(run, settings)


def run(settings: Settings, stop_requested: Callable[[], bool]) -> bool:
    """Build, teach, write.

    Args:
        settings: the script's constants.
        stop_requested: asked after each step.

    Returns:
        False where it was asked to stop; nothing is written then.

    Raises:
        OSError, ValueError: the message is for the person at the keyboard.
    """
    folder = settings.work_dir / "llm_start"
    print(f"settings of {folder}:\n{settings.describe()}\n")
    onnx_path = settings.s3_tokenizer or settings.work_dir / "s3_tokenizer" / "speech_tokenizer_v1.onnx"
    codes = load_s3_tokenizer(onnx_path).state_dict()["quantizer._codebook.embed"]
    texts = read_pronounced(settings)
    torch.manual_seed(settings.seed)
    model: TransformerLM = load_model(settings.config, "llm")
    place_codes(model, codes)
    mark_unused_tokens(model, texts["train"])
    reader = nn.Linear(model.llm_input_size, _MOST_PHONES * len(PHONES))
    device = pick_device(settings.device)
    model.to(device), reader.to(device)
    if not teach(settings, model, reader, texts["train"], stop_requested):
        return False
    metrics = {"texts": len(texts["train"]), **measure(model, reader, texts["dev"])}
    save_tensors(folder / "llm.pt", {name: value.detach().cpu() for name, value in model.state_dict().items()})
    write_json(folder / "metrics.json", metrics)
    print(json.dumps(metrics, indent=2))
    return True


def read_pronounced(settings: Settings) -> dict[str, list[Pronounced]]:
    """Read the corpus's texts with the phones of each token; `train` has those of all splits to learn from."""
    corpus = settings.work_dir / "corpus"
    texts = {
        "train": [item for split in _SPLITS for item in read_split(corpus, split)],
        "dev": read_split(corpus, "dev"),
    }
    tokenizer = load_config(settings.config, ["get_tokenizer"])["get_tokenizer"]()
    lexicon = pronounce_texts((item.text for item in texts["train"] + texts["dev"]), find_flite())
    return {
        name: [pronounced(spoken, tokenizer, lexicon) for spoken in tqdm(split, desc=f"texts, {name}", mininterval=2)]
        for name, split in texts.items()
    }


def pronounced(spoken: Spoken, tokenizer: Any, lexicon: dict[str, tuple[str, ...]]) -> Pronounced:
    """Say which phones belong to each token of an utterance's text."""
    timed = time_tokens(spoken, tokenizer, lexicon)
    phones = torch.zeros(len(timed.tokens), _MOST_PHONES, dtype=torch.int64)
    for row, span in zip(phones, timed.spans, strict=True):
        heard = [] if span is None else phones_within(spoken.phones, span)
        row[: len(heard)] = torch.tensor([PHONES.index(phone) for phone in heard], dtype=torch.int64)
    return Pronounced(torch.tensor(timed.tokens), phones)


def phones_within(phones: Sequence[tuple[str, float]], span: Span) -> list[str]:
    """The phones whose middle lies in a stretch, pauses left out; the first ones, where they are many."""
    starts = [0.0, *(end for _, end in phones[:-1])]
    heard = [
        phone
        for (phone, end), start in zip(phones, starts, strict=True)
        if phone != PAUSE and span.start <= (start + end) / 2 < span.end
    ]
    return heard[:_MOST_PHONES]


def place_codes(model: TransformerLM, codes: Tensor) -> None:
    """Let the unit embeddings, and the rows that predict units, begin with the tokenizer's codes.

    Args:
        model: the language model; `speech_embedding` and `llm_decoder` are changed.
        codes: the tokenizer's codebook, [units, C]; turned at random into the model's width where C is another one.
    """
    centred = spread_codes(codes, model.speech_embedding.embedding_dim)
    with torch.no_grad():
        drawn = model.llm_decoder.weight.std()
        model.speech_embedding.weight.copy_(centred)
        model.llm_decoder.weight[: len(centred)] = drawn * centred


def spread_codes(codes: Tensor, width: int) -> Tensor:
    """Scale a tokenizer's codes to be embeddings: centred, with a mean square of 1, as torch draws them.

    Args:
        codes: its codebook, [units, C].
        width: wanted; where C is another one, the codes are turned at random.

    Returns:
        [units, width], float32.
    """
    centred = codes - codes.mean(dim=0)
    if codes.shape[1] != width:
        centred = centred @ torch.randn(codes.shape[1], width)
    return F.normalize(centred, dim=1) * width**0.5


def mark_unused_tokens(model: TransformerLM, texts: Sequence[Pronounced]) -> None:
    """Give all text tokens that do not occur random signs as embeddings.

    Args:
        model: the language model; `text_embedding` is changed.
        texts: the training set's.
    """
    unused = torch.ones(model.text_embedding.num_embeddings, dtype=torch.bool)
    unused[torch.cat([text.tokens for text in texts])] = False
    with torch.no_grad():
        weight = model.text_embedding.weight
        weight[unused] = weight[unused].sign()


def teach(
    settings: Settings,
    model: TransformerLM,
    reader: nn.Linear,
    texts: Sequence[Pronounced],
    stop_requested: Callable[[], bool],
) -> bool:
    """Teach the text side which phones each token has; gives False where it was asked to stop."""
    learning = [*reader.parameters()]
    learning += [weight for name in _TEXT_SIDE for weight in model.get_submodule(name).parameters()]
    optimizer = torch.optim.AdamW(learning, lr=settings.lr, weight_decay=0.01)
    draw = random.Random(settings.seed)
    model.train()
    bar = tqdm(range(settings.steps), desc="pronunciation", unit="step", mininterval=2)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr)
        loss, share = phone_loss(model, reader, draw.sample(texts, min(len(texts), settings.batch_size)))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(learning, _GRAD_CLIP)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", phones=f"{share.item():.3f}")
        if stop_requested():
            return False
    return True


def phone_loss(model: TransformerLM, reader: nn.Linear, batch: Sequence[Pronounced]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the phones of each token, and the share of them that is right, pauses left out."""
    device = reader.weight.device
    tokens = nn.utils.rnn.pad_sequence([text.tokens for text in batch], batch_first=True).to(device)
    lengths = torch.tensor([len(text.tokens) for text in batch], device=device)
    encoded, _ = model.encode(model.text_embedding(tokens), lengths)
    valid = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
    logits = reader(encoded[valid]).unflatten(1, (_MOST_PHONES, len(PHONES)))
    phones = torch.cat([text.phones for text in batch]).to(device)
    right = (logits.argmax(dim=-1) == phones)[phones != PHONES.index(PAUSE)]
    return F.cross_entropy(logits.flatten(0, 1), phones.flatten()), right.float().mean()


@torch.no_grad()
def measure(model: TransformerLM, reader: nn.Linear, texts: Sequence[Pronounced]) -> dict[str, float]:
    """How well unseen sentences' phones are told."""
    model.eval()
    loss, share = phone_loss(model, reader, texts)
    return {"dev_loss": loss.item(), "dev_phone_accuracy": share.item()}


if __name__ == "__main__":
    sys.exit(main())
