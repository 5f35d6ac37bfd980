"""Hotwords: the reader's own tokens for texts, the tree of hotwords, and searches with them."""

import random
import re

import pytest
import torch

from tests import tiny
from tests.tiny import READER_END
from voxlm_hf import biasing_voxlm
from voxlm_hf.biasing_voxlm import KEPT_BONUS, BiasState, Hotwords, ReaderVocabulary, most_like
from voxlm_hf.reader_voxlm import BeamSearch, ReaderHypothesis, token_table, with_hotword_texts


@pytest.fixture(scope="module")
def vocabulary():
    """The tiny tokenizer as that of a reader, spelt in itself."""
    tokens = tiny.tokenizer()
    return ReaderVocabulary(*token_table(tokens, tokens, []), tokens)


@pytest.mark.parametrize(
    "text", [" the quick brown fox", "stew for dinner", " naïve café, 你好 世界 สวัสดี", "no-one's  two\nlines 1987", ""]
)
def test_texts_have_the_tokens_that_the_readers_tokenizer_gives_them(vocabulary, text):
    assert vocabulary.encode(text) == tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", ["</s>", " a <s> in it", "<|audio|>"])
def test_special_tokens_in_a_text_are_letters(vocabulary, text):
    ids = vocabulary.encode(text)
    assert not set(ids) & {0, 1, 2, 3} and tiny.tokenizer().decode(ids) == text


def test_a_long_run_of_letters_is_tokenized_in_time_that_grows_with_its_length(vocabulary):
    assert tiny.tokenizer().decode(vocabulary.encode("x" * 20_000)) == "x" * 20_000


SENTENCES = [
    " the quick brown fox jumps over the lazy dog",
    " The Quick brown, fox-trot foxes",
    " café cafés",
    "fox",
    " the lazy dogged (lazy dog)",
    " brown fox brown fox brown fox",
]


@pytest.mark.parametrize("text", SENTENCES)
def test_a_text_has_the_hotwords_that_it_has_as_whole_words(vocabulary, text):
    words = ["fox", "lazy dog", "café", "quick"]
    found = Hotwords(words, vocabulary).found_in(vocabulary.encode(text))
    for number, word in enumerate(words):
        times = len(re.findall(rf"(?<!\w){word}(?!\w)", text.lower()))
        assert found.count(number) == min(times, 1)  # a loop would earn the bonus again and again


@pytest.mark.parametrize(
    "words, text, found",
    [
        (["世界"], " 你好世界你好", ["世界"]),
        (["สวัสดี"], "สวัสดีสวัสดี", ["สวัสดี"]),
        (["lazy", "lazy dog"], " the lazy dog", ["lazy dog"]),
        (["lazy", "lazy dog"], " the lazy fox", ["lazy"]),
        (["O'Brien"], " O'Brien's", ["O'Brien"]),
    ],
)
def test_hotwords_of_other_scripts_within_others_and_with_apostrophes(vocabulary, words, text, found):
    tree = Hotwords(words, vocabulary)
    assert [words[number] for number in tree.found_in(vocabulary.encode(text))] == found


def test_another_tokenization_of_a_hotword_is_found_too(vocabulary):
    letters = [vocabulary.ranks[letter.encode()] for letter in " café"[:-1]] + vocabulary.encode("é")
    tree = Hotwords(["café"], vocabulary)
    assert tree.found_in(letters) == (0,)
    assert tree.bonus(BiasState(found=(0,))) == KEPT_BONUS


def test_each_change_of_the_bonus_is_that_of_the_state_it_leads_to(vocabulary):
    tree, generator = Hotwords(["fox", "lazy dog", "lazy", "世界", "the quick"], vocabulary), random.Random(0)
    text = vocabulary.encode(" the quick lazy dog, lazy fox 世界 the lazy")
    state = BiasState()
    for token in [*text, *generator.choices(range(4, 300), k=20)]:
        changes = tree.changes(state)
        for other in [token, *generator.choices(range(4, 300), k=20), *tree.followers(state.node)]:
            after = tree.advance(state, other)
            assert float(changes[other]) == pytest.approx(tree.bonus(after) - tree.bonus(state))
        state = tree.advance(state, token)


def test_what_is_not_completed_earns_nothing(vocabulary):
    tree, state = Hotwords(["lazy dog"], vocabulary), BiasState()
    earned = []
    for token in vocabulary.encode(" the lazy fox"):
        state = tree.advance(state, token)
        earned.append(tree.bonus(state))
    assert max(earned) > 0 and earned[-1] == 0


def search(vocabulary, words: list[str], likely: dict[str, float]):
    """The n-best list of searches in which texts have these log-probabilities, token by token alike."""
    tree = Hotwords(words, vocabulary)
    plain, biased = (search_with(vocabulary, hotwords, likely) for hotwords in (None, tree))
    return with_hotword_texts(plain, biased, tree, 20.0)


def search_with(vocabulary, hotwords: Hotwords | None, likely: dict[str, float]):
    texts = [(vocabulary.encode(text), logprob) for text, logprob in likely.items()]
    found = BeamSearch(2, 20, hotwords=hotwords)
    while found.open:
        logprobs = torch.full((len(found.open), len(vocabulary.bytes)), -50.0)
        for row, hypothesis in enumerate(found.open):
            length = len(hypothesis.ids)
            for ids, logprob in texts:
                if ids[:length] == hypothesis.ids:
                    following = ids[length] if length < len(ids) else READER_END
                    logprobs[row, following] = max(float(logprobs[row, following]), logprob / (len(ids) + 1))
        found.advance(logprobs, READER_END)
    return found.n_best()


LIKELY = {" the quick fax": -1.0, " the quick box": -1.5, " the thick fix": -2.0, " the quick fox": -9.0}


def test_a_hotword_is_proposed_that_is_too_unlikely_without(vocabulary):
    plain, texts = search(vocabulary, ["zebra"], LIKELY), search(vocabulary, ["fox"], LIKELY)
    spelt = tiny.tokenizer().decode
    assert " the quick fox" not in [spelt(text.ids) for text in plain]
    (hot,) = [text for text in texts if spelt(text.ids) == " the quick fox"]
    assert hot.bonus == KEPT_BONUS
    assert hot.logprob - 20.0 < plain[0].logprob - 2


def test_wrong_hotwords_leave_the_list_as_it_is(vocabulary):
    plain = search(vocabulary, ["zebra"], LIKELY)
    wrong = search(vocabulary, ["zebra", "thaw", "quills", "foxglove", "boxes", "theatre"], LIKELY)
    assert [(text.ids, text.logprob, text.bonus) for text in wrong] == [(text.ids, text.logprob, 0.0) for text in plain]


@pytest.mark.parametrize(
    "word, text",
    [
        ("Szymborska", " He read the poems of Shimborska."),
        ("Ouagadougou", " It was signed in Waga Dugu by seven."),
        ("Janáček", "The opera by Yanacek was"),
        ("世界", "你好世界"),
    ],
)
def test_the_hotwords_spelt_most_like_a_text_come_first(word, text):
    words = ["Thornwhistle", "Kubernetes", word, "amlodipine", "Reykjavik", "tulip"]
    assert most_like(words, text, 3)[0] == word and sorted(most_like(words, text, 9)) == sorted(words)


def test_the_likeness_is_the_edit_distance_to_the_closest_part():
    """One of 4 letters is wrong in "stew", one of 6 in "turnip"; nothing is there for "zzz"."""
    assert most_like(["zzz", "stew", "turnip"], "the stow and turnop", 3) == ["turnip", "stew", "zzz"]


def test_log_probabilities_behind_another_prompt_are_shifted_to_those_of_the_first(vocabulary):
    tree = Hotwords(["fox"], vocabulary)
    plain, biased = (search_with(vocabulary, hotwords, LIKELY) for hotwords in (None, tree))
    hot = [with_hotword_texts(plain, biased, tree, lost)[-2].logprob for lost in (20.0, 23.0)]
    assert hot[1] == pytest.approx(hot[0] + 3.0)
    assert len(with_hotword_texts(plain, biased, tree, 0.0)) == len(
        plain
    )  # heard less likely than without, even with its bonus


# In a reader


@torch.no_grad()
def test_prompts_of_unlike_length_are_each_searched_as_if_alone():
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9, 5, 7)
    prompts = [[1], [4, 9, 7, 1], [5, 1]]
    together = reader(states, mask, [6, 3, 4], prompts=prompts)
    for row, budget in enumerate((6, 3, 4)):
        length = int(mask[row].sum())
        one = states[row : row + 1, :length], mask[row : row + 1, :length]
        (alone,) = reader(*one, [budget], prompts=[prompts[row]])
        assert [text.ids for text in alone] == [text.ids for text in together[row]]
        for text in alone[:-1]:
            ids = torch.tensor([[*prompts[row], *text.ids]])
            logprobs = reader.teacher_force(*one, ids).log_softmax(-1)[0, len(prompts[row]) - 1 :]
            expected = [float(logprobs[place, token]) for place, token in enumerate(text.ids)]
            assert text.logprobs == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_a_search_for_hotwords_begins_behind_its_own_prompt(monkeypatch):
    """The shift is what the best text without hotwords gains or loses by the prompt, as the decoder scores it."""
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9)
    monkeypatch.setattr(biasing_voxlm, "KEPT_BONUS", 50.0)  # so that they win
    words = reader.vocabulary(tiny.tokenizer())
    found = []

    def sought(heard):
        found.append(heard)
        return Hotwords([words.decode([token]).strip() for token in (7, 9) if words.decode([token]).strip()], words), [
            4,
            9,
            7,
            1,
        ]

    plain, (n_best,) = reader(states, mask, [5])[0], reader(states, mask, [5], hotwords=[sought])
    assert found == [plain[0].ids]
    assert [text.ids for text in n_best[: len(plain) - 1]] == [text.ids for text in plain[:-1]]
    hot = [text for text in n_best if text.shift]
    assert hot and all(text.hotwords for text in hot)
    for text, prompt in ((plain[0], [1]), (plain[0], [4, 9, 7, 1]), (hot[0], [4, 9, 7, 1])):
        answer = [*text.ids, *([READER_END] if text.ended else [])]
        logprobs = reader.teacher_force(states, mask, torch.tensor([[*prompt, *answer]])).log_softmax(-1)[0]
        found.append(sum(float(logprobs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer)))
    assert hot[0].logprob == pytest.approx(found[3] + found[1] - found[2], abs=1e-3)


@torch.no_grad()
def test_a_long_text_is_compared_as_far_as_it_fits_behind_the_prompt():
    reader, (states, mask) = tiny.with_reader().reader, tiny.encoder_states(9)
    room, prompt = len(reader.decoder.embed_positions.weight), [4] * 50 + [1]
    text = ReaderHypothesis([5, 6] * (room // 2 - 1), [-0.5] * (room - 2), ended=False)
    cross, shown = reader._cross_attention_inputs(states, mask, reader.end)
    fits = text.ids[: room - len(prompt)]
    logprobs = reader.teacher_force(states, mask, torch.tensor([[*prompt, *fits]])).log_softmax(-1)[
        0, len(prompt) - 1 :
    ]
    behind = sum(float(logprobs[place, token]) for place, token in enumerate(fits))
    assert reader._lost_by(prompt, text, cross, shown) == pytest.approx(-0.5 * len(fits) - behind, rel=1e-4)
