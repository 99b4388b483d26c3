"""Windows of a text: each token counts once, with as much before it as the stride promises."""

from __future__ import annotations

import pytest

from passopt.predictions.windows import Window, cut_windows


def test_disjoint_windows_leave_out_their_first_tokens_and_the_rest_of_the_text():
    assert cut_windows(11, 4, 4) == [Window(0, 4, 3), Window(4, 8, 3)]
    assert cut_windows(3, 4, 4) == []


def test_what_begins_every_window_lets_its_first_token_count():
    assert cut_windows(8, 4, 4, known=1) == [Window(0, 4, 4), Window(4, 8, 4)]


@pytest.mark.parametrize("count", range(2, 30))
@pytest.mark.parametrize(("window", "stride"), [(8, 3), (8, 1), (5, 4)])
def test_overlapping_windows_count_each_token_once(count: int, window: int, stride: int):
    scored = []
    for part in cut_windows(count, window, stride):
        own = range(part.stop - part.scored, part.stop)
        assert part.stop - part.start <= window
        assert all(token - part.start >= min(window - stride, token) for token in own)
        scored += own
    assert scored == list(range(1, count))
