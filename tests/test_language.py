"""Languages of the reader, and requests: what `transcribe` accepts as language, context and hotwords."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.language_voxlm import detect_language, language_code, language_prompt
from voxlm_hf.request_voxlm import MOST_HOTWORDS, MOST_SOUGHT, make_requests


SETTINGS = {"prompt_ids": [0, 1, 7, 8], "language": "en", "languages": {"en": 1, "de": 5, "yue": 6}}
READER = {"previous_id": 0, "language": "en", "languages": {"en": 1, "de": 45, "fr": 46}}


@pytest.mark.parametrize("language", ["de", "German", "german", "<|de|>", " DE "])
def test_a_language_has_all_the_names_that_whisper_knows(language):
    assert language_code(language, SETTINGS) == "de"


@pytest.mark.parametrize("language", ["fr", "Klingon", "<|fr|>", "", 5, ["de"], b"de"])
def test_a_language_that_the_audio_model_lacks_is_refused_with_those_it_has(language):
    with pytest.raises(ValueError, match="it knows en de yue$"):
        language_code(language, SETTINGS)


def test_an_english_model_refuses_other_languages():
    settings = {"prompt_ids": [0, 8], "language": "en", "languages": {}}
    assert language_prompt(settings, language_code("English", settings)) == [0, 8]
    with pytest.raises(ValueError, match="it knows en alone"):
        language_code("de", settings)


def test_the_prompt_names_the_language():
    assert language_prompt(SETTINGS, "de") == [0, 5, 7, 8] and language_prompt(SETTINGS, None) == [0, 1, 7, 8]


@pytest.fixture(scope="module")
def model():
    return tiny.with_reader(**READER)


def test_the_result_says_the_language(model):
    clip = tiny.noise(1.3, 5)
    (given,) = model.transcribe([clip], language="German")
    assert (given["language"], given["language_probability"]) == ("de", None)
    own = model.transcribe(clip)
    assert (own["language"], own["language_probability"]) == ("en", None)


def test_detection_is_one_step_of_the_decoder_on_the_window(model):
    """The states of the padded window through transformers' decoder, and the softmax over the three languages."""
    clip = tiny.noise(1.3, 5)
    features = model.processor.extract_features([np.pad(clip, (0, 30 * tiny.RATE - len(clip)))])
    with torch.no_grad():
        states = model.encode_audio(**features).last_hidden_state
        decoder = model.reader.decoder
        (last,) = decoder(input_ids=torch.tensor([[1]]), encoder_hidden_states=states).last_hidden_state[:, -1]
        expected = (decoder.embed_tokens.weight @ last)[[1, 45, 46]].softmax(-1)
    code, probability = detect_language(model, model.processor, clip)
    assert code == ["en", "de", "fr"][int(expected.argmax())]
    assert probability == pytest.approx(float(expected.max()), abs=1e-4)
    for result in (model.transcribe(clip, language=None), model.transcribe([clip, clip], language=None)[1]):
        assert (result["language"], result["language_probability"]) == (code, round(probability, 4))


def test_a_long_recording_has_one_language_however_it_is_split(model):
    clip = np.concatenate([tiny.noise(2.0, 1), np.zeros(3 * tiny.RATE, np.float32), tiny.noise(4.0, 2)])
    results = [model.transcribe(clip, language=None, chunk_length_s=length) for length in (3, 28)]
    assert results[0]["segments"] != results[1]["segments"] and results[0]["language"] == results[1]["language"]
    parts = list(model.transcribe(clip, language=None, chunk_length_s=3, stream=True))
    assert len(parts) > 1 and {part["language"] for part in parts} == {results[0]["language"]}


def test_silence_has_no_language_to_detect(model):
    result = model.transcribe(np.zeros(2 * tiny.RATE, np.float32), language=None)
    assert (result["text"], result["language"]) == ("", None)


@pytest.mark.parametrize("options", [{"language": "de"}, {"language": None}, {"hotwords": ["stew"]}])
def test_what_is_for_the_reader_is_refused_where_the_llm_writes(model, options):
    clip = tiny.noise(1.0)
    with pytest.raises(ValueError, match="are for the reader"):
        tiny.model().transcribe(clip, **options)
    with pytest.raises(ValueError, match="`use_reader=False` turns off"):
        model.transcribe(clip, use_reader=False, **options)
    with pytest.raises(ValueError, match="cannot search with num_beams"):
        model.transcribe(clip, num_beams=2, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hotwords": "Oslo"}, "must be a list"),
        ({"hotwords": {"Oslo": 2}}, "must be a list"),
        ({"hotwords": 3}, "must be a list"),
        ({"hotwords": ["Oslo", ""]}, "is empty"),
        ({"hotwords": [" \n"]}, "is empty"),
        ({"hotwords": ["Oslo", 5]}, "Hotword 1 must be a string, got int"),
        ({"hotwords": ["a\ud800"]}, "lone surrogate"),
        ({"hotwords": ["x" * 101]}, "belong into `context`"),
        ({"hotwords": [str(number) for number in range(MOST_HOTWORDS + 1)]}, "Got 2001 hotwords"),
        ({"hotwords": [["Oslo"], ["Bonn"], None]}, "Got 3 lists of hotwords for 2 recordings"),
        ({"hotwords": [["Oslo"], "Bonn"]}, "must be a list of words"),
        ({"context": 5}, "context must be a string"),
        ({"context": ["a"]}, "Got 1 contexts for 2 recordings"),
        ({"context": "the end </s>"}, "context contains the special token '</s>'"),
        ({"context": "a\ud800"}, "lone surrogate"),
        ({"language": ["de"]}, "Got 1 languages for 2 recordings"),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(model, options, message):
    with pytest.raises(ValueError, match=message):
        model.transcribe([tiny.noise(1.0)] * 2, stream=True, **options)


def test_each_recording_has_its_own_list(model):
    requests = make_requests(
        model, model.processor, 3, hotwords=[["stew", "stew"], None, []], language=["de", "fr", None]
    )
    assert [request.hotwords for request in requests] == [["stew"], [], []]
    assert [request.language for request in requests] == ["de", "fr", None]
    for request in make_requests(model, model.processor, 2, hotwords=["stew for\n dinner"]):
        assert request.hotwords == ["stew for dinner"]


def test_the_readers_prompt_stays_within_half_of_its_context_with_whole_hotwords(model):
    settings, room = model.config.reader_config, model.reader.prompt_room
    assert room == model.config.audio_config.max_target_positions // 2 - 1
    words = [f"word{number} quick" for number in range(400)]
    for context in (None, "the lazy dog " * 20):
        (request,) = make_requests(model, model.processor, 1, context=context, hotwords=words)
        tree, prompt = request.hotword_search(settings, room, heard=[])
        assert len(tree.words) == MOST_SOUGHT and prompt[0] == 0 and prompt[-1:] == settings["prompt_ids"]
        assert len(prompt) <= 1 + room + len(settings["prompt_ids"])


def test_without_context_and_hotwords_the_prompt_is_the_configs(model):
    (request,) = make_requests(model, model.processor, 1)
    assert request.reader_prompt(model.config.reader_config, 100) == model.config.reader_config["prompt_ids"]
    assert request.prompt == model.processor.render_prompt()


@pytest.mark.parametrize("options", [{"use_reader": False}, {"num_beams": 2}])
def test_the_llm_alone_may_be_asked_for_its_own_language(options):
    model, clip = tiny.with_reader(languages={"en": 1, "de": 2}), tiny.noise(0.6)
    assert model.transcribe(clip, language="English", **options).text == model.transcribe(clip, **options).text
    with pytest.raises(ValueError, match="for the reader"):
        model.transcribe(clip, language="de", **options)
