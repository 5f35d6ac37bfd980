"""Languages of the reader: their names, the prompt of each, and detection."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE


def language_code(language, settings: dict) -> str:
    """
    The code of a language, in any of Whisper's forms: "de", "German", "<|de|>".

    Args:
        language (`str`)
        settings (`dict`): `config.reader_config`.

    Raises:
        ValueError: for a language that the audio model does not know.
    """
    known = settings["languages"] or [settings["language"]]
    if isinstance(language, str):
        name = language.strip().lower()
        name = name[2:-2] if name.startswith("<|") and name.endswith("|>") else name
        code = TO_LANGUAGE_CODE.get(name, name)
        if code in known:
            return code
    only = "" if settings["languages"] else " alone"
    raise ValueError(f"The audio model does not know the language {language!r}; it knows {' '.join(known)}{only}")


def language_prompt(settings: dict, language: str | None) -> list[int]:
    """The decoder's prompt for a language, `None` for the config's own."""
    languages, prompt = settings["languages"], list(settings["prompt_ids"])
    if language is None or not languages:
        return prompt
    own = languages[settings["language"]]
    return [languages[language] if token == own else token for token in prompt]


@torch.no_grad()
def detect_language(model, processor, waveform: np.ndarray) -> tuple[str, float]:
    """
    The language that is spoken and its probability, by one step of the reader on the first window of a recording.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader that knows several languages.
        processor ([`VoxLMProcessor`])
        waveform (`np.ndarray` of shape `(samples,)`): at the encoder's rate.
    """
    languages = model.config.reader_config["languages"]
    window = round(processor.audio_window_s * processor.sampling_rate)
    features = processor.extract_features([np.pad(waveform[:window], (0, max(0, window - len(waveform))))])
    audio = model.encode_audio(**{name: value.to(model.device) for name, value in features.items()})
    (probabilities,) = model.reader.language_probabilities(
        audio.last_hidden_state, audio.frame_mask, languages, padded=True
    )
    best = int(probabilities.argmax())
    return list(languages)[best], float(probabilities[best])


def with_languages(model, processor, tasks: Iterable, requests: list) -> Iterator:
    """
    The tasks in the same order. Those of a recording whose language has to be detected wait until there is a window of speech,
    or its end, so that the language does not depend on where the recording is split.

    Each says what is spoken in its recording.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        tasks (`Iterable[SegmentTask]`): of `generation_voxlm.segment_recordings`.
        requests (`list[Request]`): of each recording; the languages are set in place.
    """
    waiting = []
    for task in tasks:
        waiting.append(task)
        request, heard = requests[task.recording], [item.audio for item in waiting if item.audio is not None]
        if model.reader is not None and request.language is None and heard:
            if task.audio is not None and sum(audio.duration_s for audio in heard) < processor.audio_window_s:
                continue
            spoken = detect_language(model, processor, np.concatenate([audio.waveform for audio in heard]))
            request.set_language(spoken[0], model.config.reader_config, spoken[1])
        for item in waiting:
            item.spoken = request.spoken
            yield item
        waiting = []
