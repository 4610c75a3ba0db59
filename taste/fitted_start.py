"""Fits a variant's new modules to its training set, so that training starts beside the pretrained model."""

import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taste.aggregator import SimpleTextSpeechAggregator
from taste.batch import Example
from taste.data import UtteranceDataset
from taste.fitted_attention import Agreement, agreement, best_sharpness, find_spoken, scores_of, sharpen
from taste.fitted_taste import fit_listening, quiet_branch, start_quantizer
from taste.linear_fits import ridge, whitening
from taste.model import CosyVoiceS3Model
from taste.subsample import finite_examples
from taste.taste_aggregator import TasteAggregator
from taste.threads import torch_threads_kept
from taste.variants import PARTS

# T text tokens   A Whisper frames, 50 Hz   D channels of the LM   E of the text embeddings   N tokens of all utterances

MOST_UTTERANCES = 100  # that are looked at; more would cost time and memory
QUANTIZER_UTTERANCES = 500  # whose words the codebooks start from: some 35 words a code in LibriSpeech
SHARPEN_STEPS = 60  # of query and key
SPEECH_GAIN = 0.1  # what speech is multiplied with beside the text at first: a hint that training can make louder


@contextmanager
def _share_of_the_cores() -> Iterator[None]:
    """Compute with as many threads as this process may have cores.

    A launcher of several processes gives each one thread (OMP_NUM_THREADS=1): right beside a GPU, slow on the CPU.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # of this machine, as a launcher notes it
    with torch_threads_kept():
        if processes > 1:
            torch.set_num_threads(max(torch.get_num_threads(), len(os.sched_getaffinity(0)) // processes))
        yield


@torch.no_grad()
@_share_of_the_cores()
def fit_new_parts(
    model: CosyVoiceS3Model,
    dataset: UtteranceDataset,
    parts: Collection[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Give new modules weights with which the pretrained ones can work.

    Of `simple`:

    - `input_proj` becomes the linear map from LayerNorm(text embeddings) that comes closest, over the training texts,
      to what the pretrained text encoder makes of them: the LM goes on reading what it was trained to read.
    - query and key find each token where `align` found it spoken.
    - value and output keep the directions in which the speech of tokens differs most; the speech's norm begins quiet.

    Of `taste_novq` and `taste`: see `taste.fitted_taste`. The codebooks of `taste` start from words of
    QUANTIZER_UTTERANCES utterances, by k-means.

    The same model and data give the same weights; nothing is drawn from torch's global random generator.

    Args:
        model: on the CPU.
        dataset: the training set; some utterances from all of it are read.
        parts: names of those to fit; None: all that the variant has beside the pretrained model.
        say: takes what a person should know.

    Returns:
        what to note about it, as JSON knows values: utterances; attention_on_token (mean share of a token's attention
        that is where it is spoken) and attention_on_token_evenly (the same if it looked at all frames alike), but not
        of an aggregator that came from Whisper and is left as it is; of `simple` text_explained (share of the text
        encoder's variance that the projection gives); of `taste` code_usage (share of each codebook that these words
        use).

    Raises:
        ValueError: no utterance is fit for it.
    """
    wanted = set(PARTS[model.variant] if parts is None else parts)
    assert wanted, "only a model with an aggregator has new modules"
    examples = list(_finite(dataset, MOST_UTTERANCES, say))
    if not examples:
        raise ValueError("no utterance that the new modules could be fitted to has features that are numbers")
    notes: dict[str, Any] = {"utterances": len(examples)}
    if model.variant == "simple":
        notes["text_explained"] = _fit_text_path(model, examples)
        attention = _fit_attention(model, examples)
        _fit_values(model, examples)
        return notes | _of_attention(attention)
    assert isinstance(model.aggregator, TasteAggregator)
    if "aggregator" in wanted and model.aggregator.embed_tokens is None:  # Whisper's own decoder can listen already
        notes |= _of_attention(fit_listening(model, examples))
    if "audio_branch" in wanted:
        quiet_branch(model, examples, SPEECH_GAIN)
    if "quantizer" in wanted:
        notes["code_usage"] = start_quantizer(model, _finite(dataset, QUANTIZER_UTTERANCES, say))
    return notes


def _finite(dataset: UtteranceDataset, wanted: int, say: Callable[[str], None]) -> Iterator[Example]:
    return (example for _, example in finite_examples(dataset, wanted, say, "nothing is fitted to it"))


def _of_attention(found: Agreement) -> dict[str, float]:
    return {"attention_on_token": found.on_token, "attention_on_token_evenly": found.evenly}


def _fit_text_path(model: CosyVoiceS3Model, examples: Sequence[Example]) -> float:
    """Set `input_proj`; gives the share of the variance it explains."""
    inputs, wanted = [], []
    for example in examples:
        encoded, _ = model.llm.encode(example.text[None], torch.tensor([len(example.text)]))
        inputs.append(model.text_norm(example.text))
        wanted.append(encoded[0])
    x, y = torch.cat(inputs).double(), torch.cat(wanted).double()  # [N, E], [N, D]
    weight, bias = ridge(x, y)
    model.input_proj.weight.copy_(weight)
    model.input_proj.bias.copy_(bias)
    rest = y - (x @ weight.T + bias)
    return 1 - float(rest.square().sum() / (y - y.mean(dim=0)).square().sum())


def _fit_attention(model: CosyVoiceS3Model, examples: Sequence[Example]) -> Agreement:
    """Set query and key."""
    aggregator = _aggregator(model)
    spoken = find_spoken(examples)
    found, size = spoken.alignment, spoken.size
    sharpness = best_sharpness(scores_of(spoken, examples), spoken.outside)
    # the attention divides its scores by the root of its width; query and key share the rest
    factor = math.sqrt(sharpness * math.sqrt(aggregator.text_width))
    aggregator.query.weight.copy_(torch.eye(aggregator.text_width) * (factor / size))
    aggregator.query.bias.copy_(-found.centre * (factor / size))
    aggregator.key.weight.copy_(found.weight * factor)
    aggregator.key.bias.copy_(found.bias * factor)
    parameters = [*aggregator.query.parameters(), *aggregator.key.parameters()]

    def attention(number: int) -> Tensor:
        return _attention(model, examples[number])

    sharpen(parameters, attention, spoken.outside, SHARPEN_STEPS)
    return agreement(attention, spoken.outside)


def _aggregator(model: CosyVoiceS3Model) -> SimpleTextSpeechAggregator:
    assert isinstance(model.aggregator, SimpleTextSpeechAggregator)
    return model.aggregator


def _attention(model: CosyVoiceS3Model, example: Example) -> Tensor:
    """Where each token of one utterance looks, [T, A]."""
    final, _ = example.speech
    return _aggregator(model).attention(example.text[None], final[None], torch.tensor([len(final)]))[0]


def _fit_values(model: CosyVoiceS3Model, examples: Sequence[Example]) -> None:
    """Set value, output and the speech's gain."""
    aggregator = _aggregator(model)
    heard = torch.cat([_attention(model, example) @ example.speech[1] for example in examples])
    weight, bias = whitening(heard, aggregator.text_width)  # of [N, speech_width]
    for parameter, value in ((aggregator.value.weight, weight), (aggregator.value.bias, bias)):
        parameter.zero_()
        parameter[: len(value)] = value.to(parameter.dtype)
    aggregator.output.weight.copy_(torch.eye(aggregator.text_width))
    aggregator.output.bias.zero_()
    model.speech_norm.weight.fill_(SPEECH_GAIN)
