"""A picture of a transcription: spectrogram and a box for each word, above those of a reference."""

import io
import json
from pathlib import Path

import numpy as np

from .files import write_atomically


# Inches per second of audio, and the least and greatest width. Chosen by hand so that words of 0.1 s have room for their
# text.
INCHES_PER_SECOND, LEAST_INCHES, MOST_INCHES = 1.6, 6, 60
# Windows of the spectrogram (25 ms, as for speech recognition), and the range of its colours. Chosen by hand.
WINDOW_S, HOP_S, RANGE_DB = 0.025, 0.005, 70
# Added to every sample, far below what 16 bits resolve.
SILENCE = 1e-9


def read_words(path: Path) -> list[dict]:
    """
    Words with times from a JSON file: what `voxlm transcribe --format json` writes, a row of a manifest, or a bare list.

    Raises:
        ValueError: when there are none, or a word lacks its "word", "start" or "end".
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    words = content.get("words") if isinstance(content, dict) else content
    if not isinstance(words, list) or not words:
        raise ValueError(
            f"{path} has no words: a list of {{'word', 'start', 'end'}}, or an object with that as 'words'"
        )
    for number, word in enumerate(words):
        numbers = [word.get(edge) for edge in ("start", "end")] if isinstance(word, dict) else []
        if not numbers or "word" not in word or not all(isinstance(item, (int, float)) for item in numbers):
            raise ValueError(f"{path}: word {number} is not {{'word', 'start', 'end'}}: {word!r}")
    return words


def check_picture(path: Path):
    """
    Find out whether a picture can be drawn.

    Raises:
        ImportError: without matplotlib. ValueError: for a format it does not write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError(f"Pictures need matplotlib: pip install 'voxlm-hf[plot]' ({error})") from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"{path} must end with one of .{', .'.join(formats)}")


def plot_words(waveform: np.ndarray, rate: int, words: list[dict], path: Path, reference: list[dict] | None = None):
    """
    Draw a spectrogram with the words in boxes below it, the more certain the greener, and those of a reference below them.

    Args:
        waveform: `(samples,)` at `rate` Hz; words, reference: `{"word", "start", "end"}` in seconds, "confidence" where known.
        path: of the picture; its ending says the format (png, svg, pdf, ...).

    Raises:
        ImportError, ValueError: see `check_picture`. OSError: when the file cannot be written.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    duration_s = len(waveform) / rate
    rows = {"words": words} if reference is None else {"words": words, "reference": reference}
    width = min(max(INCHES_PER_SECOND * duration_s, LEAST_INCHES), MOST_INCHES)
    figure = Figure(figsize=(width, 3 + 0.5 * len(rows)), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 0.6 * len(rows)))
    size = round(WINDOW_S * rate)
    padded = np.pad(waveform, (0, max(0, 2 * size - len(waveform))))
    # Silence has no level; matplotlib would divide by zero for it.
    levels = top.specgram(padded + SILENCE, NFFT=size, Fs=rate, noverlap=size - round(HOP_S * rate), cmap="magma")[3]
    levels.set_clim(levels.get_array().max() - RANGE_DB, levels.get_array().max())
    top.set(ylabel="Hz", title=f"{duration_s:.2f} s, {len(words)} words")
    for height, items in enumerate(rows.values()):
        for word in items:
            _box(bottom, word, -height)
            for edge in ("start", "end"):
                top.axvline(word[edge], color="white" if height == 0 else "cyan", linewidth=0.5, alpha=0.7)
    bottom.set(xlim=(0, duration_s), ylim=(0.5 - len(rows), 0.5), xlabel="seconds")
    bottom.set_yticks([-height for height in range(len(rows))], list(rows))
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=120)
    write_atomically(path, picture.getvalue())


def _box(axes, word: dict, height: float):
    start, length = word["start"], word["end"] - word["start"]
    confidence = word.get("confidence")
    colour = "0.85" if confidence is None else (1 - 0.5 * confidence, 0.5 + 0.45 * confidence, 0.5)
    axes.broken_barh([(start, length)], (height - 0.4, 0.8), facecolor=colour, edgecolor="black", linewidth=0.5)
    # A dollar sign would begin a formula.
    label = str(word["word"]).replace("$", r"\$")
    axes.text(start + length / 2, height, label, ha="center", va="center", fontsize=8, clip_on=True)
