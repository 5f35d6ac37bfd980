"""Languages of the reader: their names, the prompt of each, and detection."""

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
