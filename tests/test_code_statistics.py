import pytest
import torch

from taste.code_statistics import collapse_warning, describe_codes


def test_usage_perplexity_and_rates_are_those_of_a_counted_example():
    codes = [torch.tensor([[0, 3], [1, 3], [2, 3]]), torch.tensor([[3, 3]])]
    found = describe_codes(codes, seconds=2.0, codebook_size=8)
    assert found["words"] == 4 and found["words_per_second"] == 2.0
    assert found["bits_per_word"] == 6.0 and found["bits_per_second"] == 12.0
    assert found["used"] == [4, 1] and found["usage"] == [1.0, 0.25]  # of the 4 codes that 4 words could use
    assert found["perplexity"] == pytest.approx([4.0, 1.0])
    assert found["entropy_bits_per_second"] == pytest.approx(2 * 2.0)


def test_usage_is_of_the_codebook_where_there_are_words_enough_for_it():
    codes = torch.arange(6).repeat(5)[:, None]
    assert describe_codes([codes], seconds=1.0, codebook_size=8)["usage"] == [6 / 8]
    assert describe_codes([codes[:4]], seconds=1.0, codebook_size=8)["usage"] == [1.0]


def test_the_papers_quantizer_has_36_bits_a_word():
    found = describe_codes([torch.zeros(10, 4, dtype=torch.int64)], seconds=2.4, codebook_size=512)
    assert found["bits_per_word"] == 36 and found["bits_per_second"] == pytest.approx(150)


def test_a_collapsed_level_is_named_with_its_usage():
    generator = torch.Generator().manual_seed(0)
    alive = torch.randint(0, 64, (100, 1), generator=generator)
    found = describe_codes([torch.cat([alive, torch.full_like(alive, 7)], dim=1)], 30.0, 64)
    told = collapse_warning(found, 64)
    assert "level 2 uses 1 of 64 codes (perplexity 1.0)" in told and "level 1" not in told
    assert collapse_warning(describe_codes([alive], 30.0, 64), 64) is None


def test_few_words_are_no_collapse():
    found = describe_codes([torch.tensor([[5], [9], [11]])], 1.0, 512)
    assert collapse_warning(found, 512) is None
