"""Forced alignment: word times for a text that is given, and which of its words are not in the recording."""

import numpy as np
import torch

from .alignment_voxlm import word_times
from .audio_voxlm import is_batch, one_for_each
from .decoding_voxlm import DecodedText
from .processing_voxlm import plain_words
from .transcription_voxlm import VoxLMTranscription, confidences, prompt_with_audio, read_states, word_scores


# A word is taken to be in the recording when the LLM's log-probability of it, given audio and the words before, is at least this.
# Words put into or exchanged in texts at random: 91 % found, 91 % of the right words kept, with voices that were not trained on
# (the frames' own posteriors, which share all frames among the words that are given, tell them apart far worse).
SPOKEN_FROM = -8.0


@torch.no_grad()
def align(model, processor, audio, text, prompt=None, sampling_rate: int | None = None):
    """
    Times of the words of a known text.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes, each within the model's window.
        text (`str` or `list[str]`): what is said in it, one for each recording; any script and symbol the tokenizer can write.
        prompt (`str` or `list[str]`, *optional*): see `transcribe`.
        sampling_rate (`int`, *optional*): of bare arrays, by default the model's.

    Returns:
        [`VoxLMTranscription`] (or a list of them for a list) with the words as they were given: in order, none empty, inside
        the recording. `"spoken"` of a word is `False` where the model believes that it is not in the recording; its times are
        then only the place where it would have been. `"confidence"` is that of the word given the words before it.

    Raises:
        ValueError: for a text without words, one that is no string, a number of texts that is not that of the recordings, or
            audio that cannot be read, is longer than the window, or has less frames than the text has words.
    """
    waveforms = processor.load_batch(audio, sampling_rate)
    texts = text if is_batch(audio) else [text]
    if isinstance(texts, str) or len(texts) != len(waveforms):
        raise ValueError(f"Got {'one text' if isinstance(texts, str) else len(texts)} for {len(waveforms)} recordings")
    prompts = one_for_each(prompt, len(waveforms))
    results = [_align(model, processor, *row) for row in zip(waveforms, texts, prompts)]
    return results if is_batch(audio) else results[0]


def _align(model, processor, waveform: np.ndarray, text: str, prompt: str | None) -> VoxLMTranscription:
    if not isinstance(text, str):
        raise ValueError(f"The text to align must be a string, got {type(text).__name__}")
    duration_s = len(waveform) / processor.sampling_rate
    inputs = processor.apply_transcription_request(waveform, prompt=prompt).to(model.device)
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in processor.special_ids]
    if special:
        token = processor.tokenizer.convert_ids_to_tokens(special[0])
        raise ValueError(f"The text to align holds the special token {token!r}, which nobody says; remove it")
    surface = [word.text for word in processor.split_words(ids)]
    if not surface:
        raise ValueError(f"The text to align has no words: {text!r}")
    features = {name: value for name, value in inputs.items() if name.startswith(processor.feature_name)}
    audio = model.get_audio_features(**features)
    frame_s = processor.frame_s * model.alignment.frames_per_key
    # A model fed the full window has frames of silence after the recording's end.
    num_frames = min(int(model.alignment.keys_of(audio)[1].sum()), max(1, round(duration_s / frame_s)))
    if num_frames < len(surface):
        raise ValueError(
            f"The text has {len(surface)} words, but the recording only {num_frames} frames to place them in"
        )
    # As given, or as a model that writes no capitals and punctuation would write it: whichever this model finds likelier.
    candidates = [surface] if plain_words(surface) == surface else [surface, plain_words(surface)]
    decoded = [
        _read(model, inputs, audio, *processor.encode_words(processor.decode_text(ids), surface, words))
        for words in candidates
    ]
    best, token_words = max(decoded, key=lambda item: float(item[0].logprobs.mean()))
    scores = model.align_scores(best.states, torch.tensor(best.ids, device=model.device), audio)
    times = word_times(scores, 0, token_words, num_frames, frame_s, duration_s)
    places = [np.flatnonzero(token_words == word).tolist() for word in range(len(surface))]
    raw = word_scores(best, 0, places)
    return VoxLMTranscription(
        text=text,
        words=[
            {
                "word": word,
                "start": start,
                "end": end,
                "confidence": confidence,
                "spoken": score["logprob"] >= SPOKEN_FROM,
            }
            for word, (start, end), confidence, score in zip(surface, times, confidences(raw, model.config), raw)
        ],
        duration=round(duration_s, 3),
        truncated=False,
        word_scores=raw,
    )


def _read(model, inputs, audio, ids: list[int], token_words: np.ndarray):
    """The LLM's states for a text, and `(tokens,)` the word of each token."""
    decoded = DecodedText(ids=[ids], ended=[True])
    read_states(model, prompt_with_audio(model, inputs, audio), decoded)
    return decoded, token_words
