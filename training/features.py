"""Encoder states of recordings on disk, so that a frozen encoder encodes each augmented recording only once."""

import hashlib
import os
import socket
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from voxlm_hf.audio_voxlm import read_audio
from voxlm_hf.transcription_voxlm import error_line

from .augment import Augmentation
from .data import READ_ERRORS, Report, Row, length_batches, load_augmented


# What an interrupted run loses at most; more recordings a shard make fewer files. Chosen by hand, not tuned.
RECORDINGS_PER_SHARD = 256
# What ends the name of a shard that is being written.
UNFINISHED = ".unfinished"


class TensorStore:
    """
    Tensors by name, in a folder of safetensors shards, to which any number of processes may add at the same time.

    A shard is called by its contents' names, so no two processes write different contents to one file, and no shard
    takes the place of one that was removed.

    Args:
        folder (`Path`): created if it does not exist.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        remove_abandoned(self.folder)
        self.refresh()

    def refresh(self):
        """Find the shards that other processes have added. A damaged one is left out, with a line that names it."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in self._open:
                try:
                    shard = safe_open(path, "pt")
                    self._check(shard)
                    self._index(path, shard)
                except (SafetensorError, OSError, ValueError) as error:
                    print(f"{path} is skipped, what it held is made again: {error}")

    def _index(self, path: Path, shard):
        self._open[path] = shard
        self.files.update(dict.fromkeys(shard.keys(), path))

    def _check(self, shard):
        """Raise a `ValueError` for an open shard with contents that nobody has written."""

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._open[self.files[name]].get_tensor(name)

    def frames(self, name: str) -> int:
        """Length of a tensor's first axis, from the shard's header."""
        return self._open[self.files[name]].get_slice(name).get_shape()[0]

    def add(self, tensors: dict[str, torch.Tensor]):
        """Write `{name: tensor}` as one new shard, either completely or not at all."""
        path = self.folder / f"{hashlib.sha1('|'.join(sorted(tensors)).encode()).hexdigest()[:20]}.safetensors"
        # The writer's name, so that nobody removes what is still being written.
        unfinished = path.with_suffix(f".{socket.gethostname()}.{os.getpid()}{UNFINISHED}")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished)
        os.replace(unfinished, path)
        self._index(path, safe_open(path, "pt"))


class FeatureCache(TensorStore):
    """
    Encoder states `(frames, audio_size)` by key: float16 on disk, float32 in memory.

    Args:
        folder (`Path`): created if it does not exist.
        encoder (`str`): an `encoder_key`, of which the states that begin with it are.
        audio_size (`int`, *optional*): width of that encoder's states.
    """

    def __init__(self, folder: Path, encoder: str = "", audio_size: int | None = None):
        self.encoder, self.audio_size = encoder, audio_size
        super().__init__(folder)

    def _check(self, shard):
        for key in shard.keys():
            header = shard.get_slice(key)
            shape, dtype = header.get_shape(), header.get_dtype()
            if dtype != "F16" or len(shape) != 2:
                raise ValueError(f"{key} is {dtype} of shape {tuple(shape)}, not F16 of shape (frames, audio_size)")
            if self.audio_size not in (None, shape[1]) and key.startswith(self.encoder):
                raise ValueError(f"{key} has states of {shape[1]} numbers, the encoder makes {self.audio_size}")
            states = shard.get_tensor(key)
            if not bool(states.isfinite().all()):
                raise ValueError(f"{key} has numbers that are not finite")
            # The encoder ends with a normalisation, so none of its states is zero; what a disk has lost reads as zeros.
            if not bool(states.any(-1).all()):
                raise ValueError(f"{key} has frames of zeros")

    def __getitem__(self, key: str) -> torch.Tensor:
        return super().__getitem__(key).float()

    def add(self, states: dict[str, torch.Tensor]):
        """Write `{key: (frames, audio_size)}` as one new shard, either completely or not at all."""
        super().add({key: tensor.to(torch.float16) for key, tensor in states.items()})


def remove_abandoned(folder: Path):
    """Remove the unfinished shards of processes of this machine that are no longer there."""
    for path in folder.glob(f"*.{socket.gethostname()}.*{UNFINISHED}"):
        process = path.name.removesuffix(UNFINISHED).rpartition(".")[2]
        # No name of ours has anything else in this place than a process id: a positive number of 31 bits.
        if not (process.isascii() and process.isdecimal() and 0 < int(process[:20]) < 2**31):
            continue
        try:
            os.kill(int(process), 0)  # sends nothing, but fails where there is no such process
        except ProcessLookupError:
            path.unlink(missing_ok=True)
        except PermissionError:
            continue  # another user's


def weights_key(module: torch.nn.Module) -> str:
    """A name for a module made from its weights, so that encoders never share cached states."""
    digest = hashlib.sha1()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def audio_key(audio) -> str:
    """
    A name for a recording, made from a file's path, size and modification time, or from the content of anything else.
    """
    if isinstance(audio, dict) and isinstance(audio.get("path"), (str, os.PathLike)):
        if all(audio.get(name) is None for name in ("bytes", "array", "raw")):
            audio = audio["path"]
    if isinstance(audio, (str, os.PathLike)):
        status = os.stat(audio)
        content = f"{os.path.realpath(audio)}|{status.st_size}|{status.st_mtime_ns}".encode()
    elif isinstance(audio, dict) and audio.get("bytes") is not None:
        content = audio["bytes"]
    else:
        content = np.ascontiguousarray(read_audio(audio)[0]).tobytes()
    return hashlib.sha1(content).hexdigest()[:20]


def encoder_key(model, bf16: bool = False) -> str:
    """
    A name for what a model's projector takes: made from the encoder's weights, the layer that the states are of, and whether
    they were computed in bfloat16.
    """
    layers = model.config.projector_encoder_layers
    return weights_key(model.encoder) + (f".{layers}" if layers else "") + (".bf16" if bf16 else "")


def feature_key(encoder: str, row: Row, augmentation: Augmentation) -> str:
    """The cache's key of one recording under one augmentation and one encoder (its `encoder_key`)."""
    change = hashlib.sha1(augmentation.key.encode()).hexdigest()[:12]
    return f"{encoder}-{audio_key(row.audio)}-{change}"


@torch.no_grad()
def encode_missing(
    model,
    processor,
    rows: list[Row],
    augmentations: list[Augmentation],
    cache: FeatureCache,
    report: Report,
    seconds_per_batch: float = 60.0,
    bf16: bool = False,
) -> list[str | None]:
    """
    Encode the recordings that the cache lacks, on the encoder's device. Several processes share the work. An interrupted
    run resumes and skips the recordings in finished shards.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        rows, augmentations: of the same length.
        report: gets the recordings that cannot be read or are longer than the window.
        seconds_per_batch: audio that the encoder takes at once; chosen by hand, not tuned.
        bf16: whether the encoder computes in bfloat16, by autocast.

    Returns:
        the key of each row, `None` for those that were left out.
    """
    processes = PartialState()
    keys, errors = _feature_keys(encoder_key(model, bf16), rows, augmentations)
    # The same recording with the same augmentation may be there twice.
    missing = {key: number for number, key in enumerate(keys) if key is not None and key not in cache}
    # By the key and not by the place, since another run may be adding to the cache meanwhile.
    mine = [
        number
        for key, number in missing.items()
        if zlib.crc32(key.encode()) % processes.num_processes == processes.process_index
    ]
    blocks = range(0, len(mine), RECORDINGS_PER_SHARD)
    hidden = not mine or not processes.is_local_main_process
    for first in tqdm(blocks, desc="encoding", unit=f"{RECORDINGS_PER_SHARD} clips", disable=hidden):
        waveforms = {}
        for number in mine[first : first + RECORDINGS_PER_SHARD]:
            try:
                waveforms[number] = load_augmented(processor, rows[number], augmentations[number])
            except READ_ERRORS as error:
                errors[number] = error_line(error)
        states = encode(model, processor, waveforms, seconds_per_batch, bf16=bf16)
        if states:
            cache.add({keys[number]: frames for number, frames in states.items()})
    if processes.num_processes > 1:
        errors = dict(sorted(gather_object(list(errors.items()))))
        processes.wait_for_everyone()
        cache.refresh()
    failed = {keys[number] for number in errors} - {None}
    for number, reason in errors.items():
        report.leave_out("unreadable audio", f"{rows[number].where}: {reason}")
    return [None if key in failed else key for key in keys]


def _feature_keys(
    encoder: str, rows: list[Row], augmentations: list[Augmentation]
) -> tuple[list[str | None], dict[int, str]]:
    """The key of each row, `None` for a recording that cannot be read; and what is wrong with those, by number."""
    keys: list[str | None] = []
    errors: dict[int, str] = {}
    for number, (row, augmentation) in enumerate(zip(rows, augmentations)):
        try:
            keys.append(feature_key(encoder, row, augmentation))
        except READ_ERRORS as error:
            errors[number] = error_line(error)
            keys.append(None)
    return keys, errors


def encode(
    model,
    processor,
    waveforms: dict[int, np.ndarray],
    seconds_per_batch: float,
    states_of: str = "projector_states",
    bf16: bool = False,
) -> dict[int, torch.Tensor]:
    """
    Encoder states `(frames, audio_size)` of waveforms, by the same numbers, in batches of similar length.

    Args:
        states_of (`str`): field of [`VoxLMAudioOutput`].
        bf16 (`bool`): whether the encoder computes in bfloat16, by autocast.
    """
    states = {}
    lengths = {number: len(waveform) for number, waveform in waveforms.items()}
    for batch in length_batches(lengths, seconds_per_batch * processor.sampling_rate):
        features = processor.extract_features([waveforms[number] for number in batch])
        with torch.autocast(model.device.type, torch.bfloat16) if bf16 else nullcontext():
            audio = model.encode_audio(**features)
        for number, frames, mask in zip(batch, audio[states_of], audio.frame_mask):
            states[number] = frames[mask.bool()].float().cpu()
    return states
