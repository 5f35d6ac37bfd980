"""
Word times for training: `python -m training.label_words` adds "words" to a manifest.

    --agree MODEL       from a VoxLM checkpoint and PocketSphinx, where the two aligners agree
    --teacher MODEL     from the cross-attention of a Whisper model, where its text agrees with the transcript
    --textgrid FOLDER   from FOLDER/ID.TextGrid, as the Montreal Forced Aligner writes them
    --ctm FILE          from a CTM file whose recordings are the manifest's ids
    --original FILE     from timestamps_manifest.json of the original VoxLM, by id

Exact times come with synthetic speech (`words` in the manifest that made it). Words are matched to the transcript by alignment
when they are used, so spelling and punctuation need not agree.
"""

import argparse
import json
import re
from pathlib import Path

import jiwer
from tqdm import tqdm
from transformers import pipeline

from voxlm_hf import VoxLMForSpeechSeq2Seq

from .aligners import agreed_words, sphinx_words
from .data import Report, manifest_rows
from .text import normalise


def read_ctm(path: Path) -> dict[str, list[dict]]:
    """Words of a CTM file (NIST: recording, channel, start, duration, word) by recording, times in seconds."""
    words: dict[str, list[dict]] = {}
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        fields = line.split()
        if len(fields) < 5:
            raise ValueError(f"{path}:{number}: a CTM line has at least 5 fields, this one {len(fields)}: {line!r}")
        start, duration = float(fields[2]), float(fields[3])
        words.setdefault(fields[0], []).append({"word": fields[4], "start": start, "end": round(start + duration, 6)})
    return words


def read_textgrid(path: Path, tier: str = "words") -> list[dict]:
    """
    Words of an interval tier of a Praat TextGrid (long format, as the Montreal Forced Aligner writes), times in seconds.

    Raises:
        ValueError: when there is no such tier; those there are, are named.
    """
    text = Path(path).read_text()
    tiers = re.split(r"item \[\d+\]:", text)[1:]
    names = [match[1] if (match := re.search(r'name = "(.*?)"', part)) else "" for part in tiers]
    if tier not in names:
        raise ValueError(f"{path} has no tier {tier!r}; its tiers are {', '.join(map(repr, names)) or 'none'}")
    interval = re.compile(r'xmin = ([\d.]+)\s+xmax = ([\d.]+)\s+text = "((?:[^"]|"")*)"')
    return [
        {"word": word.replace('""', '"').strip(), "start": float(start), "end": float(end)}
        for start, end, word in interval.findall(tiers[names.index(tier)])
        if word.strip() and not re.fullmatch(r"<.*>|sil|sp|spn", word.strip())
    ]


def read_original(path: Path) -> dict[str, list[dict]]:
    """
    Words of the original VoxLM's `timestamps_manifest.json` (a list of {"id", "timestamps": [{"word", "start", "end"}]}).

    It writes 0.0 for what its aligner did not know; words without a length are left out.
    """
    return {
        str(item["id"]): [
            {key: word[key] for key in ("word", "start", "end")}
            for word in item["timestamps"]
            if word["end"] > word["start"]
        ]
        for item in json.loads(Path(path).read_text())
    }


def teacher_words(teacher, audio, text: str, max_wer: float = 0.1) -> list[dict] | None:
    """
    Word times from a Whisper model's cross-attention, or `None` where it heard something else.

    Args:
        teacher: a stock `automatic-speech-recognition` pipeline over a Whisper model.
        audio: what the pipeline takes; text: the transcript; max_wer: most word errors of the teacher's text against it.
    """
    output = teacher(audio, return_timestamps="word")
    words = [
        {"word": chunk["text"].strip(), "start": chunk["timestamp"][0], "end": chunk["timestamp"][1]}
        for chunk in output["chunks"]
        if None not in chunk["timestamp"]
    ]
    reference, heard = normalise(text), normalise(output["text"])
    if not reference or jiwer.wer(reference, heard) > max_wer:
        return None
    return words


def agreeing_words(model, audio: str, text: str) -> list[dict] | None:
    """
    Words of a recording on whose start and end the model's alignment head and PocketSphinx agree; those on which they do not have
    no time, and train nothing.

    Returns:
        `{"word", "start", "end"}` in seconds, or `None` where they agree on none.
    """
    waveform = model.get_processor().load_audio(audio)
    theirs = sphinx_words(waveform, text)
    if theirs is None:
        return None
    return agreed_words(model.align(waveform, normalise(text)).words, theirs) or None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "output", type=Path, help="the manifest with words; put it beside the other, paths stay as they are"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--agree", help="folder or Hub id of a VoxLM checkpoint")
    source.add_argument("--teacher", help="folder or Hub id of a Whisper model")
    source.add_argument("--textgrid", type=Path)
    source.add_argument("--ctm", type=Path)
    source.add_argument("--original", type=Path)
    parser.add_argument("--max-wer", type=float, default=0.1, help="of the teacher's text against the transcript")
    arguments = parser.parse_args()
    if arguments.agree:
        model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.agree)
    elif arguments.teacher:
        teacher = pipeline("automatic-speech-recognition", model=arguments.teacher)
    elif not arguments.textgrid:
        known = read_ctm(arguments.ctm) if arguments.ctm else read_original(arguments.original)
    report = Report()
    with arguments.output.open("w") as file:
        for row in tqdm(list(manifest_rows(arguments.manifest, report)), unit="recording"):
            if arguments.agree:
                words = agreeing_words(model, row["audio"], row["text"])
            elif arguments.teacher:
                words = teacher_words(teacher, row["audio"], row["text"], arguments.max_wer)
            elif arguments.textgrid:
                grid = arguments.textgrid / f"{row['id']}.TextGrid"
                words = read_textgrid(grid) if grid.exists() else None
            else:
                words = known.get(str(row["id"]))
            if words is None:
                report.leave_out("no word times (the row is kept without)", str(row["id"]))
            else:
                row["words"] = words
            row["audio"] = str(Path(row["audio"]).relative_to(arguments.manifest.parent))
            file.write(json.dumps(row) + "\n")
            report.kept += 1
    print(report)


if __name__ == "__main__":
    main()
