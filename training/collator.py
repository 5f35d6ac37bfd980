"""Rows of speech to a padded batch that the model's `forward` takes, with labels and word targets."""

import math

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from voxlm_hf.alignment_voxlm import close_gaps

from .text import match_words


class VoxLMCollator:
    """
    Makes batches of rows with "text" and one of "audio" (any kind the processor loads) and "states" (`(frames, audio_size)`,
    of the encoder), and optionally "words" (`{"word", "start", "end"}` in seconds), which become targets of the alignment head.

    Usable with a plain [`Trainer`] (`remove_unused_columns=False`).

    Args:
        processor ([`VoxLMProcessor`]): its prompt is the prompt of training.
    """

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask`, `labels` of shape `(batch, length)`, the audio as the encoder's inputs or as
            `audio_states` with their mask, and, when a row has words, `token_words`, `word_times` and `frame_times` (see the model's
            `forward`).
        """
        processor = self.processor
        if "states" in rows[0]:
            states = [row["states"] for row in rows]
            counts = [-(-len(item) // processor.frames_per_token) for item in states]
            audio = {
                "audio_states": pad_sequence(states, batch_first=True),
                "audio_states_mask": pad_sequence(
                    [torch.ones(len(s), dtype=torch.long) for s in states], batch_first=True
                ),
            }
            placeholders = [processor.audio_token * count for count in counts]
        else:
            audio, placeholders = processor._process_audio([processor.load_audio(row["audio"]) for row in rows])
        prompt = processor.render_prompt()
        prompts = [prompt.replace(processor.audio_token, tokens) for tokens in placeholders]
        batch = processor.training_ids(prompts, [row["text"] for row in rows])
        if any(row.get("words") for row in rows):
            batch["token_words"] = torch.full_like(batch["labels"], -100)
            targets = []
            for number, row in enumerate(rows):
                labels = batch["labels"][number]
                place = torch.nonzero(labels != -100)[:, 0]
                words = processor.split_words(labels[place].tolist())
                for index, word in enumerate(words):
                    batch["token_words"][number, place[word.tokens]] = index
                targets.append(word_targets(row.get("words"), [word.text for word in words], processor.frame_s))
            for name, tensors in zip(("word_times", "frame_times"), zip(*targets)):
                batch[name] = pad_sequence(tensors, batch_first=True, padding_value=float("nan"))
        return {**batch, **audio}


def word_targets(timed: list[dict] | None, words: list[str], frame_s: float) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Word times of a transcript, and the frames of which it is known what is said in them.

    Args:
        timed: words with times in seconds, or `None`; words: those of the transcript; frame_s: seconds per frame.

    Returns:
        `(words, 2)` starts and ends in seconds, neighbours joined as in the model's results, NaN for words without a time; and
        `(frames,)` middles of the frames to a second after the last timed word, NaN where the target does not hold: where a word
        is spoken that has no counterpart in the transcript, and between the neighbours of a word of the transcript that has no
        time.
    """
    times = np.full((len(words), 2), np.nan)
    if not timed:
        return torch.tensor(times, dtype=torch.float32), torch.full((1,), torch.nan)
    frames = (np.arange(round((timed[-1]["end"] + 1) / frame_s)) + 0.5) * frame_s
    for item, place in zip(timed, match_words(words, [item["word"] for item in timed])):
        start = max(0.0, item["start"])
        if place is None:
            frames[int(start / frame_s) : math.ceil(item["end"] / frame_s)] = np.nan
        else:
            times[place] = start, max(item["end"], start + frame_s / 2)
    has_time = np.flatnonzero(~np.isnan(times[:, 0]))
    times[has_time] = close_gaps(times[has_time])
    for word in np.flatnonzero(np.isnan(times[:, 0])):
        before, after = has_time[has_time < word], has_time[has_time > word]
        start = times[before[-1], 1] if len(before) else 0.0
        frames[int(start / frame_s) : math.ceil(times[after[0], 0] / frame_s) if len(after) else None] = np.nan
    return torch.tensor(times, dtype=torch.float32), torch.tensor(frames, dtype=torch.float32)
