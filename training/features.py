"""Encoder states of recordings on disk, so that a frozen encoder encodes each augmented recording only once."""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from voxlm_hf.audio_voxlm import read_audio

from .augment import Augmentation
from .data import Report, Row, length_batches


# What an interrupted run loses at most; more recordings a shard make fewer files. Chosen by hand, not tuned.
RECORDINGS_PER_SHARD = 256


class FeatureCache:
    """
    Encoder states by key, in a folder of safetensors shards; shards are added and never changed.

    Args:
        folder (`Path`): created if it does not exist; only one process at a time may write to it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def _index(self, path: Path):
        self._open[path] = safe_open(path, "pt")
        self.files.update(dict.fromkeys(self._open[path].keys(), path))

    def __contains__(self, key: str) -> bool:
        return key in self.files

    def __getitem__(self, key: str) -> torch.Tensor:
        """Encoder states `(frames, audio_size)` in float32."""
        return self._open[self.files[key]].get_tensor(key).float()

    def frames(self, key: str) -> int:
        """Number of frames under a key, from the shard's header."""
        return self._open[self.files[key]].get_slice(key).get_shape()[0]

    def add(self, states: dict[str, torch.Tensor]):
        """Write `{key: (frames, audio_size)}` as one new shard in float16, either completely or not at all."""
        number = len(list(self.folder.glob("*.safetensors")))
        path, unfinished = self.folder / f"{number:05d}.safetensors", self.folder / f"{number:05d}.unfinished"
        save_file({key: tensor.to(torch.float16).contiguous() for key, tensor in states.items()}, unfinished)
        os.replace(unfinished, path)
        self._index(path)


def encoder_key(encoder: torch.nn.Module) -> str:
    """A name for an encoder made from its weights, so that encoders never share cached states."""
    digest = hashlib.sha1()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def audio_key(audio) -> str:
    """
    A name for a recording, made from a file's path, size and modification time, or from the content of anything else.
    """
    if isinstance(audio, (str, os.PathLike)):
        status = os.stat(audio)
        content = f"{os.path.realpath(audio)}|{status.st_size}|{status.st_mtime_ns}".encode()
    elif isinstance(audio, dict) and audio.get("bytes") is not None:
        content = audio["bytes"]
    else:
        content = np.ascontiguousarray(read_audio(audio)[0]).tobytes()
    return hashlib.sha1(content).hexdigest()[:20]


def feature_key(encoder: str, row: Row, augmentation: Augmentation) -> str:
    """The cache's key of one recording under one augmentation and one encoder (its `encoder_key`)."""
    change = hashlib.sha1(augmentation.key.encode()).hexdigest()[:12]
    return f"{encoder}-{audio_key(row.audio)}-{change}"


@torch.inference_mode()
def encode_missing(
    model,
    processor,
    rows: list[Row],
    augmentations: list[Augmentation],
    cache: FeatureCache,
    report: Report,
    seconds_per_batch: float = 60.0,
) -> list[str | None]:
    """
    Encode the recordings that the cache lacks. An interrupted run resumes and skips the recordings in finished shards.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        rows, augmentations: of the same length.
        report: gets the recordings that cannot be read or are longer than the window.
        seconds_per_batch: audio that the encoder takes at once; chosen by hand, not tuned.

    Returns:
        the key of each row, `None` for those that were left out.
    """
    keys = _feature_keys(encoder_key(model.encoder), rows, augmentations, report)
    missing = [number for number, key in enumerate(keys) if key is not None and key not in cache]
    blocks = range(0, len(missing), RECORDINGS_PER_SHARD)
    for first in tqdm(blocks, desc="encoding", unit=f"{RECORDINGS_PER_SHARD} clips", disable=not missing):
        waveforms = {}
        for number in missing[first : first + RECORDINGS_PER_SHARD]:
            try:
                waveforms[number] = _augmented(processor, rows[number], augmentations[number])
            except (OSError, ValueError) as error:
                report.leave_out(f"unreadable audio ({type(error).__name__})", f"{rows[number].id}: {error}")
                keys[number] = None
        states = _encode(model, processor, waveforms, seconds_per_batch)
        if states:
            cache.add({keys[number]: frames for number, frames in states.items()})
    return keys


def _feature_keys(encoder: str, rows: list[Row], augmentations: list[Augmentation], report: Report) -> list[str | None]:
    """The key of each row, `None` for a recording that cannot be read, which goes into the report."""
    keys: list[str | None] = []
    for row, augmentation in zip(rows, augmentations):
        try:
            keys.append(feature_key(encoder, row, augmentation))
        except (OSError, ValueError) as error:
            report.leave_out(f"unreadable audio ({type(error).__name__})", f"{row.id}: {error}")
            keys.append(None)
    return keys


def _augmented(processor, row: Row, augmentation: Augmentation) -> np.ndarray:
    """
    The augmented waveform `(samples,)` of a row.

    Raises:
        OSError, ValueError: when it cannot be read, or is longer than the window.
    """
    waveform = augmentation(processor.load_audio(row.audio), processor.sampling_rate)
    if len(waveform) > processor.audio_window_s * processor.sampling_rate:
        seconds = len(waveform) / processor.sampling_rate
        raise ValueError(f"{seconds:.1f} s of audio, more than the window of {processor.audio_window_s} s")
    return waveform


def _encode(model, processor, waveforms: dict[int, np.ndarray], seconds_per_batch: float) -> dict[int, torch.Tensor]:
    """Encoder states `(frames, audio_size)` of waveforms, by the same numbers, in batches of similar length."""
    states = {}
    lengths = {number: len(waveform) for number, waveform in waveforms.items()}
    for batch in length_batches(lengths, seconds_per_batch * processor.sampling_rate):
        audio = model.encode_audio(**processor.extract_features([waveforms[number] for number in batch]))
        for number, frames, mask in zip(batch, audio.last_hidden_state, audio.frame_mask):
            states[number] = frames[mask.bool()].cpu()
    return states
