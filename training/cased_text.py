"""
Give the transcripts of a manifest capitals, punctuation and figures: `python -m voxlm_training.cased_text MANIFEST
OUTPUT --model MODEL`.

Many corpora have upper-case transcripts without punctuation, but a language model knows cased text. The reader of a
VoxLM checkpoint transcribes each recording, and words on which both agree are written as the reader writes them. What
was said is always what the transcript says: the other words stay lower-case, and take only a capital and the
punctuation of the word that the reader has in their place. An interrupted run resumes and skips finished recordings.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

import jiwer
import torch
from tqdm import tqdm

from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import write_atomically
from voxlm_hf.decoding_voxlm import padded_batches

from .data import READ_ERRORS, Report, manifest_rows
from .manifests import finished_rows, write_row
from .text import normalise, whisper_normaliser


# Audio that is transcribed at once, and its order: so many recordings are sorted by length together. Chosen by hand.
SECONDS_PER_BATCH, POOL = 120.0, 256
# Most tokens in a second of speech, chosen by hand so that only loops have more.
TOKENS_PER_S = 10.0
ENDING = re.compile(r"[.,;:?!]+$")


@dataclass
class Spelling:
    """
    A word as the reader writes it, and what it says.

    Args:
        surface (`str`): with capitals and punctuation.
        words (`list[str]`): normalised; several for "well-known", none for a dash.
    """

    surface: str
    words: list[str]


def spellings(text: str) -> list[Spelling]:
    """The words of a cased text; figures, which `normalise` drops, stand for themselves."""
    found = []
    for surface in text.split():
        has_figures = any(char.isdigit() for char in surface)
        found.append(Spelling(surface, [surface.lower()] if has_figures else normalise(surface).split()))
    return found


def restore_case(transcript: str, reading: str) -> tuple[str, float]:
    """
    A transcript as `reading` writes it, where both agree.

    Args:
        transcript (`str`): what was said, in any case. reading (`str`): a cased text of the same recording.

    Returns:
        the cased text, and the share of the transcript's words on which both agree.
    """
    spoken, written = normalise(transcript).split(), spellings(reading)
    plain = _plain_case(spoken)
    owners = [number for number, spelling in enumerate(written) for _ in spelling.words]
    heard = [word for spelling in written for word in spelling.words]
    if not spoken or not heard:
        return _begin_sentence(plain), 0.0
    chunks = jiwer.process_words(" ".join(spoken), " ".join(heard)).alignments[0]
    pairs = {}  # the transcript's word -> the reader's, where they are equal
    for chunk in chunks:
        if chunk.type == "equal":
            pairs.update(
                zip(range(chunk.ref_start_idx, chunk.ref_end_idx), range(chunk.hyp_start_idx, chunk.hyp_end_idx))
            )
    _keep_whole_spellings(pairs, owners)
    words, agreed, place, heard_place = [], len(pairs), 0, 0
    while place < len(spoken):
        if place in pairs:
            owner = owners[pairs[place]]
            words.append(written[owner].surface)
            while place in pairs and owners[pairs[place]] == owner:
                heard_place, place = pairs[place] + 1, place + 1
            continue
        end = next((index for index in range(place, len(spoken)) if index in pairs), len(spoken))
        heard_end = pairs.get(end, len(heard))
        block = sorted({owners[index] for index in range(heard_place, heard_end)})
        rewritten, same = _rewrite(plain[place:end], [written[owner].surface for owner in block])
        words += rewritten
        agreed += same * (end - place)
        place, heard_place = end, heard_end
    return _begin_sentence(words), agreed / len(spoken)


def _keep_whole_spellings(pairs: dict[int, int], owners: list[int]):
    """Remove pairs of a spelling that stands for several words, where the transcript does not have all of them in a row."""
    by_owner: dict[int, list[int]] = {}
    for place, heard in pairs.items():
        by_owner.setdefault(owners[heard], []).append(place)
    for owner, places in by_owner.items():
        if len(places) < owners.count(owner) or max(places) - min(places) + 1 > len(places):
            for place in places:
                del pairs[place]


def _rewrite(words: list[str], surfaces: list[str]) -> tuple[list[str], bool]:
    """
    Words on which transcript and reader differ, and whether they say the same after all, as "twenty five" and "25" do.
    """
    has_figures = any(char.isdigit() for surface in surfaces for char in surface)
    said, written = (whisper_normaliser()(" ".join(part)) for part in (words, surfaces))
    if has_figures and said == written:
        return surfaces, True
    words = list(words)
    if len(surfaces) == len(words):
        return [_dress(word, surface) for word, surface in zip(words, surfaces)], False
    if surfaces and words:
        words[-1] += _ending(surfaces[-1])
    return words, False


def _dress(word: str, surface: str) -> str:
    """A word with the capital and the closing punctuation of another."""
    return (word[:1].upper() + word[1:] if surface[:1].isupper() else word) + _ending(surface)


def _ending(surface: str) -> str:
    found = ENDING.search(surface)
    return found.group() if found else ""


def _plain_case(words: list[str]) -> list[str]:
    """Lower-case words with capitals only for "I" and for words spelt letter by letter."""
    letters = [len(word) == 1 for word in words]
    spelt = [one and (before or after) for before, one, after in zip([False, *letters], letters, [*letters[1:], False])]
    return [
        word[0].upper() + word[1:] if capital or word == "i" or word.startswith("i'") else word
        for word, capital in zip(words, spelt)
    ]


def _begin_sentence(words: list[str]) -> str:
    text = " ".join(words)
    return text[:1].upper() + text[1:]


@torch.no_grad()
def reader_texts(model, audio: list) -> list[str]:
    """
    The reader's own greedy texts of some recordings.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader.
        audio (`list`): of any kind `audio_voxlm.read_audio` takes, none longer than the model's window.
    """
    processor = model.get_processor()
    waveforms = [processor.load_audio(item) for item in audio]
    encoded = model.encode_audio(**processor.extract_features(waveforms))
    budgets = [int(TOKENS_PER_S * (1 + len(waveform) / processor.sampling_rate)) for waveform in waveforms]
    n_best = model.reader(encoded.last_hidden_state, encoded.frame_mask, budgets)
    groups = [model.reader.to_llm_tokens(hypotheses[0].ids) for hypotheses in n_best]
    return [processor.decode_text([token for group in row for token in group]).strip() for row in groups]


def readings(model, rows: list[dict], report: Report) -> list[tuple[dict, str]]:
    """Rows with the reader's texts; one that cannot be read, or is longer than the window, is left out by itself."""
    try:
        return list(zip(rows, reader_texts(model, [row["audio"] for row in rows])))
    except READ_ERRORS as error:
        if len(rows) > 1:
            return [pair for row in rows for pair in readings(model, [row], report)]
        report.leave_out("unreadable audio", f"{rows[0]['where']}: {error}")
        return []


def is_cased(text: str) -> bool:
    """Whether a text has both capitals and small letters."""
    return text not in (text.lower(), text.upper())


def cased_rows(model, rows: list[dict], report: Report):
    """
    Rows of a manifest with cased text, the old one as "spoken", and "agreement", the share of words on which transcript and
    reader agree. Texts that are cased already stay as they are.
    """
    for row in rows:
        if is_cased(row["text"]):
            report.kept += 1
            yield row
    rows = [row for row in rows if not is_cased(row["text"])]
    longest_s = model.get_processor().audio_window_s
    for first in tqdm(range(0, len(rows), POOL), unit=f"{POOL} recordings"):
        pool = sorted(rows[first : first + POOL], key=lambda row: row.get("duration") or longest_s)
        for batch in padded_batches(pool, lambda row: row.get("duration") or longest_s, SECONDS_PER_BATCH):
            for row, reading in readings(model, batch, report):
                text, agreement = restore_case(row["text"], reading)
                report.kept += 1
                yield {**row, "text": text, "spoken": row["text"], "agreement": round(agreement, 3)}


def write_cased(model, manifest: Path, output: Path) -> Report:
    """
    Write a manifest with cased text, in the order of the old one; finished rows are kept in `OUTPUT.unfinished` meanwhile.
    """
    report, unfinished = Report(), output.with_name(output.name + ".unfinished")
    rows, done = list(manifest_rows(manifest, report)), finished_rows(unfinished)
    with unfinished.open("a") as file:
        for row in cased_rows(model, [row for row in rows if str(row["id"]) not in done], report):
            write_row(file, row, output.parent)
    done = finished_rows(unfinished)
    lines = [json.dumps(done[str(row["id"])], ensure_ascii=False) for row in rows if str(row["id"]) in done]
    write_atomically(output, ("\n".join(lines) + "\n").encode())
    unfinished.unlink()
    return report


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument(
        "output", type=Path, help="the cased manifest; paths of recordings in it are relative to its own folder"
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a VoxLM checkpoint with a reader")
    arguments = parser.parse_args()
    model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
    if model.reader is None:
        parser.error(f"{arguments.model} has no reader; add one with `add_reader`")
    if torch.device("cpu") == model.device:
        model.quantize_dynamic()
    model.reader.num_beams = 1
    print(write_cased(model, arguments.manifest, arguments.output))


if __name__ == "__main__":
    main()
