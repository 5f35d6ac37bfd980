"""CTC scores against torch's CTC loss and against the sum over all labelings; decoding with them."""

import itertools
import math

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf.ctc_voxlm import ANYTHING, CTCFrames, CTCPrefix, choose, ctc_frames, text_logprobs


VOCABULARY = 4


def frames_of(logits: torch.Tensor) -> tuple[CTCFrames, torch.Tensor, torch.Tensor]:
    """Frames with these scores of the blank (first column) and the tokens, their log-probabilities, and the embeddings."""
    logprobs = logits.double().log_softmax(-1)
    tokens = logprobs[:, 1:]
    best = tokens.topk(VOCABULARY, dim=-1)
    frames = CTCFrames(
        queries=tokens.float(),  # against embeddings that pick out one column each
        offsets=torch.zeros(len(logits)),
        blanks=logprobs[:, 0].numpy(),
        best=best.indices.numpy(),
        best_logprobs=best.values.numpy(),
    )
    return frames, logprobs, torch.eye(VOCABULARY)


def appended(prefix: CTCPrefix, text: list[int]) -> float:
    for token in text:
        prefix.score([token])
        prefix.append(token)
    return prefix.logprob


def test_speech_log_odds_sum_how_much_likelier_tokens_are_than_blanks():
    logits = torch.full((3, VOCABULARY + 1), -20.0)
    logits[0, 0], logits[0, 2] = 0.0, 5.0  # a token, by 5 nats
    logits[1, 0], logits[1, 3] = 9.0, 2.0  # a blank
    logits[2, 0], logits[2, 4] = -1.0, 3.0  # a token, by 4 nats
    assert frames_of(logits)[0].speech_log_odds == pytest.approx(9.0, abs=1e-6)
    assert frames_of(logits[:0])[0].speech_log_odds == 0.0


@pytest.mark.parametrize("text", [[], [2], [0, 1], [3, 3], [1, 2, 1], [0, 0, 0]])
def test_a_whole_text_has_the_probability_of_torchs_ctc_loss(text):
    frames, logprobs, embeddings = frames_of(torch.randn(6, VOCABULARY + 1, generator=torch.manual_seed(0)))
    prefix = CTCPrefix(frames, embeddings)
    appended(prefix, text)
    loss = torch.nn.functional.ctc_loss(
        logprobs.unsqueeze(1), torch.tensor([text]) + 1, [6], [len(text)], reduction="sum"
    )
    assert prefix.logprob + prefix.end_score() == pytest.approx(-float(loss), abs=1e-5)


@pytest.mark.parametrize("text", [[2], [0, 1], [3, 3], [1, 2, 1]])
def test_a_prefix_has_the_probability_of_all_labelings_that_begin_with_it(text):
    frames, logprobs, embeddings = frames_of(torch.randn(5, VOCABULARY + 1, generator=torch.manual_seed(1)))
    total = 0.0
    for labels in itertools.product(range(VOCABULARY + 1), repeat=5):
        said = [label - 1 for label, _ in itertools.groupby(labels) if label]
        if said[: len(text)] == text:
            total += math.exp(sum(float(logprobs[frame, label]) for frame, label in enumerate(labels)))
    assert appended(CTCPrefix(frames, embeddings), text) == pytest.approx(math.log(total), abs=1e-5)


def sure_frames():
    """Three frames that surely say 1, 2, 3, and the embeddings."""
    logits = torch.full((3, VOCABULARY + 1), -8.0)
    logits[range(3), [2, 3, 4]] = 8.0
    frames, _, embeddings = frames_of(logits)
    return frames, embeddings


@pytest.mark.parametrize("llm", [[0.5, 0.3, 0.1, 0.1], [0.01, 0.33, 0.33, 0.33]], ids=["stops too early", "goes on"])
def test_the_frames_outvote_the_llm(llm):
    frames, embeddings = sure_frames()
    prefix, text, stop = CTCPrefix(frames, embeddings), [], 0
    while len(text) < 9 and (token := choose(torch.tensor(llm).log(), prefix, 0.5, {stop})) != stop:
        text.append(token)
    assert text == [1, 2, 3]


@pytest.mark.parametrize(
    "text, matches",
    [
        ([1, 2, 3], True),
        ([1, ANYTHING], True),
        ([ANYTHING], True),
        ([1, ANYTHING, 3], True),
        ([1, 3], False),
        ([2, ANYTHING], False),
    ],
)
def test_a_wildcard_matches_any_frames(text, matches):
    (score,) = text_logprobs(*sure_frames(), [text])
    assert score == pytest.approx(0, abs=1e-3) if matches else score < -10


def test_whole_texts_have_the_scores_of_growing_ones():
    frames, _, embeddings = frames_of(torch.randn(6, VOCABULARY + 1, generator=torch.manual_seed(2)))
    texts = [[], [1], [2, 2, 0], [0, 1, 2, 3, 0, 1, 2]]
    for text, score in zip(texts, text_logprobs(frames, embeddings, texts)):
        prefix = CTCPrefix(frames, embeddings)
        appended(prefix, text)
        whole = prefix.logprob + prefix.end_score()
        assert score == pytest.approx(whole, abs=1e-3) or max(score, whole) < -1e8  # more tokens than frames


def test_without_frames_the_empty_text_alone_is_possible():
    empty = CTCFrames(torch.zeros(0, 4), torch.zeros(0), np.zeros(0), np.zeros((0, 4), int), np.zeros((0, 4)))
    nothing, something = text_logprobs(empty, torch.eye(4), [[], [1]])
    assert nothing == 0.0 and something < -1e8


def test_silence_is_the_empty_text():
    empty = CTCFrames(torch.zeros(0, 4), torch.zeros(0), np.zeros(0), np.zeros((0, 4), int), np.zeros((0, 4)))
    llm = torch.tensor([0.01, 0.33, 0.33, 0.33]).log()
    assert choose(llm, CTCPrefix(empty, torch.eye(4)), 0.3, {0}) == 0


def test_the_text_does_not_depend_on_the_batch():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3, ctc_weight=0.3)
    clips = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]
    together = model.transcribe(clips)
    assert any(result.text for result in together)
    assert [model.transcribe(clip).text for clip in clips] == [result.text for result in together]


@torch.no_grad()
def test_frames_are_those_of_the_projector():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3)
    audio = tiny.encoded(model, tiny.noise(1.5, 2), tiny.noise(0.6, 3)).audio
    for row, frames in enumerate(ctc_frames(model, audio)):
        greedy = audio.tokens[row][audio.tokens[row] >= 0]
        assert len(frames.blanks) >= len(greedy) > 0
        assert set(greedy.tolist()) <= set(frames.best[:, 0].tolist())


@torch.no_grad()
def test_tokens_and_blank_share_each_frames_probability():
    model = tiny.model(llm="qwen3", projector_readout="token_mixture", frame_gate_threshold=0.3)
    (frames,) = ctc_frames(model, tiny.encoded(model, tiny.noise(1.0)).audio)
    scores = frames.queries @ model.get_input_embeddings().weight.T + frames.offsets[:, None]
    total = scores.exp().sum(-1).numpy() + np.exp(frames.blanks)
    np.testing.assert_allclose(total, 1.0, atol=1e-5)


@pytest.mark.parametrize("fields", [{"ctc_weight": -1.0}, {"ctc_weight": 0.3}])
def test_a_weight_that_means_nothing_is_refused(fields):
    with pytest.raises(ValueError, match="ctc_weight"):
        tiny.config(**fields)
