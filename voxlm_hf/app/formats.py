"""
Writers: one transcription to txt, json, srt, vtt or tsv.

The subtitle writers are ours: pysubs2 1.8 reads backslashes as tags, stops at 99:59:59 and does not escape WebVTT, and working
around that took more code than these writers are.
"""

import json


# Subtitle guidelines of broadcasters (BBC, Netflix): two lines of 42 characters, at most 7 seconds. A pause that ends a cue
# was chosen by hand.
LINE_CHARACTERS, CUE_LINES, CUE_SECONDS, PAUSE_SECONDS = 42, 2, 7.0, 1.5


def timestamp(seconds: float, separator: str) -> str:
    """`HH:MM:SS,mmm` (hours grow beyond two digits when they must), with the given decimal separator."""
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    whole, fraction = divmod(rest, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{separator}{fraction:03d}"


def wrap(words: list[str], width: int = LINE_CHARACTERS) -> list[str]:
    """Words joined to lines of at most `width` characters; a longer word has a line of its own."""
    lines: list[str] = []
    for word in words:
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += " " + word
        else:
            lines.append(word)
    return lines


def cues(words: list[dict]) -> list[tuple[float, float, list[str]]]:
    """
    Group timed words into subtitle cues `(start, end, lines)`.

    A cue ends at a sentence mark, before a pause, or when the next word would exceed its lines or its seconds.
    """
    groups: list[list[dict]] = []
    for word in words:
        if groups and _fits(groups[-1], word):
            groups[-1].append(word)
        else:
            groups.append([word])
    return [(group[0]["start"], group[-1]["end"], wrap([word["word"] for word in group])) for group in groups]


def _fits(group: list[dict], word: dict) -> bool:
    texts = [item["word"] for item in [*group, word]]
    return (
        not group[-1]["word"].endswith((".", "?", "!", "。", "？", "！"))
        and word["start"] - group[-1]["end"] < PAUSE_SECONDS
        and word["end"] - group[0]["start"] <= CUE_SECONDS
        and len(wrap(texts)) <= CUE_LINES
    )


def _cue_text(line: str) -> str:
    """A line without what a subtitle parser could read as structure: arrows and line breaks."""
    return " ".join(line.replace("-->", "→").split())


# SubRip has no escapes: players would take <i> and {\an8} for markup and not show them.
_NO_MARKUP = str.maketrans("<>{}", "‹›()")


def to_txt(result: dict) -> str:
    """The text alone, one line."""
    return result["text"] + "\n"


def to_json(result: dict) -> str:
    """Everything the result holds, as JSON."""
    return json.dumps(dict(result), ensure_ascii=False, indent=2) + "\n"


def to_srt(result: dict) -> str:
    """SubRip: numbered cues, comma before the milliseconds, other brackets for those of markup."""
    blocks = []
    for number, (start, end, lines) in enumerate(cues(result["words"]), 1):
        text = "\n".join(_cue_text(line).translate(_NO_MARKUP) for line in lines)
        blocks.append(f"{number}\n{timestamp(start, ',')} --> {timestamp(end, ',')}\n{text}\n")
    return "\n".join(blocks)


def to_vtt(result: dict) -> str:
    """WebVTT: a header, a point before the milliseconds, and `&`, `<`, `>` escaped."""
    blocks = ["WEBVTT\n"]
    for start, end, lines in cues(result["words"]):
        escaped = [_cue_text(line).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in lines]
        blocks.append(f"{timestamp(start, '.')} --> {timestamp(end, '.')}\n" + "\n".join(escaped) + "\n")
    return "\n".join(blocks)


def to_tsv(result: dict) -> str:
    """One word a line: start and end in milliseconds, word, confidence; tabs and line breaks in words become spaces."""
    rows = ["start\tend\tword\tconfidence"]
    for word in result["words"]:
        text = " ".join(word["word"].split())
        rows.append(f"{round(word['start'] * 1000)}\t{round(word['end'] * 1000)}\t{text}\t{word['confidence']}")
    return "\n".join(rows) + "\n"


def encode(text: str) -> bytes:
    """
    An output as UTF-8. A byte of a file name that is no text becomes an escape, \\udcff for the byte ff, which in JSON stands for
    the very character that Python has for the byte.
    """
    return text.encode("utf-8", errors="backslashreplace")


WRITERS = {"txt": to_txt, "json": to_json, "srt": to_srt, "vtt": to_vtt, "tsv": to_tsv}
