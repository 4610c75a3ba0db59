import torch

from taste.words import word_mean, word_spans, word_starts

IDS = torch.tensor([[0, 0, 1, 2, 2, 2, 3], [0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0]])  # padding is 0
LENGTHS = torch.tensor([7, 3, 4])


def vectors() -> torch.Tensor:
    return torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))


def test_spans_are_runs_of_equal_numbers():
    assert word_spans([0, 0, 1, 2, 2]) == [(0, 2), (2, 3), (3, 5)]
    assert word_spans(torch.tensor([4])) == [(0, 1)]
    assert word_spans([]) == []


def test_every_token_of_a_word_gets_the_mean_of_the_word():
    given = vectors()
    mean = word_mean(given, IDS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        for start, end in word_spans(IDS[row, :length]):
            expected = given[row, start:end].mean(dim=0).expand(end - start, -1)
            torch.testing.assert_close(mean[row, start:end], expected)


def test_padding_joins_no_word_and_keeps_its_vectors():
    given = vectors()
    mean = word_mean(given, IDS, LENGTHS)
    torch.testing.assert_close(mean[1, 3:], given[1, 3:], rtol=0, atol=0)
    torch.testing.assert_close(mean[2, 4:], given[2, 4:], rtol=0, atol=0)


def test_batch_of_rows_equals_rows_one_by_one():
    given = vectors()
    together = word_mean(given, IDS, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = word_mean(given[[row], :length], IDS[[row], :length], LENGTHS[[row]])
        torch.testing.assert_close(together[[row], :length], alone)


def test_the_published_code_does_not_average_a_row_of_one_word_before_padding():
    given = vectors()
    mean = word_mean(given, IDS, LENGTHS, padding_joins_word_0=True)
    torch.testing.assert_close(mean[2], given[2], rtol=0, atol=0)
    torch.testing.assert_close(mean[:2, :3], word_mean(given, IDS, LENGTHS)[:2, :3])
    alone = word_mean(given[[2], :4], IDS[[2], :4], LENGTHS[[2]], padding_joins_word_0=True)
    torch.testing.assert_close(alone[0], given[2, :4].mean(dim=0).expand(4, -1))


def test_starts_mark_the_first_token_of_each_word():
    assert word_starts(IDS, LENGTHS).long().tolist() == [
        [1, 0, 1, 1, 0, 0, 1],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0],
    ]


def test_gradients_reach_every_token_of_a_word():
    given = vectors().requires_grad_()
    word_mean(given, IDS, LENGTHS)[0, 0].sum().backward()
    torch.testing.assert_close(given.grad[0, :2], torch.full((2, 5), 0.5))
    assert not given.grad[0, 2:].any()
