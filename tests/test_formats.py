"""Writers against hand-written expectations."""

import html
import json

import pysubs2
import pytest

from voxlm_hf.app.formats import WRITERS, cues, timestamp


def word(text, start, end):
    return {"word": text, "start": start, "end": end, "confidence": 0.5}


RESULT = {
    "text": "Hello <b>world</b> & all.\tBye",
    "words": [
        word("Hello", 0.0, 0.4),
        word("<b>world</b>", 0.5, 1.0),
        word("&", 1.0, 1.1),
        word("all.", 1.1, 1.5),
        word("Bye", 3661.25, 3662.0),
    ],
    "duration": 3663.0,
    "truncated": False,
}


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (0, "00:00:00,000"),
        (59.9995, "00:01:00,000"),
        (3661.25, "01:01:01,250"),
        (360000.001, "100:00:00,001"),
    ],
)
def test_timestamps(seconds, expected):
    assert timestamp(seconds, ",") == expected


def test_srt():
    assert WRITERS["srt"](RESULT) == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello ‹b›world‹/b› & all.\n\n2\n01:01:01,250 --> 01:01:02,000\nBye\n"
    )


def test_vtt_escapes_markup():
    assert WRITERS["vtt"](RESULT) == (
        "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello &lt;b&gt;world&lt;/b&gt; &amp; all.\n\n"
        "01:01:01.250 --> 01:01:02.000\nBye\n"
    )


def test_tsv_json_txt():
    assert WRITERS["tsv"](RESULT).splitlines()[-1] == "3661250\t3662000\tBye\t0.5"
    assert json.loads(WRITERS["json"](RESULT)) == RESULT
    assert WRITERS["txt"](RESULT) == RESULT["text"] + "\n"
    assert WRITERS["tsv"]({"words": [word("a\tb\nc", 0, 1)]}).splitlines()[1] == "0\t1000\ta b c\t0.5"


def test_an_arrow_in_the_text_cannot_fake_a_cue():
    result = {"words": [word("00:00-->", 0, 1), word("x\n\n2", 1, 2)]}
    for name in ("srt", "vtt"):
        body = WRITERS[name](result)
        assert body.count("-->") == 1 and "\n\n2\n" not in body


@pytest.mark.parametrize(
    "text",
    [
        r"C:\new\Notes\here",
        r"{\an8}top {\p1}m 0 0{\p0} {\i1}it{\i0}",
        "{braces} {{twice}}",
        "<i>tags</i> &amp; &lt;",
        "ends with \\",
        "# ; [Script Info] NOTE STYLE",
    ],
)
def test_subtitles_hold_no_markup(text):
    """SubRip gets other brackets, WebVTT its escapes; all else stays as it was said."""
    result = {"words": [word(text, 0, 1)]}
    number, times, written = WRITERS["srt"](result).splitlines()
    assert (number, times) == ("1", "00:00:00,000 --> 00:00:01,000")
    assert not set(written) & set("<>{}") and len(written) == len(text)
    assert [left == right or left in "<>{}" for left, right in zip(text, written)] == [True] * len(text)
    header, empty, times, written = WRITERS["vtt"](result).splitlines()
    assert (header, empty, times) == ("WEBVTT", "", "00:00:00.000 --> 00:00:01.000")
    assert html.unescape(written) == text and not set(written) & {"<", ">"}


@pytest.mark.parametrize(
    "text", ["-\0->", "-\r\n->", "--->", "<-->", "\u2028-->\x85", "--\0>\n\n7\n00:00:01,000 --> x"]
)
def test_no_arrow_or_line_break_gets_into_a_cue(text):
    for name in ("srt", "vtt"):
        times, *body = WRITERS[name]({"words": [word(text, 0, 1)]}).split("00:00:01")[1:2]
        assert not body and "-->" not in times and len(times.strip(".,0\n").splitlines()) == 1


def test_another_parser_reads_the_cues_back():
    """Every word, in order and at its time, by pysubs2's reader."""
    words = [word(f"w{number}", 4000.0 * number, 4000.0 * number + 0.5) for number in range(20)]
    for name in ("srt", "vtt"):
        events = pysubs2.SSAFile.from_string(WRITERS[name]({"words": words}), name)
        assert [event.text for event in events] == [item["word"] for item in words]
        assert [(event.start, event.end) for event in events] == [
            (round(1000 * item["start"]), round(1000 * item["end"])) for item in words
        ]


def test_times_beyond_a_hundred_hours():
    result = {"words": [word("late", 360000.001, 360001)]}
    assert "100:00:00,001 --> 100:00:01,000" in WRITERS["srt"](result)
    assert "100:00:00.001 --> 100:00:01.000" in WRITERS["vtt"](result)


def test_cues_keep_to_lines_and_seconds():
    words = [word(f"word{number:02d}", number * 0.3, number * 0.3 + 0.25) for number in range(60)]
    for start, end, lines in cues(words):
        assert len(lines) <= 2 and all(len(line) <= 42 for line in lines) and end - start <= 7
    assert [text for _, _, lines in cues(words) for line in lines for text in line.split()] == [
        item["word"] for item in words
    ]
    assert cues([word("w" * 100, 0, 1)])[0][2] == ["w" * 100]


def test_nothing_said():
    empty = {"text": "", "words": [], "duration": 1.0, "truncated": False}
    assert WRITERS["srt"](empty) == "" and WRITERS["vtt"](empty) == "WEBVTT\n"
    assert WRITERS["tsv"](empty) == "start\tend\tword\tconfidence\n" and WRITERS["txt"](empty) == "\n"
