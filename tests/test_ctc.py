"""CTC prefix scores against torch's CTC loss and against all labelings counted out; decoding with them."""

import itertools
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from tests import tiny
from voxlm_hf.ctc_voxlm import CTCFrames, CTCPrefix, choose, read_frames


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


def written(prefix: CTCPrefix, text: list[int]) -> float:
    for token in text:
        prefix.score([token])
        prefix.append(token)
    return prefix.logprob


def test_what_frames_heard_is_how_much_likelier_their_tokens_are_than_blanks():
    logits = torch.full((3, VOCABULARY + 1), -20.0)
    logits[0, 0], logits[0, 2] = 0.0, 5.0  # a token, by 5 nats
    logits[1, 0], logits[1, 3] = 9.0, 2.0  # a blank
    logits[2, 0], logits[2, 4] = -1.0, 3.0  # a token, by 4 nats
    assert frames_of(logits)[0].heard == pytest.approx(9.0, abs=1e-6)
    assert frames_of(logits[:0])[0].heard == 0.0


@pytest.mark.parametrize("text", [[], [2], [0, 1], [3, 3], [1, 2, 1], [0, 0, 0]])
def test_a_whole_text_has_the_probability_of_torchs_ctc_loss(text):
    frames, logprobs, embeddings = frames_of(torch.randn(6, VOCABULARY + 1, generator=torch.manual_seed(0)))
    prefix = CTCPrefix(frames, embeddings)
    written(prefix, text)
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
    assert written(CTCPrefix(frames, embeddings), text) == pytest.approx(math.log(total), abs=1e-5)


def test_the_frames_outvote_an_llm_that_stops_too_early_or_goes_on():
    # Three frames that surely say 1, 2, 3.
    logits = torch.full((3, VOCABULARY + 1), -8.0)
    logits[range(3), [2, 3, 4]] = 8.0
    frames, _, embeddings = frames_of(logits)
    stop = 0
    for llm in ([0.5, 0.3, 0.1, 0.1], [0.01, 0.33, 0.33, 0.33]):
        prefix, text = CTCPrefix(frames, embeddings), []
        while len(text) < 9 and (token := choose(torch.tensor(llm).log(), prefix, 0.5, {stop})) != stop:
            text.append(token)
        assert text == [1, 2, 3]


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
    inputs = model.processor.apply_transcription_request([tiny.noise(1.5, 2), tiny.noise(0.6, 3)])
    features = {name: value for name, value in inputs.items() if name.startswith("input_features")}
    audio = model.get_audio_features(**features)
    for row, frames in enumerate(read_frames(model, audio)):
        read = audio.tokens[row][audio.tokens[row] >= 0]
        assert len(frames.blanks) >= len(read) > 0
        assert set(read.tolist()) <= set(frames.best[:, 0].tolist())


@pytest.mark.parametrize("fields", [{"ctc_weight": -1.0}, {"ctc_weight": 0.3}])
def test_a_weight_that_means_nothing_is_refused(fields):
    with pytest.raises(StrictDataclassClassValidationError, match="ctc_weight"):
        tiny.config(**fields)
