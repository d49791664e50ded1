"""Texts are shown whole, and without power over what stands around them."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from reward_service.labeling.shown import BLOCK_CHARS, blocks_of, visible

LIVELY = st.text(alphabet=st.one_of(st.sampled_from("`~\n\r\t \0ab\u202e\u2066"), st.characters()), max_size=200)


@given(LIVELY)
def test_blocks_are_the_whole_text(text: str) -> None:
    blocks = blocks_of(text)
    assert "".join(block.text for block in blocks) == visible(text)
    assert all(block.text for block in blocks)


@given(LIVELY)
def test_nothing_that_is_shown_can_hide_or_turn_text_around(text: str) -> None:
    shown = visible(text)
    assert not {char for char in shown if unicodedata.category(char) in ("Cc", "Cs")} - {"\n", "\t"}
    assert not {char for char in shown if unicodedata.bidirectional(char) in ("LRE", "RLE", "LRO", "RLO", "PDF")}
    assert not {char for char in shown if unicodedata.bidirectional(char) in ("LRI", "RLI", "FSI", "PDI")}
    shown.encode()


def test_fenced_code_is_told_from_prose() -> None:
    found = [(block.text, block.code) for block in blocks_of("a\n```py\nx = 1\n```\nb\n~~~\nopen")]
    assert found == [("a\n", False), ("```py\nx = 1\n```\n", True), ("b\n", False), ("~~~\nopen", True)]


def test_long_texts_come_in_pieces_cut_where_it_shows_least() -> None:
    lines = "a line of text\n" * 2000
    assert all(block.text.endswith("\n") for block in blocks_of(lines))
    words = "word " * 5000
    assert all(block.text.endswith(" ") for block in blocks_of(words))
    assert [len(block.text) for block in blocks_of("x" * (2 * BLOCK_CHARS + 1))] == [BLOCK_CHARS, BLOCK_CHARS, 1]
    assert blocks_of("") == ()
