"""Gives the parts that `taste_novq` and `taste` have beside the pretrained model weights to start from."""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from taste.batch import Batch, Example, collate
from taste.fitted_attention import Agreement, Spoken, agreement, best_sharpness, find_spoken, scores_of, sharpen
from taste.lengths import valid_mask
from taste.linear_fits import whitening, widest_directions
from taste.model import CosyVoiceS3Model
from taste.quantizer import NO_CODE
from taste.taste_aggregator import TasteAggregator
from taste.words import word_starts

# T text tokens   A Whisper frames, 50 Hz   H heads   D channels of the speech   E of the text embeddings   W words

TEXT_SHARE = 0.3  # length of a token's text in the aggregator, of what is heard of it: who looks must not drown it
POSITION_SHARE = 0.5  # length of a token's position, of its text: the fourth word is hardly the first to be heard
SHARPEN_STEPS = 30  # of queries and keys; after more they find the training words better, and others no better
BATCH = 16  # utterances looked at together
KMEANS_SEED = 0


@torch.no_grad()
def fit_listening(model: CosyVoiceS3Model, examples: Sequence[Example]) -> Agreement:
    """Make the aggregator look at each token where an alignment finds it spoken, and say what it hears there.

    - `text_proj` turns the embeddings into directions of equal length; all queries and keys then find what goes with
      them by the alignment's map, and are sharpened on the alignment itself.
    - The last layer hands on what it hears, in channels of equal variance that do not depend on each other. All that
      is not needed for that (self-attention, feed-forward, what the layers before hear) begins silent, and learns.

    Args:
        model: of variant `taste_novq` or `taste`, on the CPU; only its aggregator changes.
        examples: of the training set.

    Returns:
        how well the last layer looks.

    Raises:
        ValueError: no recording has as many frames as tokens.
    """
    aggregator = model.aggregator
    assert isinstance(aggregator, TasteAggregator) and aggregator.text_proj is not None, "Whisper's own needs no fit"
    text_proj = aggregator.text_proj
    spoken = find_spoken(examples)
    _look_by_map(aggregator, spoken, best_sharpness(scores_of(spoken, examples), spoken.outside))
    batches = [collate([example]) for example in examples]

    def attention(number: int) -> Tensor:  # [layers, H, T, A]; all layers look at the same, while they are silent
        batch = batches[number]
        assert batch.speech_final is not None
        text = text_proj(batch.text) + aggregator.embed_positions.weight[: batch.text.shape[1]]
        attentions = [(layer.encoder_attn, layer.encoder_attn_layer_norm(text)) for layer in aggregator.layers]
        return torch.cat([looker.weights(queries, batch.speech_final) for looker, queries in attentions])

    looking = [text_proj.weight, text_proj.bias]
    for layer in aggregator.layers:
        looking += [layer.encoder_attn.q_proj.weight, layer.encoder_attn.q_proj.bias, layer.encoder_attn.k_proj.weight]
    sharpen(looking, attention, spoken.outside, SHARPEN_STEPS)
    _say_what_is_heard(aggregator, batches)
    return agreement(lambda number: attention(number)[-1], spoken.outside)


@torch.no_grad()
def quiet_branch(model: CosyVoiceS3Model, examples: Sequence[Example], gain: float) -> None:
    """Scale the audio branch so that it begins as a hint beside the text.

    Args:
        model: of variant `taste_novq` or `taste`, on the CPU; only the last layer of its audio branch changes.
        examples: of the training set.
        gain: size of the branch's outputs at first, of the encoded text's.
    """
    assert model.audio_branch is not None
    training = model.training
    model.eval()
    spoken, written = [], []
    for batch in _batches(examples):
        valid = valid_mask(batch.text_lengths, batch.text.shape[1])
        spoken.append(model.audio_branch(model.aggregate(batch), batch.text_lengths)[valid])
        written.append(model.llm.encode(batch.text, batch.text_lengths)[0][valid])
    heard, text = torch.cat(spoken), torch.cat(written)
    last = model.audio_branch.audio_token_encoder_affine_layer
    mean = heard.mean(dim=0)
    factor = gain * float((text - text.mean(dim=0)).norm() / (heard - mean).norm())
    last.bias.copy_(factor * (last.bias - mean))
    last.weight.mul_(factor)
    model.train(training)


@torch.no_grad()
def start_quantizer(model: CosyVoiceS3Model, examples: Iterable[Example]) -> list[float]:
    """Start the codebooks from the words of the training set, and let the quantizer change words as little as it can.

    The codebooks' space becomes that of the widest directions of the words, and k-means places the codes in it.

    Args:
        model: of variant `taste`, on the CPU; only its quantizer changes.
        examples: of the training set; few of them are held at a time.

    Returns:
        share of the codes that some word uses, of each level.
    """
    assert model.quantizer is not None
    quantizer, rvq = model.quantizer, model.quantizer.rvq
    training = model.training
    model.eval()
    words = []
    for batch in _batches(examples):
        assert batch.word_ids is not None
        starts = word_starts(batch.word_ids, batch.text_lengths)
        words.append(model.aggregate(batch)[starts])
    samples = torch.cat(words)[None]  # [1, W, D]
    if rvq.has_projections:
        found = widest_directions(samples[0], rvq.codebook_dim)
        axes = found.axes.float()
        for parameter, value in (
            (rvq.project_in.weight, axes.T),
            (rvq.project_in.bias, -axes.T @ found.mean.float()),
            (rvq.project_out.weight, axes),
            (rvq.project_out.bias, found.mean.float()),
        ):
            parameter.zero_()
            parameter[tuple(map(slice, value.shape))] = value
    everyone = torch.ones(samples.shape[:2], dtype=torch.bool)
    # every process of a run has the same words, and comes to the same codes
    with quantizer.without_exchange(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(KMEANS_SEED)
        quantizer.train()(samples, everyone)
    codes = quantizer.eval()(samples, everyone).codes[0]
    model.train(training)
    assert not (codes == NO_CODE).any(), "the codebooks did not start"
    return [len(level.unique()) / quantizer.codes for level in codes.T]


def _look_by_map(aggregator: TasteAggregator, spoken: Spoken, sharpness: float) -> None:
    """Set what queries and keys are made of."""
    width, found = aggregator.speech_width, spoken.alignment
    most = min(width - 1, found.weight.shape[0])
    axes = widest_directions(found.weight.T, most).axes  # [E, most]: where the frames' map has anything to say
    # orthonormal, and orthogonal to what LayerNorm takes away
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), torch.eye(width)[:, : width - 1]], dim=1).double())[0]
    into = basis[:, 1 : 1 + most]  # [D, most]
    length = TEXT_SHARE * math.sqrt(width)
    project = (into @ axes.T).float() * (length / spoken.size)
    assert aggregator.text_proj is not None
    aggregator.text_proj.weight.copy_(project)
    aggregator.text_proj.bias.copy_(-project @ found.centre)
    positions = aggregator.embed_positions.weight
    positions.mul_(POSITION_SHARE * length / float(positions[0].norm()))
    for layer in aggregator.layers:
        attention = layer.encoder_attn
        head = width // attention.heads
        kept = min(head, most)
        # LayerNorm gives a query the length sqrt(D); the scores are divided by sqrt(head)
        factor = math.sqrt(sharpness * math.sqrt(head) / math.sqrt(width))
        seen = axes[:, :kept].T @ found.weight.double()  # [kept, D]
        for parameter, value in (
            (attention.q_proj.weight, into[:, :kept].T * factor),
            (attention.k_proj.weight, seen * factor),
        ):
            parameter.zero_()
            parameter.view(attention.heads, head, width)[:, :kept] = value.float()
        attention.q_proj.bias.zero_()
        for silent in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
            silent.weight.zero_()
            silent.bias.zero_()


def _say_what_is_heard(aggregator: TasteAggregator, batches: Sequence[Batch]) -> None:
    """Set values and output of the last layer's attention."""
    attention = aggregator.layers[-1].encoder_attn
    aggregator.reset_values()
    heard = []
    for batch in batches:
        final, mid, lengths = batch.speech_final, batch.speech_mid, batch.speech_lengths
        assert final is not None and mid is not None and lengths is not None
        inputs = (batch.text, final, mid, batch.text_lengths, lengths, batch.text_tokens)
        weights = aggregator.attention(*inputs, by_head=True)[0]  # [H, T, A]
        values = attention.v_proj(mid)[0].unflatten(-1, (attention.heads, -1)).transpose(0, 1)
        heard.append((weights @ values).transpose(0, 1).flatten(1))  # [T, D]
    weight, bias = whitening(torch.cat(heard), aggregator.speech_width)
    attention.out_proj.weight.copy_(weight)
    attention.out_proj.bias.copy_(bias)


def _batches(examples: Iterable[Example]) -> Iterator[Batch]:
    examples = iter(examples)
    while some := list(islice(examples, BATCH)):
        yield collate(some)
