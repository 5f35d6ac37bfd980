"""Cached encoder states: a frozen encoder needs to see each recording once."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.augment import augment
from training.text import normalise
from voxlm_hf import VoxLMForSpeechSeq2Seq


class FeatureCache:
    """
    Encoder states of a manifest: `NAME.jsonl` (the manifest's rows plus "start" and "frames") and `NAME.bin` (float16 frames,
    one row after the other).

    Args:
        prefix (`Path`): path without suffix; size (`int`): width of a frame.
    """

    def __init__(self, prefix: Path, size: int):
        self.rows = [json.loads(line) for line in Path(f"{prefix}.jsonl").open()]
        self.states = np.memmap(f"{prefix}.bin", np.float16, "r").reshape(-1, size)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = self.rows[index]
        frames = torch.from_numpy(np.array(self.states[row["start"] : row["start"] + row["frames"]])).float()
        return {**row, "text": normalise(row["text"]), "states": frames}


@torch.inference_mode()
def write_cache(model, manifest: Path, prefix: Path, seed: int | None, batch_size: int = 8):
    """
    Encode every recording of a manifest (JSONL with "audio", relative to it, and "text") into a [`FeatureCache`].

    A recording that cannot be read is reported and left out. Continues after the last complete block of an earlier run.

    Args:
        seed (`int`, *optional*): augment each recording, reproducibly; `None` leaves them as they are.
    """
    processor, rows = model.processor, [json.loads(line) for line in manifest.open()]
    index, states = Path(f"{prefix}.jsonl"), Path(f"{prefix}.bin")
    done = [json.loads(line) for line in index.open()] if index.exists() else []
    start = sum(row["frames"] for row in done)
    first = done[-1]["row"] + 1 if done else 0
    size = model.config.audio_hidden_size
    with index.open("a") as index_file, states.open("ab") as states_file:
        states_file.truncate(start * size * 2)
        for block in tqdm(range(first, len(rows), 8 * batch_size), unit="block"):
            clips = []
            for number in range(block, min(block + 8 * batch_size, len(rows))):
                try:
                    waveform = processor.load_audio(str(manifest.parent / rows[number]["audio"]))
                except (OSError, ValueError) as error:
                    tqdm.write(f"left out: {error}")
                    continue
                if seed is not None:
                    waveform, lead_s = augment(waveform, np.random.default_rng([seed, number]))
                    for word in rows[number].get("words") or []:
                        word["start"], word["end"] = word["start"] + lead_s, word["end"] + lead_s
                clips.append((number, waveform))
            clips.sort(key=lambda clip: len(clip[1]))
            encoded = {}
            for position in range(0, len(clips), batch_size):
                batch = clips[position : position + batch_size]
                inputs, _ = processor._process_audio([waveform for _, waveform in batch])
                audio = model.get_audio_features(**inputs)
                for (number, _), frames, mask in zip(batch, audio.last_hidden_state, audio.frame_mask):
                    encoded[number] = frames[mask.bool()].to(torch.float16).numpy()
            for number in sorted(encoded):
                frames = encoded[number]
                states_file.write(frames.tobytes())
                row = {**rows[number], "row": number, "start": start, "frames": len(frames)}
                index_file.write(json.dumps(row) + "\n")
                start += len(frames)
            states_file.flush(), index_file.flush()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint whose encoder is used")
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="path of the cache, without suffix")
    parser.add_argument("--augment-seed", type=int)
    arguments = parser.parse_args()
    model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
    model.get_processor()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_cache(model, arguments.manifest, arguments.output, arguments.augment_seed)


if __name__ == "__main__":
    main()
