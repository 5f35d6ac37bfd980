"""Words: token ids to words and back, plain spellings, matching two sequences of words."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from voxlm_hf import words_voxlm
from voxlm_hf.words_voxlm import (
    encode_words,
    join_texts,
    match_in_order,
    match_words,
    novel_words,
    plain_words,
    split_words,
    word_indices,
)


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like Gemma's: spaces are part of subwords, unknown characters are spelt byte by byte."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(tiny.TEXTS[:2], trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    # The trainer takes the bytes for special tokens, which they are not.
    state = backend.to_str().replace('"special":true', '"special":false')
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state), eos_token="</s>")


TOKENIZERS = {"bytes": tiny.tokenizer(), "byte fallback": byte_fallback_tokenizer()}


@pytest.fixture(params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.fixture
def tokenizer():
    return tiny.tokenizer()


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def words_of(tokenizer, ids):
    return split_words(tokenizer, ids, set(tokenizer.all_special_ids))


def without_spaces(text):
    return "".join(text.split())


# Splitting


@pytest.mark.parametrize(
    "text, expected",
    [
        ("he hoped there would", ["he", "hoped", "there", "would"]),
        (" leading and  double spaces ", ["leading", "and", "double", "spaces"]),
        ("naïve café", ["naïve", "café"]),
        ("it's well-known, isn't it?", ["it's", "well-known,", "isn't", "it?"]),
        ("new\nlines\tand tabs", ["new", "lines", "and", "tabs"]),
        ("👩‍🚀 spoke", ["👩‍🚀", "spoke"]),
        ("Привет мир", ["Привет", "мир"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("", []),
        ("   ", []),
        ("1,000.5 $3", ["1,000.5", "$3"]),
    ],
)
def test_words_end_at_white_space(any_tokenizer, text, expected):
    assert [word.text for word in words_of(any_tokenizer, ids_of(any_tokenizer, text))] == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("你好，世界。", ["你", "好，", "世", "界。"]),
        ("我有3个apple。", ["我", "有", "3", "个", "apple。"]),
        ("これは", ["こ", "れ", "は"]),
    ],
)
def test_in_scripts_without_spaces_words_end_where_a_token_ends(text, expected):
    """Every character of these texts takes tokens of its own."""
    tokenizer = TOKENIZERS["byte fallback"]
    assert [word.text for word in words_of(tokenizer, ids_of(tokenizer, text))] == expected


@pytest.mark.parametrize("text", ["你好，世界。", "これはペンです", "สวัสดี", "我有3个apple。"])
def test_no_character_is_lost_in_scripts_without_spaces(any_tokenizer, text):
    words = words_of(any_tokenizer, ids_of(any_tokenizer, text))
    assert "".join(word.text for word in words) == text
    assert len(words) > 1 and not any(word.text[0] in "，。" for word in words)


@pytest.mark.parametrize("text", ["the quick brown fox", "naïve café, 你好 世界", "👩‍🚀 spoke"])
def test_the_tokens_of_words_are_those_of_the_text_but_for_white_space(any_tokenizer, text):
    ids = ids_of(any_tokenizer, text)
    used = {position for word in words_of(any_tokenizer, ids) for position in word.tokens}
    left_over = [any_tokenizer.decode([ids[position]]) for position in range(len(ids)) if position not in used]
    assert not "".join(left_over).strip()


def test_a_stray_byte_behind_a_character(any_tokenizer):
    """With byte fallback it breaks the characters before it as well: a run of bytes is either text or not."""
    ids = [*ids_of(any_tokenizer, "the 你"), ids_of(any_tokenizer, "你")[-3], *ids_of(any_tokenizer, " fox")]
    words = words_of(any_tokenizer, ids)
    assert "".join(word.text for word in words) == without_spaces(any_tokenizer.decode(ids))
    assert (words[0].text, words[-1].text[-3:]) == ("the", "fox")


@pytest.mark.parametrize("seed", range(8))
def test_words_are_those_of_the_decoded_text_for_any_tokens(any_tokenizer, seed):
    """Random tokens, among them halves of characters and special tokens, against the tokenizer's own decoder."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, len(any_tokenizer), size=60).tolist()
    words = words_of(any_tokenizer, ids)
    kept = [token for token in ids if token not in any_tokenizer.all_special_ids]
    decoded = any_tokenizer.decode(kept, clean_up_tokenization_spaces=False)
    assert "".join(word.text for word in words) == without_spaces(decoded)
    positions = [position for word in words for position in word.tokens]
    assert set(positions) <= set(range(len(ids))) and all(word.tokens == sorted(word.tokens) for word in words)


def test_special_tokens_are_no_words(tokenizer):
    audio = tokenizer.convert_tokens_to_ids("<|audio|>")
    fox = ids_of(tokenizer, " the fox")
    words = words_of(tokenizer, [0, *fox, audio, 2, 1])
    assert [word.text for word in words] == ["the", "fox"]
    assert [position for word in words for position in word.tokens] == list(range(1, 1 + len(fox)))


def test_a_special_token_inside_a_word_does_not_end_it(tokenizer):
    first, *rest = ids_of(tokenizer, "hoz")
    words = words_of(tokenizer, [first, tokenizer.pad_token_id, *rest])
    assert [(word.text, word.tokens) for word in words] == [("hoz", [0, *range(2, 2 + len(rest))])]


def test_a_text_that_ends_inside_a_character_keeps_its_words(tokenizer):
    ids = ids_of(tokenizer, "the 你")[:-1]
    words = words_of(tokenizer, ids)
    assert words[0].text == "the"
    assert "".join(word.text for word in words) == without_spaces(tokenizer.decode(ids))
    assert words[-1].tokens[-1] == len(ids) - 1


class CountingStream:
    """Stands for `tokenizers.decoders.DecodeStream` and counts the tokens that it is given."""

    tokens = 0
    made = words_voxlm.DecodeStream

    def __init__(self, **options):
        self.stream = self.made(**options)

    def step(self, backend, token):
        CountingStream.tokens += 1
        return self.stream.step(backend, token)


def tokens_decoded(monkeypatch, tokenizer, ids) -> int:
    """How many tokens `split_words` hands to a decoder."""
    CountingStream.tokens = counted = 0
    decode = tokenizer.decode

    def counting(token_ids, **options):
        nonlocal counted
        counted += len(token_ids)
        return decode(token_ids, **options)

    with monkeypatch.context() as patch:
        patch.setattr(words_voxlm, "DecodeStream", CountingStream)
        patch.setattr(tokenizer, "decode", counting)
        words_of(tokenizer, ids)
    return CountingStream.tokens + counted


@pytest.mark.parametrize("text", ["the quick brown fox ", "你好世界", "e"], ids=["words", "no spaces", "one word"])
@pytest.mark.parametrize("ends_inside_a_character", [False, True])
def test_each_token_is_decoded_at_most_twice_however_long_the_text(
    monkeypatch, tokenizer, text, ends_inside_a_character
):
    half = ids_of(tokenizer, "你")[:1] if ends_inside_a_character else []
    long = ids_of(tokenizer, text * 4000)
    for length in (500, 4000):
        ids = long[: length - len(half)] + half
        assert length <= tokens_decoded(monkeypatch, tokenizer, ids) <= 2 * length


# Encoding


def test_words_are_encoded_as_they_are_respelt(tokenizer):
    ids, token_words = encode_words(tokenizer, "Hello,  World", ["Hello,", "World"], ["hello", "world"], prefix=" ")
    assert tokenizer.decode(ids) == " hello  world"
    for word, expected in enumerate(["hello", "world"]):
        own = [token for token, owner in zip(ids, token_words) if owner == word]
        assert tokenizer.decode(own).strip() == expected


def test_a_text_without_words_has_no_tokens(tokenizer):
    ids, token_words = encode_words(tokenizer, "", [], [])
    assert ids == [] and token_words.shape == (0,)


def test_encoding_and_splitting_agree_on_which_token_belongs_to_which_word(tokenizer):
    ids = ids_of(tokenizer, "the lazy dog, naïve")
    words = words_of(tokenizer, ids)
    surface = [word.text for word in words]
    again, token_words = encode_words(tokenizer, "the lazy dog, naïve", surface, surface)
    assert again == ids
    owners = word_indices(words, len(ids))
    assert [owner for owner in owners if owner >= 0] == [owner for owner, own in zip(token_words, owners) if own >= 0]


def test_word_indices_mark_tokens_of_no_word():
    words = [words_voxlm.Word("a", [1, 2]), words_voxlm.Word("b", [4])]
    assert word_indices(words, 6).tolist() == [-1, 0, 0, -1, 1, -1]


# Spelling and joining


@pytest.mark.parametrize(
    "word, plain",
    [
        ("Hello,", "hello"),
        ("O'Neill's", "o'neill's"),
        ("O’Neill", "o'neill"),
        ("“Yes”", "yes"),
        ("well-known", "well known"),
        ("...", "..."),
        ("3.50$", "3.50"),
        ("ÄRGER!", "ärger"),
    ],
)
def test_plain_words(word, plain):
    assert plain_words([word]) == [plain]


@pytest.mark.parametrize(
    "texts, whole",
    [
        (["the fox", "jumps"], "the fox jumps"),
        (["你好", "世界"], "你好世界"),
        (["你好", "world"], "你好 world"),
        (["", "a", "", "b"], "a b"),
        ([], ""),
    ],
)
def test_texts_are_joined_with_spaces_where_the_script_has_them(texts, whole):
    assert join_texts(texts) == whole


# Matching


def cheapest(costs, gap):
    """The lowest cost of matching in order, by the textbook recursion."""
    rows, columns = costs.shape
    best = {(row, column): gap * (row + column) for row in range(rows + 1) for column in range(columns + 1)}
    for row in range(1, rows + 1):
        for column in range(1, columns + 1):
            ways = best[row - 1, column - 1] + costs[row - 1, column - 1], best[row - 1, column] + gap
            best[row, column] = min(*ways, best[row, column - 1] + gap)
    return best[rows, columns]


@pytest.mark.parametrize("seed", range(50))
def test_sequences_are_matched_as_cheaply_as_possible(seed):
    generator = np.random.default_rng(seed)
    costs = generator.integers(0, 4, size=generator.integers(0, 8, size=2)) / 2
    pairs = match_in_order(costs.__getitem__, *costs.shape, gap=0.7)
    assert all(one[0] < two[0] and one[1] < two[1] for one, two in zip(pairs, pairs[1:]))
    skipped = costs.shape[0] + costs.shape[1] - 2 * len(pairs)
    assert sum(costs[pair] for pair in pairs) + 0.7 * skipped == pytest.approx(cheapest(costs, 0.7))


@pytest.mark.parametrize(
    "reference, words, places",
    [
        ("the quick fox", "the quick fox", [0, 1, 2]),
        ("the quick fox", "the fox", [0, 2]),
        ("the fox", "the quick fox", [0, None, 1]),
        ("the quick fox", "the quik fox", [0, 1, 2]),
        ("the fox", "the dog", [0, 1]),  # another word in the same place
        ("", "the fox", [None, None]),
    ],
)
def test_words_are_matched_by_their_spelling(reference, words, places):
    assert match_words(reference.split(), words.split()) == places


def test_rapidfuzz_is_asked_for_by_name(monkeypatch):
    monkeypatch.setattr(words_voxlm, "cdist", None)
    with pytest.raises(ImportError, match="pip install rapidfuzz"):
        match_words(["a"], ["a"])


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("a b c", 3),
        ("a a a a", 1),
        ("a b a b a b", 2),
        ("a b a", 3),
        ("x a b c a b c y", 5),
        ("a a b a a b", 2),
        ("a b c d e f g h i j a b c d e f g h i j", 10),
        ("a b c d e f b c d e g", 7),
        ("a b c d e b c d f", 9),
    ],
)
def test_words_that_repeat_others_are_not_novel(text, count):
    assert novel_words(text.split()) == count
