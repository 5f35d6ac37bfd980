"""pipeline("automatic-speech-recognition") on a saved folder: every kind of input, the same answers as `transcribe`."""

import io

import datasets
import numpy as np
import pytest
import soundfile
import torch
from transformers import AutomaticSpeechRecognitionPipeline, WhisperForConditionalGeneration, pipeline

from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model(llm="qwen3", lora_config={"r": 2})


@pytest.fixture(scope="module")
def pipe(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=True)


OPTIONS = {"generate_kwargs": {"max_new_tokens": 6}}


AUDIO = tiny.noise(1.3)


@pytest.fixture(scope="module")
def expected(pipe):
    """What `transcribe` says of `AUDIO`."""
    result = pipe.model.transcribe(AUDIO, max_new_tokens=6)
    assert result.words
    return result


KINDS = {
    "array": lambda path: AUDIO,
    "list of numbers": lambda path: AUDIO.tolist(),
    "path": str,
    "bytes": lambda path: path.read_bytes(),
    "open file": lambda path: open(path, "rb"),
    "bytes in memory": lambda path: io.BytesIO(path.read_bytes()),
    "dict with raw": lambda path: {"raw": AUDIO, "sampling_rate": 16000},
    "dict with array": lambda path: {"array": np.stack([AUDIO, AUDIO]), "sampling_rate": 16000},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_gives_what_transcribe_gives(pipe, expected, kind, tmp_path):
    soundfile.write(tmp_path / "a.wav", AUDIO, 16000, subtype="FLOAT")
    assert pipe(KINDS[kind](tmp_path / "a.wav"), **OPTIONS) == {"text": expected.text}


def test_a_column_of_datasets_is_a_list(pipe, expected, tmp_path):
    soundfile.write(tmp_path / "a.wav", AUDIO, 16000, subtype="FLOAT")
    column = datasets.Dataset.from_dict({"audio": [str(tmp_path / "a.wav")] * 2})["audio"]
    for inputs in (column, tuple(column)):
        assert pipe(inputs, **OPTIONS) == [{"text": expected.text}] * 2
    assert [result.text for result in pipe.model.transcribe(column, max_new_tokens=6)] == [expected.text] * 2


@pytest.mark.parametrize("flag", [True, "word"])
def test_timestamps_are_the_words_of_transcribe(pipe, expected, flag):
    result = pipe(AUDIO, return_timestamps=flag, **OPTIONS)
    assert result["text"] == expected.text
    assert result["chunks"] == [
        {"text": word["word"], "timestamp": (word["start"], word["end"]), "confidence": word["confidence"]}
        for word in expected.words
    ]


def test_without_timestamps_there_are_no_chunks(pipe, expected):
    assert pipe(AUDIO, return_timestamps=False, **OPTIONS) == {"text": expected.text}


def test_it_is_a_pipeline_of_the_library(pipe):
    assert isinstance(pipe, AutomaticSpeechRecognitionPipeline)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_lists_generators_and_batches(pipe, batch_size):
    clips = [tiny.noise(seconds, seed) for seed, seconds in enumerate((1.3, 0.4, 0.9))]
    expected = [pipe(clip, return_timestamps="word", **OPTIONS) for clip in clips]
    assert all(result["chunks"] for result in expected)
    options = {"batch_size": batch_size, "return_timestamps": "word", **OPTIONS}
    for inputs in (clips, (clip for clip in clips)):
        for result, alone in zip(pipe(inputs, **options), expected, strict=True):
            assert result["text"] == alone["text"]
            for chunk, other in zip(result["chunks"], alone["chunks"], strict=True):
                assert chunk["timestamp"] == pytest.approx(other["timestamp"], abs=0.021)


def test_chunk_length(pipe):
    audio = tiny.noise(5)
    whole = pipe(audio, chunk_length_s=2, **OPTIONS)
    assert whole["text"] == pipe.model.transcribe(audio, chunk_length_s=2, max_new_tokens=6).text


def test_a_prompt_reaches_the_model(pipe):
    prompted = pipe(AUDIO, prompt="Names: Ada", **OPTIONS)
    assert prompted["text"] == pipe.model.transcribe(AUDIO, prompt="Names: Ada", max_new_tokens=6).text


def test_generate_options_reach_the_model(pipe):
    options = {"max_new_tokens": 4, "num_beams": 3}
    assert pipe(AUDIO, generate_kwargs=options)["text"] == pipe.model.transcribe(AUDIO, **options).text


@pytest.mark.parametrize(
    "audio, options, message",
    [
        (AUDIO, {"return_timestamps": "char"}, "return_timestamps"),
        (AUDIO, {"generate_kwargs": {"task": "translate"}}, "knows 'transcribe' alone"),
        (np.full(16000, np.nan), {}, "NaN"),
        (np.zeros(0), {}, "empty"),
    ],
    ids=["option", "task", "NaN", "empty"],
)
def test_bad_options_and_bad_audio(pipe, audio, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(audio, **options)


def test_a_pipeline_over_a_model_object(model):
    pipe = model.transcription_pipeline()
    assert pipe(tiny.noise(1), **OPTIONS)["text"] == model.transcribe(tiny.noise(1), max_new_tokens=6).text


def test_a_pipeline_of_the_librarys_function_over_a_model_object(model, monkeypatch):
    clip = tiny.noise(1)
    expected = model.transcribe(clip, max_new_tokens=6)
    parts = {"tokenizer": model.processor.tokenizer, "feature_extractor": model.processor.feature_extractor}
    for options in ({}, {"processor": model.processor}, parts):
        result = pipeline("automatic-speech-recognition", model=model, **options)(
            clip, return_timestamps="word", **OPTIONS
        )
        assert result["text"] == expected.text and len(result["chunks"]) == len(expected.words)
    made = model.processor
    monkeypatch.setattr(model, "processor", None)  # as of a model that nobody gave one
    for options in ({"processor": made}, parts):
        monkeypatch.setattr(model, "processor", None)
        assert (
            pipeline("automatic-speech-recognition", model=model, **options)(clip, **OPTIONS)["text"] == expected.text
        )


def test_other_models_get_the_librarys_pipeline():
    torch.manual_seed(0)
    other = WhisperForConditionalGeneration(tiny.config().audio_config)
    parts = {"tokenizer": tiny.tokenizer(), "feature_extractor": tiny.feature_extractor("whisper")}
    assert type(pipeline("automatic-speech-recognition", model=other, **parts)) is AutomaticSpeechRecognitionPipeline
    with pytest.raises(ValueError, match="needs a tokenizer and a feature_extractor"):
        pipeline("automatic-speech-recognition", model=other)


@pytest.mark.parametrize(
    "inputs, options, message",
    [([], {}, "list is empty"), (AUDIO, {"stream": True}, "model.transcribe\\(stream=True\\)")],
)
def test_what_a_pipeline_does_not_do(pipe, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(inputs, **options)


@pytest.mark.parametrize("language", ["de", None])
def test_language_and_hotwords_reach_the_model(monkeypatch, language):
    model = tiny.with_reader(previous_id=0, languages={"en": 1, "de": 45})
    asked, transcribe = {}, model.transcribe
    monkeypatch.setattr(model, "transcribe", lambda *args, **given: asked.update(given) or transcribe(*args, **given))
    options = {"language": language, "hotwords": ["stew"], "context": "about dinner"}
    expected = transcribe(AUDIO, **options).text
    given = {**options, "task": "transcribe"}  # as code for Whisper has it
    assert model.transcription_pipeline()(AUDIO, generate_kwargs=given)["text"] == expected
    assert {name: asked[name] for name in options} == options
