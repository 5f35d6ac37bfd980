"""Encoder states of recordings, kept on disk: a frozen encoder needs to see each recording once per augmentation."""

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


RECORDINGS_PER_SHARD = 256


class FeatureCache:
    """
    Encoder states by key, in a folder of safetensors shards that are only ever added.

    Args:
        folder (`Path`): made if it does not exist; several caches may not write to one at a time.
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
        """Number of frames under a key, read from the shard's header."""
        return self._open[self.files[key]].get_slice(key).get_shape()[0]

    def add(self, states: dict[str, torch.Tensor]):
        """Write `{key: (frames, audio_size)}` as one new shard in float16, whole or not at all."""
        number = len(list(self.folder.glob("*.safetensors")))
        path, unfinished = self.folder / f"{number:05d}.safetensors", self.folder / f"{number:05d}.unfinished"
        save_file({key: tensor.to(torch.float16).contiguous() for key, tensor in states.items()}, unfinished)
        os.replace(unfinished, path)
        self._index(path)


def encoder_key(encoder: torch.nn.Module) -> str:
    """A name for an encoder by its weights, so that features of another one are never taken for its own."""
    digest = hashlib.sha1()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def audio_key(audio) -> str:
    """A name for a recording: of a file its path, size and time of change, of anything else its content."""
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
    Encode what the cache lacks. Safe to kill: what is in a finished shard is not encoded again.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        rows, augmentations: of the same length.
        report: a recording that cannot be read, or is longer than the window, is put down here.
        seconds_per_batch: audio that goes through the encoder at once.

    Returns:
        the key of each row, `None` for those that were left out.
    """
    encoder = encoder_key(model.encoder)
    keys: list[str | None] = []
    for row, augmentation in zip(rows, augmentations):
        try:
            keys.append(feature_key(encoder, row, augmentation))
        except (OSError, ValueError) as error:
            report.leave_out(f"unreadable audio ({type(error).__name__})", f"{row.id}: {error}")
            keys.append(None)
    missing = [number for number, key in enumerate(keys) if key is not None and key not in cache]
    blocks = range(0, len(missing), RECORDINGS_PER_SHARD)
    for first in tqdm(blocks, desc="encoding", unit=f"{RECORDINGS_PER_SHARD} clips", disable=not missing):
        waveforms = {}
        for number in missing[first : first + RECORDINGS_PER_SHARD]:
            try:
                waveform = augmentations[number](processor.load_audio(rows[number].audio), processor.sampling_rate)
                if len(waveform) > processor.audio_window_s * processor.sampling_rate:
                    raise ValueError(
                        f"{len(waveform) / processor.sampling_rate:.1f} s of audio, more than the window of "
                        f"{processor.audio_window_s} s"
                    )
            except (OSError, ValueError) as error:
                report.leave_out(f"unreadable audio ({type(error).__name__})", f"{rows[number].id}: {error}")
                keys[number] = None
                continue
            waveforms[number] = waveform
        states = {}
        for batch in length_batches(
            {n: len(w) for n, w in waveforms.items()}, seconds_per_batch * processor.sampling_rate
        ):
            inputs, _ = processor._process_audio([waveforms[number] for number in batch])
            audio = model.get_audio_features(**inputs)
            for number, frames, mask in zip(batch, audio.last_hidden_state, audio.frame_mask):
                states[keys[number]] = frames[mask.bool()].cpu()
        if states:
            cache.add(states)
    return keys
