"""
Add word times to a manifest for training: `python -m voxlm_training.label_words MANIFEST OUTPUT --SOURCE ...`.

    --agree MODEL       times on which a VoxLM checkpoint and PocketSphinx agree
    --teacher MODEL     from the cross-attention of a Whisper model, where its text agrees with the transcript
    --textgrid FOLDER   from FOLDER/ID.TextGrid, for example those of the Montreal Forced Aligner
    --ctm FILE          from a CTM file that names recordings by the manifest's ids
    --original FILE     from the original VoxLM's timestamps_manifest.json, by id

Manifests of synthetic speech already have exact times in "words". Training matches the words to the transcript by
alignment, so spelling and punctuation may differ. An interrupted run resumes and skips the recordings in OUTPUT.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

import jiwer
from praatio import textgrid
from praatio.utilities.errors import PraatioException
from tqdm import tqdm
from transformers import pipeline

from voxlm_hf import VoxLMForSpeechSeq2Seq

from .aligners import agreed_words, own_words, sphinx_words, tightened
from .data import Report, sliced_rows
from .manifests import finished_rows, write_row
from .text import normalise


# What the Montreal Forced Aligner and Kaldi's recipes write where no word is: silence, short pause, spoken noise,
# <eps>, <unk>.
NOT_A_WORD = re.compile(r"<.*>|sil|sp|spn")


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
    Words of an interval tier of a Praat TextGrid (long or short format, UTF-8 or UTF-16), times in seconds.

    Empty intervals and the Montreal Forced Aligner's marks of silence and noise are left out.

    Raises:
        ValueError: when the file is not a valid TextGrid, or has no such tier; the message names those it has.
    """
    try:
        grid = textgrid.openTextgrid(str(path), includeEmptyIntervals=False, duplicateNamesMode="rename")
    except (PraatioException, IndexError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a valid TextGrid: {error}") from error
    if tier not in grid.tierNames:
        names = ", ".join(map(repr, grid.tierNames)) or "none"
        raise ValueError(f"{path} has no tier {tier!r}; its tiers are {names}")
    if not isinstance(grid.getTier(tier), textgrid.IntervalTier):
        raise ValueError(f"{path}: the tier {tier!r} has points, not intervals")
    return [
        {"word": interval.label, "start": interval.start, "end": interval.end}
        for interval in grid.getTier(tier).entries
        if not NOT_A_WORD.fullmatch(interval.label)
    ]


def read_original(path: Path) -> dict[str, list[dict]]:
    """
    Words in the original VoxLM's `timestamps_manifest.json` (a list of {"id", "timestamps": [{"word", "start",
    "end"}]}), by id.

    The original gives words that its aligner did not know the times 0.0; words without a duration are left out.
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
    Word times from a Whisper model's cross-attention, or `None` where its text differs too much from the transcript.

    Args:
        teacher: transformers' `automatic-speech-recognition` pipeline with a Whisper model.
        audio: anything that the pipeline takes; text: the transcript; max_wer: largest word error rate of the teacher's
            text; the default was chosen by hand, not tuned.
    """
    output = teacher(audio, return_timestamps="word")
    words = [
        {"word": chunk["text"].strip(), "start": chunk["timestamp"][0], "end": chunk["timestamp"][1]}
        for chunk in output["chunks"]
        if None not in chunk["timestamp"]
    ]
    reference, hypothesis = normalise(text), normalise(output["text"])
    if not reference or jiwer.wer(reference, hypothesis) > max_wer:
        return None
    return words


def agreeing_words(model, audio: str, text: str) -> list[dict] | None:
    """
    Words of a recording on whose start and end the model's alignment head and PocketSphinx agree. Training ignores the
    other words, which have no times.

    Returns:
        `{"word", "start", "end"}` in seconds, or `None` where the two agree on no word.
    """
    waveform = model.get_processor().load_audio(audio)
    theirs = sphinx_words(waveform, text)
    if theirs is None:
        return None
    return agreed_words(own_words(model, waveform, normalise(text)), tightened(theirs)) or None


def make_source(arguments: argparse.Namespace) -> Callable[[dict], list[dict] | None]:
    """
    A function from a row of the manifest to its words with times, or to `None`, from the source that the command line
    names.
    """
    if arguments.agree:
        model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.agree)
        return lambda row: agreeing_words(model, row["audio"], row["text"])
    if arguments.teacher:
        teacher = pipeline("automatic-speech-recognition", model=arguments.teacher)
        return lambda row: teacher_words(teacher, row["audio"], row["text"], arguments.max_wer)
    if arguments.textgrid:
        return lambda row: _grid_words(arguments.textgrid / f"{row['id']}.TextGrid")
    known = read_ctm(arguments.ctm) if arguments.ctm else read_original(arguments.original)
    return lambda row: known.get(str(row["id"]))


def _grid_words(path: Path) -> list[dict] | None:
    return read_textgrid(path) if path.exists() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("output", type=Path, help="the manifest with words; its paths are relative to its own folder")
    parser.add_argument("--every", type=int, default=1, help="label only every N-th recording")
    parser.add_argument("--exclude-speakers", nargs="+", default=[], help="leave out these speakers")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--agree", help="folder or Hub id of a VoxLM checkpoint")
    source.add_argument("--teacher", help="folder or Hub id of a Whisper model")
    source.add_argument("--textgrid", type=Path)
    source.add_argument("--ctm", type=Path)
    source.add_argument("--original", type=Path)
    parser.add_argument(
        "--max-wer",
        type=float,
        default=0.1,
        help="skip recordings where the teacher's text has a higher word error rate",
    )
    arguments = parser.parse_args()
    words_of, done, report = make_source(arguments), finished_rows(arguments.output), Report()
    chosen = {"every": arguments.every, "exclude_speakers": arguments.exclude_speakers}
    rows = [row for _, row in sliced_rows({"manifest": arguments.manifest, **chosen}, report)]
    rows = [row for row in rows if str(row["id"]) not in done]
    with arguments.output.open("a") as file:
        for row in tqdm(rows, unit="recording"):
            words = words_of(row)
            if words is None:
                report.leave_out("no word times (row kept without them)", row["where"])
            else:
                row["words"] = words
            write_row(file, row, arguments.output.parent)
            report.kept += 1
    print(report)


if __name__ == "__main__":
    main()
