import pytest
import torch

from taste.alignment import align

EMBEDDINGS, CHANNELS, WORDS = 16, 24, 40


def spoken_texts(noise: float, count: int = 30, seed: int = 0) -> tuple[list, list, list]:
    """Texts of drawn words; frames that point, noisily, to the word being spoken, or to silence; the true spans."""
    generator = torch.Generator().manual_seed(seed)

    def between(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    words = torch.randn(WORDS, EMBEDDINGS, generator=generator) + 2.0  # embeddings are not centred by nature
    frequency = 1.0 / torch.arange(1, WORDS + 1)  # nor are words equally frequent
    voice = torch.randn(EMBEDDINGS, CHANNELS, generator=generator) / EMBEDDINGS**0.5
    silence = torch.randn(1, CHANNELS, generator=generator)
    texts, speech, spans = [], [], []
    for _ in range(count):
        chosen = torch.multinomial(frequency, between(4, 8), generator=generator)
        parts, times, start = [silence.expand(between(2, 6), -1)], [], 0
        for word in words[chosen]:
            start = sum(map(len, parts))
            parts.append((word @ voice).expand(between(3, 15), -1))
            times.append([start, start + len(parts[-1])])
            if between(0, 5) == 0:
                parts.append(silence.expand(between(3, 9), -1))  # a pause
        frames = torch.cat([*parts, silence.expand(between(2, 6), -1)])
        texts.append(words[chosen])
        speech.append(frames + noise * torch.randn(frames.shape, generator=generator))
        spans.append(torch.tensor(times))
    return texts, speech, spans


@pytest.mark.parametrize(("noise", "least"), [(0.1, 0.99), (1.0, 0.9)])
def test_words_are_found_where_they_are_spoken_and_silence_is_left_out(noise, least):
    texts, speech, spans = spoken_texts(noise)
    found = align(texts, speech)
    errors = torch.cat([(mine - true).abs() for mine, true in zip(found.spans, spans, strict=True)])
    assert (errors <= 1).float().mean() >= least


def test_the_map_points_to_the_embedding_of_what_is_spoken():
    texts, speech, spans = spoken_texts(noise=0.1)
    found = align(texts, speech)
    for text, frames, times in zip(texts, speech, spans, strict=True):
        middles = times.float().mean(dim=1).long()
        scores = (frames[middles] @ found.weight.T + found.bias) @ (text - found.centre).T  # [T, T]
        assert torch.equal(scores.argmax(dim=0), torch.arange(len(text)))


def test_tokens_keep_their_order_and_each_has_a_frame():
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randn(5, EMBEDDINGS, generator=generator) for _ in range(4)]
    speech = [torch.randn(frames, CHANNELS, generator=generator) for frames in (5, 6, 20, 33)]  # noise only
    for spans, frames in zip(align(texts, speech).spans, speech, strict=True):
        assert bool((spans[:, 0] < spans[:, 1]).all()) and bool((spans[1:, 0] >= spans[:-1, 1]).all())
        assert spans.min() >= 0 and spans.max() <= len(frames)


def test_a_recording_shorter_than_its_text_disturbs_no_other():
    texts, speech, _ = spoken_texts(noise=0.1, count=10)
    alone = align(texts, speech)
    more = align([*texts, texts[0]], [*speech, speech[0][:2]])
    assert [spans.tolist() for spans in more.spans[:-1]] == [spans.tolist() for spans in alone.spans]
    assert more.spans[-1].shape == (len(texts[0]), 2) and more.spans[-1].max() <= 2


def test_no_usable_recording_is_an_error():
    with pytest.raises(ValueError, match="nothing can be aligned"):
        align([torch.randn(3, EMBEDDINGS)], [torch.randn(2, CHANNELS)])
