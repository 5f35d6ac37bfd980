"""Rescoring: the reader's hypotheses, scored by LLM, CTC frames and reader, and the best of them."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests import tiny
from tests.test_decoding import forced
from voxlm_hf import rescoring_voxlm
from voxlm_hf.ctc_voxlm import ANYTHING
from voxlm_hf.decoding_voxlm import DecodedText, pack_prompt
from voxlm_hf.loading_voxlm import lora_layers
from voxlm_hf.reader_voxlm import ReaderHypothesis
from voxlm_hf.rescoring_voxlm import (
    Hypothesis,
    beginning_of_text,
    evidence,
    hypotheses_of,
    in_doubt,
    is_unjudged,
    rescore,
    score_hypotheses,
    weights_of,
)


READER_ALONE = {"llm_weight": 0.0, "ctc_weight": 0.0, "word_bonus": 0.0}


def request(model, *clips):
    """Clips as an encoded batch, and their packed prompt."""
    batch = tiny.encoded(model, *clips)
    return batch, pack_prompt(model, batch)


def hypothesis(ids, reader_logprob=0.0, llm_logprobs=None, end_logprob=0.0, words=(), known=None, ctc_ids=None):
    """A hypothesis as the LLM has scored it."""
    logprobs = None if llm_logprobs is None else torch.tensor(llm_logprobs)
    return Hypothesis(
        decoded=DecodedText(ids, True, words=list(words), logprobs=logprobs),
        known=torch.tensor([True] * len(ids) if known is None else known, dtype=torch.bool),
        ctc_ids=ids if ctc_ids is None else ctc_ids,
        reader_logprob=reader_logprob,
        end_logprob=end_logprob,
    )


# The n-best list in the LLM's tokens

# Reader tokens 3, 4, ... stand for these letters.
LETTERS = "Hi, yo.h"


@pytest.fixture(scope="module")
def capitals():
    """The one hypothesis for "Hi, yo" and "hi yo.", which differ in capitals and punctuation only; and the model."""
    model = tiny.with_reader(LETTERS, plain_text=True)
    n_best = [
        ReaderHypothesis([3, 4, 5, 6, 7, 8], [-0.5, -1.0, -9.0, -0.1, -0.2, -0.3], -0.1),  # H i , _ y o
        ReaderHypothesis([10, 4, 6, 7, 8, 9], [-2.0] * 6, -0.1),  # h i _ y o .
    ]
    (found,) = hypotheses_of(model, model.processor, n_best)
    return model, n_best, found


def test_the_likeliest_spelling_is_kept(capitals):
    _, _, found = capitals
    assert found.decoded.text == "Hi, yo" and found.decoded.words == ["Hi,", "yo"]


def test_spellings_of_the_same_words_are_likely_together(capitals):
    _, (first, second), found = capitals
    assert found.reader_logprob == pytest.approx(np.logaddexp(first.logprob, second.logprob))


def test_an_llm_that_was_trained_on_plain_text_scores_plain_text(capitals):
    model, _, found = capitals
    assert model.processor.decode_text(found.decoded.ids) == "hi yo"


def test_punctuation_does_not_count_against_a_word(capitals):
    _, _, found = capitals
    assert found.decoded.reader_logprobs == pytest.approx([-0.5 - 1.0, -0.2 - 0.3])


def test_each_token_has_its_word(capitals):
    model, _, found = capitals
    own = [[], []]
    for token, word in zip(found.decoded.ids, found.decoded.token_words):
        own[word].append(token)
    assert [model.processor.decode_text(ids).strip() for ids in own] == ["hi", "yo"]


@pytest.fixture(scope="module")
def digits():
    model = tiny.with_reader("hi 18.", plain_text=True)
    n_best = [ReaderHypothesis([3, 4, 5, 6, 7, 8, 5, 3], [-1.0] * 8)]
    (found,) = hypotheses_of(model, model.processor, n_best)
    assert found.decoded.text == "hi 18. h"
    return found


def test_an_llm_that_never_saw_digits_does_not_judge_them(digits):
    is_number = [digits.decoded.words[word] == "18." for word in digits.decoded.token_words]
    assert digits.known.tolist() == [not number for number in is_number] and any(is_number)


def test_frames_that_cannot_spell_digits_get_a_wildcard(digits):
    assert digits.ctc_ids.count(ANYTHING) == 1
    assert len(digits.ctc_ids) == int(digits.known.sum()) + 1


def test_frames_spell_in_the_projectors_own_subwords():
    model = tiny.with_reader("Hi 18.")
    model.config.projector_merges = model.processor.projector_merges = 0
    (found,) = hypotheses_of(model, model.processor, [ReaderHypothesis([3, 4, 5, 6, 7, 8], [-1.0] * 6)])
    assert [model.processor.decode_text([token]) for token in found.ctc_ids[:-1]] == [" ", "h", "i"]
    assert found.ctc_ids[-1] == ANYTHING


@pytest.mark.parametrize("word", ["18.", "D-E-R-E-K.", "'A-B'", "é-à", "4th"])
def test_digits_and_spelt_words_are_judged_by_the_reader_alone(word):
    assert is_unjudged(word)


@pytest.mark.parametrize("word", ["Derek", "I", "well-known", "e-mail", "U.S.A.", "-", "x-"])
def test_other_words_are_judged_by_all(word):
    assert not is_unjudged(word)


def test_a_spelt_word_is_rewarded_for_its_length_once():
    """ "a-b" has three tokens; said twice it earns no more."""
    model = tiny.with_reader("a-b h", plain_text=True)
    spelt, gap, plain = [3, 4, 5], 6, [7]
    hypotheses = [
        hypotheses_of(model, model.processor, [ReaderHypothesis(ids, [-1.0] * len(ids))])[0]
        for ids in (spelt, [*spelt, gap, *spelt], plain)
    ]
    assert [found.decoded.text for found in hypotheses] == ["a-b", "a-b a-b", "h"]
    assert [found.unjudged_tokens for found in hypotheses] == [2, 2, 0]


@pytest.mark.parametrize("budget, text, ended", [(9, "Hi, yo", True), (3, "Hi,", False), (1, "H", False)])
def test_the_budget_counts_the_llms_tokens(budget, text, ended):
    model = tiny.with_reader(LETTERS)
    proposed = ReaderHypothesis([3, 4, 5, 6, 7, 8], [-1.0] * 6, end_logprob=-0.5)
    (found,) = hypotheses_of(model, model.processor, [proposed], budget)
    assert (found.decoded.text, found.decoded.ended) == (text, ended)
    assert len(found.decoded.ids) <= budget
    assert found.reader_logprob == (-6.5 if ended else -1.0 * budget)


def test_with_capitals_in_training_the_llm_scores_the_text_as_it_is():
    model = tiny.with_reader(LETTERS)
    (found,) = hypotheses_of(model, model.processor, [ReaderHypothesis([3, 4, 5], [-1.0] * 3)])
    assert model.processor.decode_text(found.decoded.ids) == "Hi," and found.known.all()


@pytest.mark.parametrize(
    "texts, kept",
    [
        (["hhhh", "h h h h h", "h"], [0, 2, 3]),
        (["h h h h h", "h h h h h h"], [0, 1, 2]),
        (["h hh hhh hhhh", "h hh hhh hhhh h hh hhh hhhh", "h hh h hh"], [0, 2, 3]),  # said twice
        (["h hh hhh hhhh h hh hhh hhhh", "h hh hhh hhhh"], [0, 1, 2]),
    ],
)
def test_loops_are_left_out_where_there_is_another_text(texts, kept):
    model = tiny.with_reader("h ")
    n_best = [ReaderHypothesis([3 if char == "h" else 4 for char in text], [-1.0] * len(text)) for text in texts]
    n_best.append(ReaderHypothesis([], []))
    found = hypotheses_of(model, model.processor, n_best)
    assert [text.decoded.text for text in found] == [[*texts, ""][number] for number in kept]


@pytest.mark.parametrize("distinct", [True, False])
def test_the_search_compares_texts_by_their_words_where_it_is_told_to(distinct):
    model, spellers = tiny.with_reader("Hé,", distinct_words=distinct), []
    model.reader.register_forward_pre_hook(lambda _, inputs: spellers.append(inputs[6]))
    model.transcribe(tiny.noise(0.7))
    assert [spell is not None for spell in spellers] == [distinct] * len(spellers) and spellers
    if distinct:
        assert [spellers[0](token) for token in (3, 4, 5)] == ["h", "é", ""]


# Scores of the LLM


# What hypotheses have in common with the first of their recording: nothing, a beginning, the whole of one of them.
FAMILIES = [[[5, 9, 11], [7], []], [[8, 8, 30, 31], [8, 8, 31], [8, 8], [8, 8, 30, 31, 9, 9]], [[], [6]]]
FAMILIES.append([[*range(10, 50)], [*range(10, 40), *range(4, 14)]])  # longer than the window of one LLM


@torch.no_grad()
@pytest.mark.parametrize("at_once", [6, 160])
@pytest.mark.parametrize("llm", ["qwen3", "gemma2"])
@pytest.mark.parametrize("llm_prompt", ["audio", "none"])
def test_the_llm_scores_texts_as_one_pass_over_each_does(monkeypatch, llm_prompt, llm, at_once):
    """With a prompt by LLM and LoRA, without one by the base LLM; in one batch or several, with a window or without."""
    monkeypatch.setattr(rescoring_voxlm, "TOKENS_AT_ONCE", at_once)
    model = tiny.with_reader(llm=llm, lora_config={}, llm_prompt=llm_prompt)
    base = copy.deepcopy(model.language_model)  # LoRA is the identity yet
    tiny.randomise_lora(model)
    _, prompt = request(model, *(tiny.noise(seconds, 2) for seconds in (1.4, 0.8, 1.0, 0.6)))
    rows = [[hypothesis(ids) for ids in texts] for texts in FAMILIES]
    score_hypotheses(model, prompt, rows)
    for row, texts in enumerate(rows):
        for text in texts:
            ids = text.decoded.ids
            if llm_prompt == "none":
                output = base(torch.tensor([[0, *ids]]), output_hidden_states=True)  # 0 begins a text
            else:
                output = forced(model, prompt, row, ids)
            logprobs = output.logits[0, -len(ids) - 1 :].log_softmax(-1)
            expected = logprobs[range(len(ids)), ids]
            torch.testing.assert_close(text.decoded.logprobs, expected, atol=1e-4, rtol=1e-4)
            entropies = -(logprobs.exp() * logprobs).sum(-1)[: len(ids)]
            torch.testing.assert_close(text.decoded.entropies, entropies, atol=1e-4, rtol=1e-4)
            assert text.end_logprob == pytest.approx(
                float(logprobs[-1, model.generation_config.eos_token_id]), abs=1e-4
            )
            states = output.hidden_states[-1][0, -len(ids) - 1 : -1]
            torch.testing.assert_close(text.decoded.states, states, atol=1e-4, rtol=0)


@torch.no_grad()
def test_prompts_and_common_beginnings_go_through_the_llm_once():
    model = tiny.with_reader()
    _, prompt = request(model, tiny.noise(1.4, 2), tiny.noise(0.8, 3))
    lengths = []
    model.register_forward_hook(lambda *call: lengths.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    score_hypotheses(model, prompt, [[hypothesis([5, 9, 9]), hypothesis([5, 9, 8, 3])], [hypothesis([4, 4, 4])]])
    assert lengths == [prompt["input_ids"].shape[1] + 3, 2]


@torch.no_grad()
def test_lora_learns_as_before_after_the_base_has_judged():
    model = tiny.with_reader(lora_config={}, llm_prompt="none")
    some = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in some)
    score_hypotheses(model, None, [[hypothesis([5])]])
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == some
    assert not any(layer.disable_adapters for _, layer in lora_layers(model))


@pytest.mark.parametrize("begins, ends, padding, expected", [(4, 5, 6, 4), (None, [7, 5], 6, 5), (None, None, 6, 6)])
def test_a_plain_language_model_begins_with_the_token_for_it_or_what_is_nearest(begins, ends, padding, expected):
    model = tiny.with_reader(llm_prompt="none")
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = begins, ends, padding
    assert beginning_of_text(model, [[], []])["input_ids"].tolist() == [[expected]] * 2


def test_a_plain_language_model_judges_cased_text_without_the_prefix_of_answers():
    model = tiny.with_reader("Hi, 18.", plain_text=True, llm_prompt="none")
    model.processor.text_prefix = " "
    (found,) = hypotheses_of(model, model.processor, [ReaderHypothesis([3, 4, 5, 6, 7, 8, 9], [-1.0] * 7)])
    assert model.processor.decode_text(found.decoded.ids) == "Hi, 18." and found.known.all()


def test_tokens_that_the_llm_cannot_judge_do_not_count():
    text = hypothesis([5, 6, 7], llm_logprobs=[-1.0, -50.0, -2.0], end_logprob=-0.5, known=[True, False, True])
    assert text.llm_logprob == pytest.approx(-3.5)


# Weighted scores


def totals(texts, monkeypatch=None, by_frames=None, log_odds=0.0, **settings):
    """Weighted scores, with CTC log-probabilities given by hand."""
    frames = None
    if by_frames is not None:

        class Frames:
            speech_log_odds = log_odds

        frames = Frames()
        monkeypatch.setattr(rescoring_voxlm, "text_logprobs", lambda *_: by_frames)
    return (evidence(texts, frames, None) @ weights_of({**READER_ALONE, **settings})).tolist()


def test_the_weighted_sum_by_hand():
    text = hypothesis([5, 6], -4.0, [-1.0, -2.0], end_logprob=-1.0, words=["a", "b", "c"])
    assert totals([text], llm_weight=0.5, word_bonus=1.5) == pytest.approx([-4.0 + 0.5 * -4.0 + 3 * 1.5])


def test_what_was_said_earns_no_bonus_again():
    said = ("go on", "go on, Go on", "go on, Go on go on")
    texts = [hypothesis([5], words=text.split(), llm_logprobs=[0.0]) for text in said]
    assert totals(texts, word_bonus=1.0) == pytest.approx([2.0, 4.0, 2.0])


def test_frames_have_their_weight(monkeypatch):
    texts = [hypothesis([5], -4.0, [0.0]), hypothesis([6], -5.0, [0.0])]
    assert totals(texts, monkeypatch, [-3.0, -1.0], ctc_weight=2.0) == pytest.approx([-10.0, -7.0])


def test_frames_count_at_most_ten_nats_for_each_token_of_the_longest_text(monkeypatch):
    """A text that the frames cannot spell at all is unlikely, not impossible."""
    texts = [hypothesis([5, 6], -1.0, [0.0, 0.0]), hypothesis([7], -1.0, [0.0])]
    assert totals(texts, monkeypatch, [-1e9, -3.0], ctc_weight=1.0) == pytest.approx([-21.0, -4.0])


@pytest.mark.parametrize(
    "by_frames, log_odds, possible",
    [
        ([-60.0, -10.0], 4.0, True),  # no text is what the frames prefer
        ([-60.0, -10.0], 40.0, False),  # they prefer it, but are sure of speech
        ([-10.0, -60.0], 4.0, False),  # they prefer the words
    ],
)
def test_frames_decide_whether_anything_was_said(monkeypatch, by_frames, log_odds, possible):
    texts = [hypothesis([5, 6], -20.0, [0.0, 0.0]), hypothesis([], -1.0, [])]
    _, empty = totals(texts, monkeypatch, by_frames, log_odds, ctc_weight=0.1)
    assert (empty > -np.inf) == possible


def test_without_frames_the_empty_text_is_one_of_many():
    _, empty = totals([hypothesis([5], -20.0, [0.0]), hypothesis([], -1.0, [])])
    assert empty == pytest.approx(-1.0)


# The whole


@torch.no_grad()
@pytest.mark.parametrize(
    "weights, score",
    [
        (READER_ALONE, lambda text: text.reader_logprob),
        ({**READER_ALONE, "llm_weight": 1e6}, lambda text: text.llm_logprob),
    ],
    ids=["reader", "LLM"],
)
def test_weights_decide_who_chooses(weights, score):
    model = tiny.with_reader()
    batch, prompt = request(model, tiny.noise(1.5, 4))
    (n_best,) = model.reader(batch.audio.last_hidden_state, batch.audio.frame_mask, [8])
    texts = hypotheses_of(model, model.processor, n_best)
    score_hypotheses(model, prompt, [texts])
    assert len({score(text) for text in texts}) > 1
    model.config.reader_config.update(weights)
    (chosen,) = rescore(model, model.processor, prompt, [8], batch)
    best = max(texts, key=score)
    assert (chosen.text, chosen.ids) == (best.decoded.text, best.decoded.ids)
    torch.testing.assert_close(chosen.logprobs, best.decoded.logprobs)


@pytest.fixture(scope="module")
def talkative():
    """A model that prefers many words, and the results for three clips in one batch."""
    model = tiny.with_reader(word_bonus=1e3)
    model.reader.decoder.embed_tokens.weight.data[tiny.READER_END] = 0  # the random end would be likelier than any word
    clips = [tiny.noise(seconds, 3) for seconds in (0.7, 2.0, 1.1)]
    results = model.transcribe(clips)
    assert all(result.text for result in results)
    return model, clips, results


def test_the_text_does_not_depend_on_the_batch(talkative):
    model, clips, results = talkative
    assert [model.transcribe(clip).text for clip in clips] == [result.text for result in results]


def test_the_text_does_not_depend_on_timestamps(talkative):
    model, clips, results = talkative
    plain = model.transcribe(clips, return_timestamps=False)
    assert [result.text for result in plain] == [result.text for result in results]


def test_words_are_those_of_the_text_in_order(talkative):
    for result in talkative[2]:
        assert " ".join(word["word"] for word in result.words).split() == result.text.split()
        times = [time for word in result.words for time in (word["start"], word["end"])]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= result.duration


def test_words_have_the_scores_of_both_models(talkative):
    for result in talkative[2]:
        assert all({"logprob", "entropy", "reader", "posterior"} == set(score) for score in result.word_scores)


def test_the_empty_text_is_one_of_the_hypotheses():
    (result,) = tiny.with_reader(word_bonus=-1e6).transcribe([tiny.noise(1.3, 5)])
    assert (result.text, result.words, result.truncated) == ("", [], False)


# Lists in doubt


def doubted(tokens, frames, empty=-9.0):
    first, nothing = hypothesis(list(range(tokens))), hypothesis([])
    nothing.reader_logprob = empty
    return in_doubt(SimpleNamespace(projector_merges=None), [first, nothing], frames)


@pytest.mark.parametrize(
    "tokens, frames, empty",
    [(2, 8, -9.0), (0, 4, -9.0), (8, 8, -2.2), (15, 5, -9.0), (7, 1, -9.0), (8, None, -2.2)],
    ids=["few tokens", "no token", "perhaps nothing", "said twice", "a loop", "perhaps nothing, no gate"],
)
def test_a_list_that_does_not_fit_the_frames_is_in_doubt(tokens, frames, empty):
    assert doubted(tokens, frames, empty)


@pytest.mark.parametrize(
    "tokens, frames, empty", [(8, 8, -9.0), (1, 2, -9.0), (1, 1, -3.0), (0, 0, -0.1), (1, None, -9.0)]
)
def test_a_list_that_fits_the_frames_is_not(tokens, frames, empty):
    assert not doubted(tokens, frames, empty)


def test_what_is_in_doubt_is_decoded_again_with_a_second_of_silence_behind(monkeypatch):
    """Row by row, so that the text of a segment does not depend on its batch."""
    model = tiny.with_reader()
    clips = [tiny.noise(1.4, 2), tiny.noise(0.8, 3), tiny.noise(1.1, 4)]
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: False)
    expected = [model.transcribe(clip)["segments"][0] for clip in clips]
    doubts = iter([True, False, True])
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: next(doubts))
    lengths = []
    model.reader.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[1].sum(1).tolist()))
    segments = [result.segments[0] for result in model.transcribe(clips, batch_size=3)]
    order = np.argsort([len(clip) for clip in clips])  # batches are sorted by length
    (first, again) = lengths
    assert first == sorted(first) and again == [first[0] + 50, first[2] + 50]
    assert [segments[row]["fallback"] for row in order] == ["window", None, "window"]
    assert segments[order[1]] == expected[order[1]]


def test_only_short_audio_is_decoded_again(monkeypatch):
    model = tiny.with_reader()
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: True)
    results = model.transcribe([tiny.noise(seconds, 3) for seconds in (9.9, 10.1)])
    assert [result.segments[0]["fallback"] for result in results] == ["window", None]


def test_with_a_callers_budget_nothing_is_decoded_twice(monkeypatch):
    model = tiny.with_reader()
    monkeypatch.setattr(rescoring_voxlm, "in_doubt", lambda *_: True)
    (segment,) = model.transcribe(tiny.noise(1.0, 3), max_new_tokens=4).segments
    assert segment["fallback"] is None
