"""Voice activity: which stretches of a recording may hold speech, block by block."""

import copy
import functools

import numpy as np
import torch


# Both detectors judge frames of 32 ms, the size that Silero was made for.
FRAME_S = 0.032
# Below this level (dB of full scale) is digital silence or the noise of a converter.
SILENCE_DB = -70.0
# Above the background by this much is activity; but what lies within `RANGE_DB` of the loudest is never called silence, since
# speech over music or noise is not far above its background.
ABOVE_BACKGROUND_DB, RANGE_DB = 6.0, 20.0
# Speech is never as even as this for a second, stationary noise always is.
EVEN_DB, EVEN_FROM_S = 3.0, 1.0
# How far back the background is looked for, in seconds.
HISTORY_S = 30.0
# Silero's probabilities at which speech begins and ends, its own defaults.
SILERO_BEGINS, SILERO_ENDS = 0.5, 0.35


class EnergyActivity:
    """
    Activity by level: louder than the background of the last 30 seconds.

    Careful to call something silence: it only finds pauses and skips what surely holds no speech (digital silence, even noise). Music
    is active; what it means is left to the model.

    Args:
        rate (`int`): sampling rate in Hz.
    """

    def __init__(self, rate: int):
        self.frame = round(FRAME_S * rate)
        self.history = np.zeros(0)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """
        Args:
            samples: `(frames * self.frame,)`, the continuation of what was given before.

        Returns:
            `(frames,)` of bool.
        """
        power = np.square(samples.reshape(-1, self.frame), dtype=np.float64).mean(1)
        levels = 10 * np.log10(power + 1e-12)
        self.history = np.concatenate([self.history, levels])[-max(len(levels), round(HISTORY_S / FRAME_S)) :]
        background, loud = np.percentile(self.history, [10, 95])
        if loud - background < EVEN_DB and len(self.history) * FRAME_S >= EVEN_FROM_S:
            return np.zeros(len(levels), dtype=bool)
        return levels > max(SILENCE_DB, min(background + ABOVE_BACKGROUND_DB, loud - RANGE_DB))


class SileroActivity:
    """
    Activity by the Silero voice activity detector (Silero Team 2024), whose ONNX model comes with the package `silero-vad`.

    Args:
        rate (`int`): sampling rate in Hz, 16000.

    Raises:
        ImportError: without `silero-vad` and `onnxruntime`; ValueError: for another rate.
    """

    def __init__(self, rate: int):
        if rate != 16000:
            raise ValueError(f"`vad='silero'` needs audio at 16000 Hz, but this model's encoder works at {rate} Hz")
        # The network is loaded once; what it remembers belongs to one recording.
        self.model = copy.copy(_silero())
        self.model.reset_states()
        self.frame = round(FRAME_S * rate)
        self.rate, self.speaking = rate, False

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        """As `EnergyActivity.__call__`."""
        active = np.zeros(len(samples) // self.frame, dtype=bool)
        for number, frame in enumerate(torch.from_numpy(samples.astype(np.float32)).split(self.frame)):
            probability = float(self.model(frame, self.rate))
            self.speaking = probability >= (SILERO_ENDS if self.speaking else SILERO_BEGINS)
            active[number] = self.speaking
        return active


@functools.cache
def _silero():
    threads = torch.get_num_threads()
    try:
        from silero_vad import load_silero_vad

        return load_silero_vad(onnx=True)
    except ImportError as error:
        raise ImportError(
            f"`vad='silero'` needs silero-vad and onnxruntime: pip install 'voxlm-hf[vad]' ({error})"
        ) from None
    finally:
        torch.set_num_threads(threads)  # importing it sets one thread for the whole process


# The names that `transcribe` takes.
DETECTORS = {"energy": EnergyActivity, "silero": SileroActivity}
