from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flora.serve.frontend.stop import Passed, StopStrings


def test_text_before_a_stop_string_goes_out_and_the_stop_string_does_not():
    stops = StopStrings(("END",))

    assert stops.push("one END two") == Passed("one ", stopped_by="END")


def test_a_stop_string_is_found_across_pieces():
    stops = StopStrings(("STOP",))

    assert stops.push("go ST") == Passed("go ")
    assert stops.push("OP now") == Passed("", stopped_by="STOP")


def test_what_looked_like_a_stop_string_goes_out_when_it_is_none():
    stops = StopStrings(("STOP",))

    assert stops.push("go ST") == Passed("go ")
    assert stops.push("ART") == Passed("START")


def test_what_was_held_back_goes_out_at_the_end():
    stops = StopStrings(("\n\n",))

    assert stops.push("last line\n") == Passed("last line")
    assert stops.flush() == "\n"
    assert stops.flush() == ""


@given(
    text=st.text(alphabet="ab", max_size=30),
    strings=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_the_result_does_not_depend_on_how_the_text_is_cut(text: str, strings: list[str], cuts: list[int]):
    ends = [text.find(string) + len(string) for string in strings if string in text]
    whole = StopStrings(tuple(strings)).push(text)

    stops = StopStrings(tuple(strings))
    sent, stopped_by = "", None
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    for start, end in pairwise(borders):
        passed = stops.push(text[start:end])
        sent += passed.text
        if stopped_by := passed.stopped_by:
            break

    assert stopped_by == whole.stopped_by
    if stopped_by is None:
        assert not ends
        assert sent + stops.flush() == text
    else:
        assert sent == whole.text
        assert len(sent) + len(stopped_by) == min(ends)
