"""
Augmentation of waveforms for a frozen encoder: pauses, speed, gain, noise, a simple room, codecs, silence at both ends;
and of texts.

An [`Augmentation`] is drawn first and applied later, so that word times can be moved without touching the audio. All
ranges and probabilities were chosen by hand and not tuned, where no source is named.
"""

import io
from dataclasses import asdict, dataclass

import numpy as np
import soundfile
import soxr
from numpy.random import Generator

from voxlm_hf.words_voxlm import match_words


# Lossy formats that libsndfile writes and that shift no sample. The compression level goes up to 1, the
# strongest; chosen by hand, not tuned.
CODECS = {
    "mp3": {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.99},
    "vorbis": {"format": "OGG", "subtype": "VORBIS", "compression_level": 0.99},
    "gsm": {"format": "WAV", "subtype": "GSM610"},
    "telephone": {"format": "WAV", "subtype": "ULAW"},
}
# Sampling rate of narrow-band telephony (ITU-T G.711 and GSM).
TELEPHONE_RATE = 8000
# Standard deviation of inserted silence, -80 dB of full scale: no recording is all zeros. Chosen by hand, not tuned.
SILENCE_LEVEL = 1e-4
# Share of the replaced words that become one other word; the others become two. Chosen by hand, not tuned.
BECOMES_ONE = 0.7
# Decay of a reverberation's amplitude over its length, 60 dB: ln(1000), the definition of RT60.
DECAY = 6.9


@dataclass(frozen=True)
class Augmentation:
    """
    Changes to one recording, applied in this order; the defaults change nothing.

    Args:
        pauses (`tuple[tuple[float, float], ...]`): near silence to insert, as (moment, length) in seconds, in order.
        speed (`float`): factor of the playing speed, which changes the pitch too (Ko et al. 2015).
        room_s (`float`), room_level (`float`): length of the reverberation in seconds, and its level relative to the
            direct sound.
        snr_db (`float`, *optional*), tilt (`float`): noise at this signal-to-noise ratio; 0 is white, 0.5 pink.
        lead_s (`float`), tail_s (`float`): seconds of near silence before and after.
        codec (`str`, *optional*): one of `CODECS`.
        gain_db (`float`): gain at the end; the peak stays within full scale.
        seed (`int`): of the noise.
    """

    pauses: tuple[tuple[float, float], ...] = ()
    speed: float = 1.0
    room_s: float = 0.0
    room_level: float = 0.0
    snr_db: float | None = None
    tilt: float = 0.0
    lead_s: float = 0.0
    tail_s: float = 0.0
    codec: str | None = None
    gain_db: float = 0.0
    seed: int = 0

    @classmethod
    def draw(cls, rng: Generator, words: list[dict] | None = None) -> "Augmentation":
        """
        Random changes that a clean recording could meet in the world, each with a probability of its own.

        Args:
            words (`list[dict]`, *optional*): `{"word", "start", "end"}` in seconds; where they are known, pauses may be
                inserted between them and the silence before them may be long, so that the alignment head cannot rely on
                a steady pace or an early start.
        """
        has = rng.random(8) < (0.4, 0.3, 0.6, 0.5, 0.4, 0.7, 0.4, 0.2)
        edges = word_boundaries(words or [])
        pauses = draw_pauses(edges, int(rng.integers(1, 4)), (0.1, 2.0), rng) if has[6] and edges else ()
        long_lead = bool(words) and has[7]
        return cls(
            pauses=pauses,
            speed=float(rng.uniform(0.9, 1.1)) if has[0] else 1.0,
            room_s=float(rng.uniform(0.1, 0.5)) if has[1] else 0.0,
            room_level=float(rng.uniform(0.1, 0.5)),
            snr_db=float(rng.uniform(8, 35)) if has[2] else None,
            tilt=float(rng.choice([0.0, 0.3, 0.5])),
            lead_s=float(rng.uniform(0, 6 if long_lead else 0.5)) if has[3] or long_lead else 0.0,
            tail_s=float(rng.uniform(0, 0.5)) if has[3] else 0.0,
            codec=str(rng.choice(list(CODECS))) if has[4] else None,
            gain_db=float(rng.uniform(-20, 6)) if has[5] else 0.0,
            seed=int(rng.integers(2**31)),
        )

    @property
    def key(self) -> str:
        """A text that is the same for equal augmentations; it names cached features."""
        return repr(sorted(asdict(self).items()))

    def move(self, seconds: float, is_end: bool = False) -> float:
        """
        A moment of the original recording in the time of the augmented one, both in seconds; the end of a word stays
        before a pause.
        """
        paused = sum(length for moment, length in self.pauses if moment < seconds or moment == seconds and not is_end)
        return (seconds + paused) / self.speed + self.lead_s

    def move_words(self, words: list[dict]) -> list[dict]:
        """`{"word", "start", "end"}` of the original recording in the time of the augmented one."""
        return [
            {**word, "start": self.move(word["start"]), "end": self.move(word["end"], is_end=True)} for word in words
        ]

    def __call__(self, waveform: np.ndarray, sampling_rate: int = 16000) -> np.ndarray:
        """`waveform` `(samples,)` float32, augmented; its peak at most 1."""
        rng = np.random.default_rng(self.seed)
        if self.pauses:
            waveform = put_in_silence(waveform, self.pauses, rng, sampling_rate)
        if self.speed != 1.0:
            waveform = soxr.resample(waveform, sampling_rate * self.speed, sampling_rate)
        if self.room_s:
            waveform = reverberate(waveform, self.room_s, self.room_level, rng, sampling_rate)
        if self.snr_db is not None:
            waveform = add_noise(waveform, self.snr_db, self.tilt, rng)
        edges = [silence(seconds, rng, sampling_rate) for seconds in (self.lead_s, self.tail_s)]
        waveform = np.concatenate([edges[0], waveform, edges[1]])
        if self.codec is not None:
            waveform = through_codec(waveform / max(1.0, np.abs(waveform).max()), self.codec, sampling_rate)
        waveform = waveform * 10 ** (self.gain_db / 20)
        return (waveform / max(1.0, np.abs(waveform).max())).astype(np.float32)


def word_boundaries(words: list[dict]) -> list[float]:
    """Moments between neighbouring words in seconds, in the middle of the gap if there is one."""
    return [
        (left["end"] + right["start"]) / 2
        for left, right in zip(words[:-1], words[1:])
        if left["end"] <= right["start"]
    ]


def draw_pauses(edges: list[float], most: int, length_s: tuple[float, float], rng: Generator) -> tuple:
    """
    `Augmentation.pauses` at up to `most` of the moments `edges`, each with a length from the range `length_s` in
    seconds.
    """
    chosen = rng.choice(len(edges), size=min(most, len(edges)), replace=False) if edges else []
    return tuple((edges[number], float(rng.uniform(*length_s))) for number in sorted(chosen))


def silence(seconds: float, rng: Generator, sampling_rate: int) -> np.ndarray:
    """Noise at `SILENCE_LEVEL`."""
    return SILENCE_LEVEL * rng.standard_normal(int(seconds * sampling_rate))


def put_in_silence(waveform, pauses, rng: Generator, sampling_rate: int) -> np.ndarray:
    """The waveform with near silence inserted at each of `pauses`, `(moment, length)` in seconds and in order."""
    cuts = [round(moment * sampling_rate) for moment, _ in pauses]
    parts = np.split(waveform, cuts)
    gaps = [silence(length, rng, sampling_rate) for _, length in pauses]
    return np.concatenate([parts[0], *(item for pair in zip(gaps, parts[1:]) for item in pair)])


def reverberate(waveform, decay_s: float, level: float, rng: Generator, sampling_rate: int) -> np.ndarray:
    """Convolve with an exponentially decaying noise tail; `level` is the tail's norm relative to the direct sound."""
    tail = rng.standard_normal(int(sampling_rate * decay_s))
    tail *= np.exp(-DECAY * np.arange(len(tail)) / len(tail))
    tail *= level / np.sqrt((tail**2).sum())
    tail[0] = 1.0
    size = len(waveform) + len(tail)
    return np.fft.irfft(np.fft.rfft(waveform, size) * np.fft.rfft(tail, size), size)[: len(waveform)]


def add_noise(waveform, snr_db: float, tilt: float, rng: Generator) -> np.ndarray:
    """Add Gaussian noise at a signal-to-noise ratio; `tilt` 0 is white, 0.5 pink."""
    spectrum = np.fft.rfft(rng.standard_normal(len(waveform)))
    spectrum /= np.maximum(1, np.arange(len(spectrum))) ** tilt
    noise = np.fft.irfft(spectrum, len(waveform))
    gain = np.sqrt((waveform**2).mean() / max((noise**2).mean(), 1e-12) / 10 ** (snr_db / 10))
    return waveform + gain * noise


def through_codec(waveform, codec: str, sampling_rate: int) -> np.ndarray:
    """Encode and decode a waveform in a lossy format; "telephone" and "gsm" are narrow-band."""
    narrow = codec in ("telephone", "gsm")
    rate = TELEPHONE_RATE if narrow else sampling_rate
    coded = soxr.resample(waveform, sampling_rate, rate) if narrow else waveform
    file = io.BytesIO()
    soundfile.write(file, coded, rate, **CODECS[codec])
    file.seek(0)
    coded = soundfile.read(file)[0][: len(coded)]
    return soxr.resample(coded, rate, sampling_rate)[: len(waveform)] if narrow else coded


def non_speech(rng: Generator, sampling_rate: int = 16000) -> np.ndarray:
    """
    A clip of 0.3 to 12 s without words, for an empty transcript: silence, noise, hum, tones, clicks, or a mixture.
    """
    size = int(rng.uniform(0.3, 12) * sampling_rate)
    time_s, waveform = np.arange(size) / sampling_rate, 1e-5 * rng.standard_normal(size)
    if rng.random() < 0.6:
        waveform = waveform + add_noise(np.full(size, 1e-3), -20, rng.choice([0.0, 0.3, 0.5, 0.8]), rng)
    if rng.random() < 0.3:
        base = rng.choice([50, 60, rng.uniform(80, 300)])
        waveform = waveform + sum(
            rng.random() / harmonic * np.sin(2 * np.pi * base * harmonic * time_s) for harmonic in range(1, 8)
        )
    if rng.random() < 0.3:
        for _ in range(rng.integers(1, 12)):  # a tune
            start, length = rng.integers(size), int(rng.uniform(0.05, 0.8) * sampling_rate)
            note = time_s[start : start + length]
            waveform[start : start + length] += np.sin(2 * np.pi * rng.uniform(100, 2000) * note) * np.hanning(
                len(note)
            )
    if rng.random() < 0.3:
        waveform[rng.integers(size, size=rng.integers(1, 20))] += rng.uniform(-1, 1)
    level = 10 ** rng.uniform(-4, -0.3)
    return (level * waveform / max(1e-9, np.abs(waveform).max())).astype(np.float32)


def misheard(text: str, words: list[dict], others: list[str], share: float, rng: Generator) -> tuple[str, list[dict]]:
    """
    Replace some words of a text by wrong ones, as in a transcription with errors, so that the alignment head learns to
    find words that the LLM does not expect.

    Args:
        text: words separated by spaces; words: `{"word", "start", "end"}` in seconds, of all or some of them; others:
            words to choose replacements from; share: of the words with times to replace.

    Returns:
        the changed text, and its words with times.
    """
    places = match_words(text.split(), [word["word"] for word in words])
    timed, tokens = dict(zip(places, words)), []
    # Words that were spoken but are not in the text stay as they are.
    result = [word for place, word in zip(places, words) if place is None]
    for place, token in enumerate(text.split()):
        word = timed.get(place)
        if word is None or rng.random() >= share:
            tokens.append(token)
            result += [word] if word else []
            continue
        edges = [word["start"], word["end"]]
        if rng.random() >= BECOMES_ONE:
            edges.insert(1, edges[0] + float(rng.uniform(0.3, 0.7)) * (edges[1] - edges[0]))
        for start, end in zip(edges[:-1], edges[1:]):
            tokens.append(others[int(rng.integers(len(others)))])
            result.append({"word": tokens[-1], "start": start, "end": end})
    return " ".join(tokens), sorted(result, key=lambda word: word["start"])
