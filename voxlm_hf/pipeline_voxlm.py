"""The `automatic-speech-recognition` pipeline of VoxLM checkpoints, named in config.json's `custom_pipelines`."""

from collections.abc import Sequence

from transformers import AutomaticSpeechRecognitionPipeline, GenerationConfig

from .audio_voxlm import is_batch


class VoxLMASRPipeline(AutomaticSpeechRecognitionPipeline):
    """
    Speech recognition with VoxLM; the same answers as `model.transcribe`.

    Takes what `model.transcribe` takes (a path, bytes, array, dict with "array" or "raw" and "sampling_rate"), lists of
    them, datasets and generators, with `batch_size`, `return_timestamps` (`True` or `"word"`), `chunk_length_s`, `prompt` and
    `generate_kwargs`. Returns `{"text"}` and, with timestamps, `"chunks": [{"text", "timestamp": (start, end),
    "confidence"}]` in seconds.
    """

    _load_processor = True
    _load_feature_extractor = False
    _load_tokenizer = False
    _default_generation_config = GenerationConfig()

    def __init__(self, model, processor=None, **kwargs):
        processor = processor or model.get_processor()
        kwargs.setdefault("tokenizer", processor.tokenizer)
        kwargs.setdefault("feature_extractor", processor.feature_extractor)
        super().__init__(model, processor=processor, **kwargs)
        self.model.processor = processor
        self.type = "voxlm"

    def __call__(self, inputs, **kwargs):
        # The library takes a list for several recordings, but a column of `datasets` or a tuple for one.
        if isinstance(inputs, Sequence) and is_batch(inputs):
            inputs = list(inputs)
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
        if return_timestamps not in (None, False, True, "word"):
            raise ValueError(f"`return_timestamps` must be True, False or 'word', got {return_timestamps!r}")
        preprocess = {} if sampling_rate is None else {"sampling_rate": sampling_rate}
        # Accepted for compatibility and without effect: `stride_length_s` (segments are split at pauses and need no overlap)
        # and `truncation` (which `evaluate`'s evaluator passes to every pipeline; no audio is cut off here).
        forward = {"prompt": prompt, "chunk_length_s": chunk_length_s, **(generate_kwargs or {}), **kwargs}
        forward = {name: value for name, value in forward.items() if value is not None}
        postprocess = {} if return_timestamps is None else {"return_timestamps": return_timestamps}
        if return_timestamps is not None:
            forward["return_timestamps"] = return_timestamps
        return preprocess, forward, postprocess

    def preprocess(self, inputs, sampling_rate=None):
        yield {"is_last": True, "audio": self.processor.load_audio(inputs, sampling_rate)}

    def _forward(self, model_inputs, return_timestamps=False, **options):
        audio = model_inputs["audio"]
        batched = isinstance(audio, list)
        results = self.model.transcribe(
            audio if batched else [audio],
            return_timestamps=return_timestamps,
            batch_size=len(audio) if batched else 1,
            **options,
        )
        errors = [result["error"] for result in results if result.get("error")]
        if errors:
            raise ValueError(errors[0])
        outputs = [dict(result) for result in results]
        return {"is_last": model_inputs["is_last"], "result": outputs if batched else outputs[0]}

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
