"""Rows of speech to a padded batch that the model's `forward` takes, with labels and word targets."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .label_words import match_words


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
            `audio_states` with their mask, and, when a row has words, `token_words` and `frame_words` (see the model's
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
            frame_words = []
            for number, row in enumerate(rows):
                labels = batch["labels"][number]
                place = torch.nonzero(labels != -100)[:, 0]
                words = processor.split_words(labels[place].tolist())
                for index, word in enumerate(words):
                    batch["token_words"][number, place[word.tokens]] = index
                frame_words.append(frame_targets(row.get("words"), [word.text for word in words], processor.frame_s))
            batch["frame_words"] = pad_sequence(frame_words, batch_first=True, padding_value=-100)
        return {**batch, **audio}


def frame_targets(timed: list[dict] | None, words: list[str], frame_s: float) -> torch.Tensor:
    """
    The word spoken in each encoder frame.

    Args:
        timed: words with times in seconds, or `None`; words: those of the transcript; frame_s: seconds per frame.

    Returns:
        `(frames,)` to a second after the last timed word: the number of a word of the transcript, -1 in a pause, -100 where a
        word is spoken that has no counterpart in the transcript, or where nothing is known.
    """
    if not timed:
        return torch.full((1,), -100)
    target = torch.full((round((timed[-1]["end"] + 1) / frame_s),), -1)
    places = match_words(words, [item["word"] for item in timed])
    for item, place in zip(timed, places):
        start, end = (round(max(0.0, item[edge]) / frame_s) for edge in ("start", "end"))
        target[start : max(end, start + 1)] = -100 if place is None else place
    return target
