"""Quality gates on texts written by hand, and the fallbacks that follow when one fires."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf import fallback_voxlm, rescoring_voxlm
from voxlm_hf.configuration_voxlm import DEFAULT_GATES
from voxlm_hf.decoding_voxlm import DecodedText
from voxlm_hf.fallback_voxlm import fired_gates, judged_segment
from voxlm_hf.segmentation_voxlm import AudioSegment
from voxlm_hf.words_voxlm import longest_loop


# Gates


def fired(
    text,
    mean_logprob=-0.2,
    active_s=10.0,
    visible_frames=30,
    num_tokens=40,
    out_of_tokens=False,
    gates=DEFAULT_GATES,
):
    return fired_gates(text, mean_logprob, active_s, visible_frames, num_tokens, out_of_tokens, gates)


@pytest.mark.parametrize(
    "text, facts",
    [
        ("mister quilter is the apostle of the middle classes and we are glad to welcome his gospel", {}),
        ("no, no, no, no", {"active_s": 1.5, "visible_frames": 3, "num_tokens": 4}),
        ("yes", {"active_s": 0.3, "visible_frames": 1}),
        ("yes", {"active_s": 1.5, "visible_frames": 5, "num_tokens": 1}),
        ("up", {"active_s": 2.0, "visible_frames": 1}),
        ("", {"mean_logprob": None, "active_s": 0.0, "visible_frames": 0, "num_tokens": 0}),
        ("five " * 12, {"active_s": 12.0, "visible_frames": 14, "num_tokens": 12}),  # people do count like this
        ("one two " * 9, {"active_s": 20.0, "visible_frames": 18, "num_tokens": 18}),
        ("March 20th, 1970", {"active_s": 1.3, "visible_frames": 5, "num_tokens": 16}),
    ],
)
def test_ordinary_speech_passes(text, facts):
    assert fired(text.strip(), **facts) == []


@pytest.mark.parametrize(
    "text, facts, gates",
    [
        ("cut off", {"out_of_tokens": True}, ["token_budget"]),
        ("a fluent guess", {"mean_logprob": -2.5}, ["mean_logprob"]),
        ("one two three four five six seven eight nine ten", {"active_s": 0.2}, ["words_per_second"]),
        ("thank you very much " * 8, {"active_s": 60, "visible_frames": 60}, ["compression_ratio"]),
        ("five " * 15, {"out_of_tokens": True}, ["token_budget", "loop"]),
        ("Stirred " * 7, {"visible_frames": 2, "num_tokens": 14, "active_s": 1.0}, ["loop"]),
        ("9 9 9 9", {"visible_frames": 1, "num_tokens": 7, "active_s": 0.4}, ["loop"]),
        (
            "Stirred. Stirred, stirred. STIRRED! Stirred?",
            {"visible_frames": 2, "num_tokens": 14, "active_s": 1.0},
            ["loop"],
        ),
        ("谢谢" * 16, {"visible_frames": 4, "num_tokens": 32, "active_s": 1.0}, ["loop"]),
        ("in the house " * 4, {"visible_frames": 4, "num_tokens": 12, "active_s": 1.0}, ["loop"]),
        ("and so " * 10, {"visible_frames": 14, "num_tokens": 20, "active_s": 10.0}, ["loop"]),
        ("let it be", {"visible_frames": 3, "active_s": 15.0}, ["no_speech"]),
        (
            "up",
            {"mean_logprob": -3.0, "visible_frames": 1, "active_s": 2.0},
            ["mean_logprob", "no_speech"],
        ),
        ("flour, fat and sauce", {"visible_frames": 28, "num_tokens": 6}, ["left_out"]),
        ("", {"visible_frames": 28, "num_tokens": 0, "mean_logprob": None}, ["left_out"]),
    ],
)
def test_nonsense_fires_its_gate(text, facts, gates):
    assert fired(text.strip(), **facts) == gates


def test_models_without_a_frame_gate_judge_by_the_text():
    assert fired("let it be", visible_frames=None, active_s=15.0, num_tokens=0) == []
    assert fired("no no no no", visible_frames=None, active_s=15.0, num_tokens=4) == []
    assert fired("so " * 9, visible_frames=None, active_s=15.0, num_tokens=9) == ["loop"]


def test_a_gate_without_a_threshold_never_fires():
    facts = {"mean_logprob": -9.0, "active_s": 0.0, "visible_frames": 50, "num_tokens": 0, "out_of_tokens": True}
    assert fired("five " * 200, **facts, gates={}) == []


@pytest.mark.parametrize(
    "text, times", [("a", 1), ("a b c", 1), ("a a a", 3), ("so it so it so it is", 3), ("x a b c a b c y", 2)]
)
def test_loops_are_counted(text, times):
    assert longest_loop(text.split()) == times


def judged(text="you", frames=30, start=16000, **facts):
    """The result for ten seconds of activity from 1.0 s on, with one word from 0.5 to 0.7 s after that."""
    audio = AudioSegment(np.zeros(10 * 16000), 16000, start, active_s=10.0)
    decoded = DecodedText([5], facts.pop("ended", True), text=text, mean_logprob=-0.25)
    words = [{"word": text, "start": 0.5, "end": 0.7, "confidence": 1.0}]
    return judged_segment(
        audio, decoded, words, [{"logprob": 0.0}], frames, len(decoded.ids), False, {"heard_per_second": 0.8}
    )


def test_words_move_to_their_place_in_the_recording():
    segment = judged()
    assert (segment.start, segment.end, segment.text, segment.gates) == (1.0, 11.0, "you", [])
    assert segment.words == [{"word": "you", "start": 1.5, "end": 1.7, "confidence": 1.0}]


def test_music_has_no_text_but_says_what_was_rejected():
    segment = judged(frames=3)
    assert (segment.text, segment.words, segment.word_scores) == ("", [], [])
    assert (segment.rejected, segment.gates, segment.truncated) == ("you", ["no_speech"], False)


# Fallbacks

MIXTURE = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}


@pytest.fixture(scope="module")
def never_ending():
    """A model that ends no text, so that the token budget fires; greedy CTC is its first fallback."""
    gates = {"compression_ratio": 2.4, "mean_logprob": -100.0}
    return tiny.model(llm="qwen3", quality_gates=gates, fallback_temperatures=[0.5], **MIXTURE)


@pytest.fixture(scope="module")
def clips():
    return [tiny.noise(1.5, seed) for seed in range(4)]


def texts_of(results):
    return [result.text for result in results]


def test_greedy_ctc_is_the_fallback_of_a_text_without_end(never_ending, clips):
    results = never_ending.transcribe(clips)
    assert {result.segments[0]["fallback"] for result in results} == {"projector"}
    assert {tuple(result.segments[0]["gates"]) for result in results} == {()}
    assert not any(result.truncated for result in results)


def test_fallbacks_do_not_depend_on_the_batch(never_ending, clips):
    assert texts_of(never_ending.transcribe(clips)) == [never_ending.transcribe(clip).text for clip in clips]


def test_fallbacks_do_not_depend_on_timestamps(never_ending, clips):
    plain = never_ending.transcribe(clips, return_timestamps=False)
    assert texts_of(plain) == texts_of(never_ending.transcribe(clips))
    assert all(result.words == [] for result in plain)


def test_the_likeliest_text_stays_when_all_fire():
    """No text of a random model reaches -0.5 per token: the samples are tried in vain, the same ones every time."""
    model = tiny.model(llm="qwen3", quality_gates={"mean_logprob": -0.5}, fallback_temperatures=[0.5, 1.0])
    clips = [tiny.noise(1.5, seed) for seed in range(2)]
    first, again = model.transcribe(clips[0]), model.transcribe(clips)[0]
    assert first.text == again.text and first.text
    assert "mean_logprob" in first.segments[0]["gates"]


def test_sampling_leaves_the_callers_random_numbers_alone():
    model = tiny.model(llm="qwen3", quality_gates={"mean_logprob": -0.5}, fallback_temperatures=[0.5])
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model.transcribe(tiny.noise(0.5))
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture
def halved(monkeypatch):
    """A model for which "left_out" fires for the whole segment and no gate for its halves; the clip; its result."""
    model = tiny.model(llm="qwen3", **MIXTURE)
    gates = iter([["left_out"], [], []])
    monkeypatch.setattr(fallback_voxlm, "fired_gates", lambda *inputs: next(gates))
    clip = np.concatenate([tiny.noise(1.5, 1), np.zeros(8000, np.float32), tiny.noise(1.0, 2)])
    result = model.transcribe(clip)
    assert next(gates, None) is None  # three texts were judged
    return model, clip, result


def test_a_segment_of_which_something_was_left_out_is_transcribed_in_halves(halved):
    (segment,) = halved[2].segments
    assert (segment["fallback"], segment["start"], segment["end"]) == ("halves", 0.0, 3.0)
    assert segment["text"] == halved[2].text != ""


def test_the_words_of_halves_lie_in_both(halved):
    _, _, result = halved
    times = [time for word in result.words for time in (word["start"], word["end"])]
    assert times == sorted(times) and times[-1] <= 3.0
    assert any(end <= 2.0 for end in times[1::2]) and any(start >= 1.5 for start in times[::2])
    assert len(result.word_scores) == len(result.words)


@pytest.fixture
def something_left_out(monkeypatch):
    """A model with a reader, which prefers long texts and has no doubts; the gate "left_out" fires for the first text."""
    gates = iter([["left_out"], [], []])
    monkeypatch.setattr(fallback_voxlm, "fired_gates", lambda *inputs: next(gates))
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *inputs: False)

    def longest(texts, scores):
        return max((text.decoded for text in texts), key=lambda text: len(text.ids))

    monkeypatch.setattr(rescoring_voxlm, "best_text", longest)
    return tiny.with_reader()


def test_the_window_comes_before_the_halves(something_left_out):
    """The reader then decodes the encoder's whole window, in which silence follows the audio, without learned end frames."""
    model, seen = something_left_out, []
    model.reader.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[1].sum().item(), inputs[3])))
    (segment,) = model.transcribe(tiny.noise(3.0, 1)).segments
    window = model.config.audio_config.max_source_positions
    assert segment["fallback"] == "window" and seen[0][0] < window
    assert seen == [(seen[0][0], False), (window, True)]


def test_an_audio_that_fills_the_window_has_no_window_fallback(something_left_out):
    model = something_left_out
    clip = tiny.noise(model.config.audio_window_s - 0.5, 1)
    (segment,) = model.transcribe(clip, chunk_length_s=model.config.audio_window_s).segments
    assert segment["fallback"] == "halves"


class Calls:
    """How often encoder and projector of a model run."""

    def __init__(self, model):
        self.encoder = self.projector = 0
        model.encoder.conv1.register_forward_hook(lambda *_: self.count("encoder"))
        model.projector.register_forward_hook(lambda *_: self.count("projector"))

    def count(self, name):
        setattr(self, name, getattr(self, name) + 1)


def test_the_audio_of_a_batch_is_encoded_once_whatever_fallbacks_follow(clips):
    model = tiny.model(llm="qwen3", quality_gates={"mean_logprob": -1e-9}, fallback_temperatures=[0.5, 1.0], **MIXTURE)
    calls = Calls(model)
    results = model.transcribe(clips)
    assert all("mean_logprob" in result.segments[0]["gates"] for result in results)
    assert (calls.encoder, calls.projector) == (1, 1)


def test_both_halves_are_encoded_anew_in_one_batch(monkeypatch):
    """Whisper's states contain their position, so those of the whole would not do."""
    model = tiny.model(llm="qwen3", **MIXTURE)
    gates = iter([["left_out"], [], []])
    monkeypatch.setattr(fallback_voxlm, "fired_gates", lambda *inputs: next(gates))
    calls = Calls(model)
    assert model.transcribe(tiny.noise(3.0, 1)).segments[0]["fallback"] == "halves"
    assert (calls.encoder, calls.projector) == (2, 2)


def test_a_text_that_the_caller_cut_short_has_no_fallback(never_ending, clips):
    (segment,) = never_ending.transcribe(clips[0], max_new_tokens=4).segments
    assert segment["fallback"] is None and segment["text"]
