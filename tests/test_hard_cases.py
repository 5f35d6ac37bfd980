"""Recordings made harder, and what is counted in them."""

import numpy as np
import pytest

from voxlm_training.augment import Augmentation
from voxlm_training.data import Row
from voxlm_training.hard_cases import AUGMENTED, IN_A_ROW, Robustness, compare, hard_cases, markdown
from voxlm_training.timing import known_times, word_errors


RATE = 16000


def clicks(*seconds, length=2.0):
    """Silence with a click at each moment, so that the samples show where a word is."""
    waveform = np.zeros(int(length * RATE), dtype=np.float32)
    waveform[[round(second * RATE) for second in seconds]] = 0.5
    return waveform


def row(name, text, *starts):
    words = [{"word": word, "start": s, "end": s + 0.3} for word, s in zip(text.split(), starts)]
    return Row(name, clicks(*starts), text, duration=2.0, words=words)


ROWS = [row("a", "the quick fox", 0.2, 0.5, 1.0), row("b", "no no", 0.3, 0.9), row("c", "yes", 1.1)]


def test_word_times_move_with_the_audio_in_every_case():
    cases = hard_cases(ROWS, lambda audio: audio)
    assert [case.name for case in cases] == [*AUGMENTED, f"{IN_A_ROW} utterances in a row"]
    for case in cases:
        for harder in case.rows:
            audible = np.flatnonzero(np.abs(harder.audio) > 0.3) / RATE
            starts = [start for _, (start, _) in sorted(known_times(harder).items())]
            assert starts == pytest.approx(audible, abs=0.002), case.name
            assert harder.duration == pytest.approx(len(harder.audio) / RATE)
    assert cases[1].rows[0].duration == pytest.approx(7.0)
    assert cases[2].rows[0].duration > 2.5 and cases[2].rows[2].duration == 2.0
    (together,) = cases[-1].rows
    assert together.text == "the quick fox no no yes" and cases[-1].origins == [[(0, 0), (1, 3), (2, 5)]]
    again = hard_cases(ROWS, lambda audio: audio)
    assert all(np.array_equal(one.rows[0].audio, two.rows[0].audio) for one, two in zip(cases, again))


def test_single_words_with_times_move_too():
    anchors = [{"word": "fox", "start": 1.0, "end": 1.3, "index": 2}]
    one = Row("a", clicks(1.0), "the quick fox", duration=2.0, anchors=anchors)
    for case in hard_cases([one] * 3, lambda audio: audio):
        for harder in case.rows:
            audible = np.flatnonzero(np.abs(harder.audio) > 0.3) / RATE
            assert [start for start, _ in known_times(harder).values()] == pytest.approx(audible, abs=0.002), case.name


def test_an_end_stays_before_a_pause_and_a_start_behind_it():
    pause = Augmentation(pauses=((0.8, 1.0),), lead_s=0.5)
    words = [{"word": "quick", "start": 0.5, "end": 0.8}, {"word": "fox", "start": 0.8, "end": 1.0}]
    assert [(word["start"], word["end"]) for word in pause.move_words(words)] == [(1.0, 1.3), (2.3, 2.5)]


def test_right_moved_and_lost_words_are_counted_by_hand():
    case = hard_cases(ROWS, lambda audio: audio)[-1]
    plain = [word_errors(item, item.words) for item in ROWS]
    plain[1][0] = (0.5, 0.0)  # was wrong before: does not count
    hypothesis = [dict(word) for word in case.rows[0].words]
    del hypothesis[1]  # quick
    hypothesis[0]["start"] -= 0.21  # the
    hypothesis[-1]["end"] += 0.19  # yes
    right, moved, lost = compare(plain, case.rows, [hypothesis], case)
    assert (right, moved, lost) == (5, 1, 1)
    scores = Robustness("m", "d", "transcribed", case.name, right, moved, lost)
    assert scores.kept == pytest.approx(0.75) and "| 5 | 1 | 75.0 % | 1 |" in markdown([scores])
