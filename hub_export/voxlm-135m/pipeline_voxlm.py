"""The `automatic-speech-recognition` pipeline of VoxLM checkpoints, named in config.json's `custom_pipelines`."""

from collections.abc import Sequence

import numpy as np
from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig
from transformers.pipelines import PIPELINE_REGISTRY

from .audio_voxlm import is_batch
from .processing_voxlm import VoxLMProcessor


TASK = "automatic-speech-recognition"


def check_timestamps(value):
    """
    Raises:
        ValueError: for a `return_timestamps` that is neither a bool, nor "word", nor `None`.
    """
    if value is not None and not isinstance(value, bool) and not (isinstance(value, str) and value == "word"):
        raise ValueError(
            f"`return_timestamps` must be True, False or 'word', got {value!r}; the model times words, and `segments` of "
            "`model.transcribe`'s result have times too"
        )


class VoxLMASRPipeline(AutomaticSpeechRecognitionPipeline):
    """
    Speech recognition with VoxLM; the same answers as `model.transcribe`.

    Takes what `model.transcribe` takes (a path, bytes, array, dict with "array" or "raw" and "sampling_rate"), lists of
    them, datasets and generators, with `batch_size`, `return_timestamps` (`True` or `"word"`), `chunk_length_s`, `prompt`,
    `context`, `hotwords`, `language` and `generate_kwargs` (where these may be too). Returns `{"text"}` and, with timestamps, `"chunks": [{"text", "timestamp": (start, end),
    "confidence"}]` in seconds.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`], *optional*): by default one of `tokenizer` and `feature_extractor` where both are given,
            else the model's own.
    """

    _load_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    _default_generation_config = GenerationConfig()

    def __init__(self, model, processor=None, **kwargs):
        if processor is None:
            processor = own_processor(model, kwargs.get("tokenizer"), kwargs.get("feature_extractor"))
        kwargs.setdefault("tokenizer", processor.tokenizer)
        kwargs.setdefault("feature_extractor", processor.feature_extractor)
        super().__init__(model, processor=processor, **kwargs)
        self.model.processor = processor
        self.type = "voxlm"

    def __call__(self, inputs, **kwargs):
        # The library takes a list for several recordings, but a column of `datasets` or a tuple for one.
        if isinstance(inputs, Sequence) and is_batch(inputs):
            inputs = list(inputs)
        elif isinstance(inputs, (list, tuple)) and inputs:
            inputs = np.asarray(inputs)  # the samples of one
        if isinstance(inputs, (list, tuple)) and not inputs:
            raise ValueError("No audio was given: the list is empty")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(
        self,
        return_timestamps=None,
        chunk_length_s=None,
        stride_length_s=None,
        prompt=None,
        sampling_rate=None,
        generate_kwargs=None,
        truncation=None,
        **kwargs,
    ):
        check_timestamps(return_timestamps)
        if kwargs.pop("stream", False):
            raise ValueError(
                "A pipeline returns whole results; for results as they are ready use `model.transcribe(stream=True)`"
            )
        preprocess = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
        # Accepted for compatibility and without effect: `stride_length_s` (segments are split at pauses and need no overlap)
        # and `truncation` (which `evaluate`'s evaluator passes to every pipeline; no audio is cut off here).
        forward = {"prompt": prompt, "chunk_length_s": chunk_length_s, **(generate_kwargs or {}), **kwargs}
        if forward.pop("task", "transcribe") != "transcribe":  # as Whisper's pipelines are told
            raise ValueError("The model transcribes; of `generate_kwargs['task']` it knows 'transcribe' alone")
        # The language may be `None`: it is detected then.
        forward = {name: value for name, value in forward.items() if value is not None or name == "language"}
        postprocess = {} if return_timestamps is None else {"return_timestamps": return_timestamps}
        if return_timestamps is not None:
            forward["return_timestamps"] = return_timestamps
        return preprocess, forward, postprocess

    def preprocess(self, inputs, sampling_rate=None):
        yield {"is_last": True, "audio": self.processor.load_audio(inputs, sampling_rate)}

    def _forward(self, model_inputs, return_timestamps=False, **options):
        audio = model_inputs["audio"]
        if not isinstance(audio, list):
            result = self.model.transcribe(audio, return_timestamps=return_timestamps, batch_size=1, **options)
            return {"is_last": model_inputs["is_last"], "result": dict(result)}
        options |= {"return_timestamps": return_timestamps, "batch_size": len(audio)}
        results = self.model.transcribe(audio, **options)
        errors = [result["error"] for result in results if result.get("error")]
        if errors:
            raise ValueError(errors[0])
        return {"is_last": model_inputs["is_last"], "result": [dict(result) for result in results]}

    def postprocess(self, model_outputs, return_timestamps=False):
        # One recording is one item here: `transcribe` splits and joins it.
        (output,) = model_outputs
        result = output["result"]
        if isinstance(result, list):
            (result,) = result
        final = {"text": result["text"]}
        if return_timestamps:
            final["chunks"] = [
                {"text": word["word"], "timestamp": (word["start"], word["end"]), "confidence": word["confidence"]}
                for word in result["words"]
            ]
        return final


def own_processor(model, tokenizer=None, feature_extractor=None) -> VoxLMProcessor:
    """A model's own processor or, when a tokenizer and a feature extractor that are not its parts are given, one of them."""
    own = model.processor
    if tokenizer is None or feature_extractor is None:
        return model.get_processor()
    if own is not None and own.tokenizer is tokenizer and own.feature_extractor is feature_extractor:
        return own
    return VoxLMProcessor(feature_extractor, tokenizer).configure(model)


class SpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    """
    What `pipeline("automatic-speech-recognition", model=...)` makes of a model object: VoxLM's pipeline of a VoxLM model, the
    library's own of any other. (The library looks into `custom_pipelines` of a config for the name of a model only.)
    """

    # `None`: load them if possible. A VoxLM model object needs neither.
    _load_tokenizer = None
    _load_feature_extractor = None

    def __new__(cls, model, **kwargs):
        if model.config.model_type == "voxlm":
            return VoxLMASRPipeline(model, **kwargs)
        missing = [name for name in ("tokenizer", "feature_extractor") if kwargs.get(name) is None]
        if missing:
            raise ValueError(
                f"The pipeline needs a {' and a '.join(missing)}, which could not be loaded from "
                f"{model.name_or_path!r}; pass it to `pipeline`"
            )
        return AutomaticSpeechRecognitionPipeline(model, **kwargs)


PIPELINE_REGISTRY.supported_tasks[TASK] = {**PIPELINE_REGISTRY.supported_tasks[TASK], "impl": SpeechRecognitionPipeline}
