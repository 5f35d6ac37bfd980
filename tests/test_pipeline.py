"""pipeline("automatic-speech-recognition") on an exported folder, every kind of input, equal to `transcribe`."""

import numpy as np
import pytest
import soundfile
from transformers import AutomaticSpeechRecognitionPipeline, pipeline

from hub_export.export import export
from tests import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.model(llm="qwen3", lora_config={"r": 2})


@pytest.fixture(scope="module")
def pipe(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    export(model, folder)
    return pipeline("automatic-speech-recognition", model=str(folder), trust_remote_code=True)


OPTIONS = {"generate_kwargs": {"max_new_tokens": 6}}


def test_all_inputs_give_what_transcribe_gives(pipe, tmp_path):
    assert isinstance(pipe, AutomaticSpeechRecognitionPipeline)
    audio = tiny.noise(1.3)
    path = tmp_path / "a.wav"
    soundfile.write(path, audio, 16000, subtype="FLOAT")
    expected = pipe.model.transcribe(audio, max_new_tokens=6)
    assert expected.text
    for kind in (audio, str(path), path.read_bytes(), {"raw": audio, "sampling_rate": 16000}):
        assert pipe(kind, **OPTIONS) == {"text": expected.text}
    assert pipe({"array": np.stack([audio, audio]), "sampling_rate": 16000}, **OPTIONS)["text"] == expected.text
    for flag in (True, "word"):
        result = pipe(audio, return_timestamps=flag, **OPTIONS)
        assert result["text"] == expected.text
        assert result["chunks"] == [
            {"text": word["word"], "timestamp": (word["start"], word["end"]), "confidence": word["confidence"]}
            for word in expected.words
        ]
    assert pipe(audio, return_timestamps=False, **OPTIONS) == {"text": expected.text}


def test_lists_generators_and_batches(pipe):
    clips = [tiny.noise(seconds, seed) for seed, seconds in enumerate((1.3, 0.4, 0.9))]
    expected = [pipe(clip, **OPTIONS) for clip in clips]
    for batch_size in (1, 2, 3):
        assert pipe(clips, batch_size=batch_size, **OPTIONS) == expected
        assert list(pipe((clip for clip in clips), batch_size=batch_size, **OPTIONS)) == expected
    assert len(pipe(clips, batch_size=2, return_timestamps="word", **OPTIONS)[1]["chunks"]) > 0


def test_chunk_length(pipe):
    audio = tiny.noise(5)
    whole = pipe(audio, chunk_length_s=2, **OPTIONS)
    assert whole["text"] == pipe.model.transcribe(audio, chunk_length_s=2, max_new_tokens=6).text


def test_prompt_and_generate_options(pipe):
    audio = tiny.noise(1)
    prompted = pipe(audio, prompt="Names: Ada", **OPTIONS)
    assert prompted["text"] == pipe.model.transcribe(audio, prompt="Names: Ada", max_new_tokens=6).text
    assert len(pipe(audio, generate_kwargs={"max_new_tokens": 2, "num_beams": 2})["text"]) < 40


def test_bad_options_and_bad_audio(pipe):
    with pytest.raises(ValueError, match="return_timestamps"):
        pipe(tiny.noise(1), return_timestamps="char")
    with pytest.raises(ValueError, match="NaN"):
        pipe(np.full(16000, np.nan))
    with pytest.raises(ValueError, match="empty"):
        pipe(np.zeros(0))


def test_a_pipeline_over_a_model_object(model):
    pipe = model.transcription_pipeline()
    assert pipe(tiny.noise(1), **OPTIONS)["text"] == model.transcribe(tiny.noise(1), max_new_tokens=6).text
