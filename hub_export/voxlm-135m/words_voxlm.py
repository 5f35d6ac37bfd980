"""Words: token ids to words and back, plain spellings, and matching two sequences of words."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers.decoders import DecodeStream


try:  # only training on word times needs it (extra `train`)
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist
except ImportError:
    cdist = None


# Unicode names of the scripts that are written without spaces between words begin with these.
NO_SPACE_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
# Longest phrase, in words, that is looked for in loops. Chosen by hand.
LOOP_WORDS = 8
# So many words in a row that were said before are a repetition, wherever it was. Chosen by hand.
REPEATED_WORDS = 4
# More characters without a space than this are a text in a script without spaces. Chosen by hand.
LONGEST_WORD = 30
# Costs of `match_words`: a substitution costs at most this, by how differently the words are spelt, and a word on one
# side only costs GAP. Chosen by hand so that two unlike words are matched rather than both left out (1.2 < 2 x 0.7).
SUBSTITUTION, GAP = 1.2, 0.7
# Costs of matching two texts of a recording word by word: another word in the same place, a word on one side only. Chosen by
# hand so that two unlike words are matched rather than both left out.
OTHER_WORD, EXTRA_WORD = 1.0, 0.7


@dataclass
class Word:
    """A word of a decoded text and the positions of its tokens in the ids that it was decoded from."""

    text: str
    tokens: list[int]


def decode_tokens(tokenizer, token_ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens and with white space as it is."""
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def split_words(tokenizer, token_ids: Sequence[int], special_ids: set[int]) -> list[Word]:
    """
    Split token ids into words.

    Words end at white space. In scripts without spaces (Chinese, Japanese, Thai, ...) they end where a token ends.
    Punctuation belongs to the word before it. A character that several tokens spell together stays whole. The cost
    grows linearly with the number of tokens.

    Args:
        tokenizer ([`PreTrainedTokenizerFast`])
        token_ids (`Sequence[int]`)
        special_ids (`set[int]`): tokens that belong to no word.

    Returns:
        `list[Word]`, in order.
    """
    words: list[Word] = []
    open_word = False
    for text, tokens in _decoded_units(tokenizer, token_ids, special_ids):
        for run in _split_keeping_spaces(text):
            if run.isspace():
                open_word = False
                continue
            if open_word and not _starts_new_word(words[-1].text, run):
                words[-1].text += run
                words[-1].tokens.extend(position for position in tokens if position > words[-1].tokens[-1])
            else:
                words.append(Word(run, list(tokens)))
                open_word = True
            tokens = tokens[-1:]  # the tokens of a unit spell its first run, the last of them the rest
    return words


def _decoded_units(tokenizer, token_ids, special_ids: set[int]) -> list[tuple[str, list[int]]]:
    """The shortest runs of tokens that decode to whole characters, as text and token positions."""
    kept = [(position, int(token)) for position, token in enumerate(token_ids) if int(token) not in special_ids]
    ids = [token for _, token in kept]
    text, ends, length = decode_tokens(tokenizer, ids), [], 0
    try:
        stream = DecodeStream(skip_special_tokens=True)
        for token in ids:
            length += len(stream.step(tokenizer.backend_tokenizer, token) or "")
            ends.append(length)
    except Exception as error:  # tokenizers has no class of its own for it
        if "prefix" not in str(error):
            raise
        # Decoders with byte fallback (Llama 2, Gemma) change what they decoded before when an invalid byte follows it.
        ends = _ends_of_prefixes(tokenizer, ids, text)
    units, waiting, start = [], [], 0
    for (position, _), end in zip(kept, [*ends[:-1], len(text)]):
        waiting.append(position)
        if end > start:
            units.append((text[start:end], waiting))
            waiting, start = [], end
    return units


def _ends_of_prefixes(tokenizer, ids: list[int], text: str) -> list[int]:
    """How many characters of `text`, which `ids` decode to, each prefix of `ids` completes, at quadratic cost."""
    ends = [0]
    for count in range(1, len(ids) + 1):
        prefix = decode_tokens(tokenizer, ids[:count])
        ends.append(max(ends[-1], len(prefix)) if text.startswith(prefix) else ends[-1])
    return ends[1:]


def encode_words(
    tokenizer, text: str, words: list[str], spellings: list[str], prefix: str = ""
) -> tuple[list[int], np.ndarray]:
    """
    Tokenize a text with each of its words respelt.

    Args:
        tokenizer ([`PreTrainedTokenizerFast`])
        text (`str`): contains `words` in order. Between them only white space is kept.
        words (`list[str]`)
        spellings (`list[str]`): what to write for each word.
        prefix (`str`): what the answer to a prompt starts with.

    Returns:
        token ids, and `(tokens,)` the index of the word that each token belongs to.
    """
    if not words:
        return [], np.zeros(0, dtype=int)
    answer, ends, position = prefix, [], 0
    for word, spelling in zip(words, spellings):
        place = text.index(word, position)
        answer += "".join(char for char in text[position:place] if char.isspace()) + spelling
        ends.append(len(answer))
        position = place + len(word)
    encoded = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    # A token belongs to the word that contains its last character; a token of white space to the word after it.
    indices = np.searchsorted(ends, [max(end, 1) for _, end in encoded["offset_mapping"]])
    return encoded["input_ids"], np.minimum(indices, len(words) - 1)


def word_indices(words: list[Word], num_tokens: int) -> np.ndarray:
    """`(num_tokens,)` the index of the word that each token belongs to, -1 for tokens that belong to none."""
    indices = np.full(num_tokens, -1)
    for number, word in enumerate(words):
        indices[word.tokens] = number
    return indices


def plain_words(words: list[str]) -> list[str]:
    """
    Words as a model without capitals and punctuation writes them: lower case, no hyphens, no punctuation or symbols at
    either end. Words that consist of nothing else stay as they are.
    """
    plain = []
    for word in words:
        kept = [index for index, char in enumerate(word) if unicodedata.category(char)[0] not in "PS"]
        bare = word[kept[0] : kept[-1] + 1].lower() if kept else word
        plain.append(bare.replace("-", " ").replace("’", "'") if kept else word)
    return plain


def loop_units(words: list[str]) -> list[str]:
    """What may come again and again: words without capitals and punctuation, or the characters of scripts without spaces."""
    return [unit for word in plain_words(words) for unit in (word if len(word) > LONGEST_WORD else [word])]


def longest_loop(words: list[str]) -> int:
    """How often in a row a phrase of one to `LOOP_WORDS` words comes at most."""
    most = 1
    for length in range(1, min(LOOP_WORDS, len(words) // 2) + 1):
        same = 0
        for first in range(len(words) - length):
            same = same + 1 if words[first] == words[first + length] else 0
            most = max(most, same // length + 1)
    return most


def novel_words(words: list[str]) -> int:
    """How many words are neither in a phrase that was just said twice, nor in a run of `REPEATED_WORDS` that came before."""
    repeated: set[int] = set()
    for distance in range(1, len(words)):
        same = 0
        for place in range(distance, len(words)):
            same = same + 1 if words[place] == words[place - distance] else 0
            if same >= REPEATED_WORDS:
                repeated.update(range(place + 1 - same, place + 1))
            elif same >= 2 * distance:
                repeated.update(range(place + 1 - distance, place + 1))
    return len(words) - len(repeated)


def join_texts(texts: list[str]) -> str:
    """Concatenate texts, with a space between them unless both sides are in a script without spaces."""
    whole = ""
    for text in texts:
        if whole and text and not (has_no_spaces(whole[-1]) and has_no_spaces(text[0])):
            whole += " "
        whole += text
    return whole


def match_in_order(costs: Callable[[int], np.ndarray], rows: int, columns: int, gap: float) -> list[tuple[int, int]]:
    """
    Match two sequences in order at the lowest cost (Needleman and Wunsch 1970).

    Args:
        costs: function of a row's index that returns `(columns,)` costs of matching the row with each column.
        rows (`int`), columns (`int`): lengths of the sequences.
        gap (`float`): cost of leaving an item unmatched.

    Returns:
        matched pairs of row and column, in order.
    """
    skipped = gap * np.arange(columns + 1)
    total = skipped.copy()
    # 0: row and column are matched, 1: the row is skipped, 2: the column is skipped.
    steps = np.full((rows + 1, columns + 1), 2, dtype=np.int8)
    for row in range(1, rows + 1):
        above, both = total + gap, total[:-1] + costs(row - 1)
        best = above.copy()
        best[1:] = np.minimum(both, above[1:])
        # Skipped columns accumulate along the row; with their cost subtracted first, a running minimum remains.
        total = np.minimum.accumulate(best - skipped) + skipped
        steps[row, 0] = 1
        steps[row, 1:] = np.where(total[1:] < best[1:] - 1e-9, 2, both > above[1:] + 1e-9)
    pairs, row, column = [], rows, columns
    while row and column:
        step = int(steps[row, column])
        if step == 0:
            pairs.append((row - 1, column - 1))
        row, column = row - (step != 2), column - (step != 1)
    return pairs[::-1]


def match_words(reference: list[str], words: list[str]) -> list[int | None]:
    """
    For each of `words` the index of the word of `reference` that it stands for, or `None`, by edit-distance alignment.

    Raises:
        ImportError: without rapidfuzz, which computes how differently two words are spelt.
    """
    if cdist is None:
        raise ImportError("Matching word times to a transcript needs rapidfuzz: pip install rapidfuzz")
    spelling = SUBSTITUTION * cdist(reference, words, scorer=Levenshtein.normalized_distance, dtype=np.float64)
    places: list[int | None] = [None] * len(words)
    for row, column in match_in_order(spelling.__getitem__, len(reference), len(words), GAP):
        places[column] = row
    return places


def _split_keeping_spaces(text: str) -> list[str]:
    """Runs of white space and runs of anything else, in order."""
    runs: list[str] = []
    for char in text:
        if runs and runs[-1][-1].isspace() == char.isspace():
            runs[-1] += char
        else:
            runs.append(char)
    return runs


def _starts_new_word(word: str, run: str) -> bool:
    """Whether `run`, which follows `word` without a space, is a word of its own: only in scripts without spaces."""
    first = run[0]
    if unicodedata.category(first)[0] in "PM":
        return False
    return has_no_spaces(first) or has_no_spaces(word[-1])


def has_no_spaces(char: str) -> bool:
    """Whether a character belongs to a script without spaces between words."""
    return unicodedata.name(char, "").startswith(NO_SPACE_SCRIPTS)
