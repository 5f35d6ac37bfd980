"""
Synthesise sentences with many free voices, one drawn at random for each sentence, into a folder of FLAC files with a
manifest.

    python -m voxlm_training.synthesise SENTENCES.txt OUT [--first N] [--count N] [--seed N] [--workers N]
                                        [--engines NAME ...]

Needs Debian's packages flite, festival with festvox-us-slt-hts, festvox-kallpc16k and festvox-kdlpc16k, espeak-ng and
libttspico-utils (non-free section; its own licence is Apache-2.0). The engines' own duration control varies the
speaking rate, resampling varies pitch and vocal-tract length together. Festival reports the time of each word; its rows
have "words" with exact times. An interrupted run resumes and skips finished sentences.
"""

import argparse
import json
import subprocess
import tempfile
import xml.sax.saxutils
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import soxr
from tqdm import tqdm

from voxlm_hf.audio_voxlm import to_waveform

from .manifests import finished_rows


RATE = 16000  # of Whisper
# The shares, the voices and all ranges below were chosen by hand, not tuned.
ESPEAK = [f"{accent}+{variant}" for accent in ("en-us", "en-gb") for variant in ("m1", "m3", "m7", "f1", "f2", "f4", "max", "anika", "steph3")]  # fmt: skip
# engine -> (share of the sentences, its voices)
VOICES = {
    "flite": (0.34, ["slt", "slt", "rms", "rms", "awb", "kal16"]),
    "pico": (0.34, ["en-US", "en-GB"]),
    "festival": (0.20, ["cmu_us_slt_arctic_hts", "kal_diphone", "ked_diphone"]),
    "espeak": (0.12, ESPEAK),
}

# Words a minute (-s) that espeak-ng speaks at the average rate. Chosen by hand, not tuned.
ESPEAK_RATE = 165
# Seconds after which an engine is taken to hang. Chosen by hand, not tuned.
HANGS_AFTER_S = 60

# Writes the speech to a file and prints one line for each word: the token of the text it belongs to, start and end in
# seconds.
FESTIVAL_SCRIPT = """
(voice_{voice})
(Parameter.set 'Duration_Stretch {stretch:.3f})
(set! utt (utt.synth (Utterance Text "{text}")))
(utt.save.wave utt "{wav}" 'riff)
(mapcar (lambda (word)
  (format t "%s\\t%s\\t%s\\n" (item.feat word "R:Token.parent.name")
    (item.feat word "R:SylStructure.daughter1.daughter1.R:Segment.segment_start")
    (item.feat word "R:SylStructure.daughtern.daughtern.R:Segment.segment_end")))
  (utt.relation.items utt 'Word))
"""


def command(engine: str, voice: str, text: str, stretch: float, wav: Path) -> tuple[list[str], str]:
    """The command that speaks `text` into `wav`, `stretch` times as slowly as by default, and its standard input."""
    if engine == "flite":
        return ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.3f}", "-t", text, "-o", str(wav)], ""
    if engine == "pico":
        speech = f'<speed level="{round(100 / stretch)}">{xml.sax.saxutils.escape(text)}</speed>'
        return ["pico2wave", "-l", voice, "-w", str(wav), speech], ""
    if engine == "festival":
        quoted = text.replace("\\", "").replace('"', "")
        return ["festival", "--pipe"], FESTIVAL_SCRIPT.format(voice=voice, stretch=stretch, text=quoted, wav=wav)
    return ["espeak-ng", "-v", voice, "-s", str(round(ESPEAK_RATE / stretch)), "-w", str(wav), "--stdin"], text


def festival_words(printed: str, stretch: float) -> list[dict]:
    """
    Words from the output of `FESTIVAL_SCRIPT`. A number that is spoken as several words becomes one word again, and an
    "'s", which festival treats as a word without sounds, becomes part of the word before it.

    Args:
        printed: lines of token, start and end in seconds, separated by tabs; stretch: factor to multiply the times by.
    """
    words: list[dict] = []
    for line in printed.splitlines():
        token, start, end = line.split("\t")
        start, end = round(float(start) * stretch, 4), round(float(end) * stretch, 4)
        if end <= start:
            continue
        if words and words[-1]["word"] == token and any(letter.isdigit() for letter in token):
            words[-1]["end"] = end
        else:
            words.append({"word": token, "start": start, "end": end})
    return words


def speak(text: str, rng: np.random.Generator, engines: list[str]) -> tuple[np.ndarray, str, list[dict] | None]:
    """
    Synthesise one sentence with a voice of one of the `engines`, at a rate and pitch drawn from `rng`.

    Returns:
        the waveform `(samples,)` at 16 kHz, its peak between 0.2 and 0.9, the voice as "engine/voice", and words with
        times where the engine reports them.

    Raises:
        subprocess.SubprocessError, ValueError: when the engine fails, hangs or writes no audio.
    """
    shares = np.array([VOICES[engine][0] for engine in engines])
    engine = rng.choice(engines, p=shares / shares.sum())
    voice = rng.choice(VOICES[engine][1])
    rate, pitch = rng.uniform(0.8, 1.2), rng.uniform(0.86, 1.2)
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        line, stdin = command(engine, voice, text, rate * pitch, wav)
        printed = subprocess.run(
            line, input=stdin, text=True, check=True, capture_output=True, timeout=HANGS_AFTER_S
        ).stdout
        samples, source_rate = soundfile.read(wav, dtype="float32", always_2d=True)
    # Resampled as if recorded at `pitch` times its rate, which raises the pitch and shortens the vocal tract.
    waveform = to_waveform(samples.T, source_rate, source_rate)
    waveform = soxr.resample(waveform, source_rate * pitch, RATE)
    waveform = rng.uniform(0.2, 0.9) * waveform / max(1e-6, float(np.abs(waveform).max()))
    return waveform, f"{engine}/{voice}", festival_words(printed, 1 / pitch) if engine == "festival" else None


def unfinished_sentences(path: Path, manifest: Path, seed: int, first: int, count: int | None) -> list[tuple[int, str]]:
    """
    Number and text of `count` lines of a file from `first` on (all without a count), without empty lines and those in
    the manifest.
    """
    done = finished_rows(manifest)
    last = None if count is None else first + count
    sentences = list(enumerate(line.strip() for line in path.open()))[first:last]
    return [(number, text) for number, text in sentences if text and sentence_id(seed, number) not in done]


def sentence_id(seed: int, number: int) -> str:
    return f"{seed}-{number:06d}"


def make_row(number: int, text: str, output: Path, seed: int, engines: list[str]) -> dict | None:
    """Synthesise one sentence into `output/audio`; its row for the manifest, or `None` where the engine failed."""
    name = sentence_id(seed, number)
    try:
        waveform, voice, words = speak(text, np.random.default_rng([seed, number]), engines)
    except (subprocess.SubprocessError, ValueError, soundfile.LibsndfileError) as error:
        tqdm.write(f"left out: {name}: {error}")
        return None
    soundfile.write(output / "audio" / f"{name}.flac", waveform, RATE)
    duration = round(len(waveform) / RATE, 4)
    row = {"id": name, "audio": f"audio/{name}.flac", "text": text, "duration": duration, "speaker": voice}
    return row | ({"words": words} if words else {})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", type=Path, help="a text file with one sentence a line")
    parser.add_argument("output", type=Path, help="folder for the manifest and the audio")
    parser.add_argument("--first", type=int, default=0, help="number of the first line to synthesise")
    parser.add_argument("--count", type=int, help="how many lines to synthesise (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engines", nargs="+", choices=list(VOICES), default=list(VOICES), help="the installed ones")
    arguments = parser.parse_args()
    output, seed, manifest = arguments.output, arguments.seed, arguments.output / "manifest.jsonl"
    (output / "audio").mkdir(parents=True, exist_ok=True)
    sentences = unfinished_sentences(arguments.sentences, manifest, seed, arguments.first, arguments.count)
    with manifest.open("a") as rows, ThreadPoolExecutor(arguments.workers) as pool:
        made = pool.map(lambda item: make_row(*item, output, seed, arguments.engines), sentences)
        for row in tqdm(made, total=len(sentences), unit="sentence"):
            if row:
                rows.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
