"""A model of base models alone, of which nothing is trained: it transcribes at once, and the projector is left out."""

import json

import numpy as np
import pytest
import torch
from transformers import WhisperForConditionalGeneration
from transformers.models.whisper import generation_whisper

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.attention_times_voxlm import alignment_heads, head_mean
from voxlm_training.train import mark_trained


CLIPS = [tiny.noise(seconds, 3) for seconds in (1.3, 0.6)]
GATED = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.5}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    whisper = tiny.save_whisper(folder)
    return folder, whisper


def compose(bases, **fields):
    made = VoxLMForSpeechSeq2Seq.from_base_models(str(bases[0] / "audio"), str(bases[0] / "text"), **fields)
    return made.add_reader(str(bases[0] / "audio"), word_bonus=5.0)


@pytest.fixture(scope="module")
def model(bases):
    return compose(bases)


def results_of(model):
    return [(result.text, result.words) for result in model.transcribe(CLIPS)]


def test_it_transcribes_at_once_with_times_and_the_readers_confidence(model):
    for clip, result in zip(CLIPS, model.transcribe(CLIPS)):
        assert result.text.split() and " ".join(word["word"] for word in result.words).split() == result.text.split()
        times = [time for word in result.words for time in (word["start"], word["end"])]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= len(clip) / 16000
        for word, score in zip(result.words, result.word_scores):
            assert word["confidence"] == pytest.approx(np.exp(score["reader"]), abs=1e-3)


@pytest.mark.parametrize("fields", [{}, GATED], ids=["plain", "gated"])
def test_the_projector_and_the_alignment_head_are_left_out(bases, fields):
    """With other weights in them, and with LoRA that is not the identity, everything stays as it is."""
    made = compose(bases, **fields)
    expected = results_of(made)
    torch.manual_seed(9)
    for part in (made.projector, made.alignment):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    tiny.randomise_lora(made)
    assert results_of(made) == expected


def test_the_llm_sees_text_alone(model):
    lengths, token = [], model.config.audio_token_id
    placeholder = model.get_input_embeddings().weight[token]

    def look(module, args, kwargs):
        embeds = kwargs["inputs_embeds"]
        lengths.append(embeds.shape[1])
        assert not (embeds == placeholder).all(-1).any()

    hook = model.language_model.register_forward_pre_hook(look, with_kwargs=True)
    model.transcribe(CLIPS)
    hook.remove()
    features = model.processor.extract_features(CLIPS)
    assert lengths and max(lengths) < min(model.processor.count_audio_tokens(features))


def test_end_frames_are_what_the_encoder_makes_of_silence_behind_recordings(model):
    """Of other noise than it was computed with: the states differ by their positions, hardly by what was there before."""
    states = []
    for seconds in (3, 8):
        padded = np.pad(tiny.noise(seconds, 8), (0, (30 - seconds) * 16000))
        with torch.no_grad():
            encoded = model.encode_audio(**model.processor.extract_features([padded])).last_hidden_state[0]
        states.append(encoded[50 * seconds : 50 * seconds + 100])
    silence, speech = torch.stack(states).mean(0), encoded[:100]
    end = model.reader.end.detach()
    assert end.shape == silence.shape
    assert (end - silence).norm(dim=-1).mean() < 0.1 * (end - speech).norm(dim=-1).mean()


def test_the_reader_decodes_the_window_until_its_end_frames_are_trained(bases):
    made, seen = compose(bases), []
    made.reader.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[1].sum(-1).tolist(), inputs[3])))
    made.transcribe(CLIPS[0])
    mark_trained(made, {"reader"})
    made.transcribe(CLIPS[0])
    assert seen[0] == ([1500], True) and seen[1] == ([65], False)


def test_generate_writes_the_same(model):
    ids = model.generate(**model.processor(CLIPS, sampling_rate=16000))
    found = model.processor.batch_decode(ids, skip_special_tokens=True)
    assert found == [text for text, _ in results_of(model)]


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.transcribe(CLIPS[0], use_reader=False),
        lambda model: model.transcribe(CLIPS[0], num_beams=2),
        lambda model: model.generate(**model.processor(CLIPS[0]), use_reader=False),
        lambda model: model.generate(**model.processor(CLIPS[0]), do_sample=True),
    ],
)
def test_what_needs_a_trained_projector_says_so(model, call):
    with pytest.raises(ValueError, match="projector of this model is untrained"):
        call(model)


@pytest.mark.parametrize("text", ["he hoped", "TURNIPS AND CARROTS", "the quick, brown fox!"])
def test_a_known_text_is_aligned_by_the_reader(model, text):
    result = model.align(CLIPS[0], text)
    assert result.text == text and [word["word"] for word in result.words] == text.split()
    times = [time for word in result.words for time in (word["start"], word["end"])]
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 1.3
    for word, score in zip(result.words, result.word_scores):
        assert word["spoken"] == (score["reader"] >= -8) and word["confidence"] == pytest.approx(
            np.exp(score["reader"]), abs=1e-3
        )


def test_no_fallback_needs_the_projector(bases):
    made = compose(bases, quality_gates={"mean_logprob": -1e-9})
    (segment,) = made.transcribe(CLIPS[0]).segments
    assert "mean_logprob" in segment["gates"] and segment["fallback"] in (None, "window")


def test_it_is_the_same_after_saving(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["projector_trained"] is saved["alignment_trained"] is False
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert results_of(loaded) == results_of(model)
    assert [result.text for result in loaded.quantize_dynamic().transcribe(CLIPS)]


def test_training_is_what_makes_a_part_trained(bases):
    made = compose(bases)
    batch = made.processor.collate([{"audio": CLIPS[0], "text": "he hoped"}])
    made.projector.requires_grad_(False)
    made.train()(**batch)
    assert not made.config.projector_trained  # which cannot learn
    made.projector.requires_grad_(True)
    made.train()(**batch)
    assert made.config.projector_trained and not made.config.alignment_trained
    words = [{"word": "he", "start": 0.1, "end": 0.4}, {"word": "hoped", "start": 0.5, "end": 1.0}]
    timed = made.processor.collate([{"audio": CLIPS[0], "text": "he hoped", "words": words}])
    made.eval()(**timed)
    assert not made.config.alignment_trained
    made.train()(**timed)
    assert made.config.alignment_trained
    assert made.eval().transcribe(CLIPS[0], use_reader=False) is not None


# Word times by cross-attention


def test_attention_is_that_of_transformers_decoder(bases, model):
    whisper = WhisperForConditionalGeneration.from_pretrained(bases[0] / "audio", attn_implementation="eager").eval()
    states, mask = tiny.encoder_states(9)
    ids, heads = torch.tensor([[0, 5, 7, 40]]), alignment_heads(model)
    found = model.reader.cross_attention(states, mask, ids, heads, padded=True)
    with torch.no_grad():
        output = whisper.model.decoder(input_ids=ids, encoder_hidden_states=states, output_attentions=True)
    expected = torch.stack([output.cross_attentions[layer][:, head] for layer, head in heads], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert heads == [(0, 0), (0, 1)]


def test_heads_are_those_of_the_generation_config_where_it_names_them(bases, model, monkeypatch):
    monkeypatch.setitem(model.config.reader_config, "alignment_heads", [[0, 1]])
    assert alignment_heads(model) == [(0, 1)]


@pytest.mark.parametrize("heads", [[], [[0]], [[0, 9]], [[7, 0]], "all", [[0, True]]], ids=str)
def test_heads_that_do_not_exist_are_refused(bases, heads):
    with pytest.raises(ValueError, match="alignment_heads"):
        compose(bases).add_reader(str(bases[0] / "audio"), alignment_heads=heads)


@pytest.mark.parametrize("tokens, frames", [(3, 20), (12, 60)])
def test_attention_is_normalised_as_by_transformers(bases, tokens, frames, monkeypatch):
    """What `_extract_token_timestamps` gives to its dynamic time warping."""
    torch.manual_seed(4)
    weights = torch.rand(1, 2, tokens, frames).softmax(-1)
    seen, warp = [], generation_whisper._dynamic_time_warping
    monkeypatch.setattr(generation_whisper, "_dynamic_time_warping", lambda matrix: seen.append(matrix) or warp(matrix))

    class Outputs(dict):
        cross_attentions = [[weights]]
        sequences = torch.zeros(1, tokens + 1)

    bases[1]._extract_token_timestamps(Outputs(), [[0, 0], [0, 1]], num_frames=2 * frames, num_input_ids=0)
    np.testing.assert_allclose(head_mean(weights[0].numpy()), -seen[0], atol=1e-5)
