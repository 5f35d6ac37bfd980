"""
Hotwords: words to expect, and the bonus that they give to the reader's hypotheses while these grow.

They are sought in a second search of the reader, in whose prompt they are, as many as fit into a quarter of its context. Shallow
fusion on a prefix tree, as the context graphs of k2 and NeMo do it: each token that continues a hotword earns a bonus
at once, so that a rare word survives its unlikely beginning, and it is taken back where the hotword is not completed. The tree
is over bytes and not over tokens: however the reader spells a hotword, it is found, and the bonus is the same.
"""

import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel

from .words_voxlm import has_no_spaces


# Bonus in nats for beginning a hotword and for each byte of it, until it is complete, and what a complete one keeps. Chosen by
# hand on nine sentences by synthetic voices and nine of real speech: behind a prompt with the hotwords right ones are about as likely
# as what is heard without them, or likelier. With much more for each, lists of wrong ones win.
START_BONUS, BYTE_BONUS, KEPT_BONUS = 1.0, 0.5, 0.5
# Longer runs of letters are tokenized piece by piece, since the cost grows with their square.
LONGEST_PIECE = 64
# The roots of the tree: where a word may begin, and inside a word, where only spaces and scripts without spaces begin one.
AT_BOUNDARY, IN_WORD = 0, 1


def is_letter(byte: int) -> bool:
    """Whether a byte of UTF-8 belongs to a word: ASCII letters and digits, and all that is not ASCII."""
    return byte >= 0x80 or chr(byte).isalnum()


def most_like(words: list[str], text: str, count: int) -> list[str]:
    """
    The `count` words that are spelt most like something in a text, best first: a rare word that the reader does not know is
    heard as something like it. All words of a shorter list, in that order.
    """
    letters, spoken = [bare_letters(word) for word in words], np.array([ord(char) for char in bare_letters(text)])
    lengths = np.array([max(1, len(word)) for word in letters])
    spelt = np.zeros((len(words), max(lengths)), dtype=int)
    for row, word in zip(spelt, letters):
        row[: len(word)] = [ord(char) for char in word]
    # Edit distances of the first letters of each word to whatever ends at each place of the text and begins anywhere.
    places = np.arange(len(spoken) + 1)
    distances = np.zeros((len(words), len(places)), dtype=int)
    closest = np.zeros(len(words))
    for length in range(1, spelt.shape[1] + 1):
        kept = distances[:, :-1] + (spelt[:, length - 1 : length] != spoken)
        distances = distances + 1
        distances[:, 1:] = np.minimum(distances[:, 1:], kept)
        distances = np.minimum.accumulate(distances - places, axis=1) + places
        ends = lengths == length
        closest[ends] = distances[ends].min(1)
    return [words[number] for number in np.argsort(closest / lengths, kind="stable")[:count]]


def bare_letters(text: str) -> str:
    """The letters and digits of a text without case and accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text.casefold()) if char.isalnum())


class ReaderVocabulary:
    """
    What the reader's tokens spell, so that it can be given texts of its own although its tokenizer is not in the checkpoint.

    Whisper's tokens are numbered in the order in which byte-pair encoding merges them, so their bytes alone tokenize a text
    (as in tiktoken). Special tokens spell nothing and never come of a text. Nor do symbols that the reader never writes
    (brackets, quotation marks, ...): they are left out.

    Args:
        spelling, offsets (`torch.Tensor`): the LLM's tokens for each of the reader's, see [`VoxLMReader`].
        tokenizer ([`PreTrainedTokenizerFast`]): of the LLM.
    """

    def __init__(self, spelling: torch.Tensor, offsets: torch.Tensor, tokenizer):
        spelling, offsets = spelling.tolist(), offsets.tolist()
        rows = [spelling[first:end] for first, end in zip(offsets, offsets[1:])]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        alphabet = {char: byte for byte, char in byte_characters().items()}
        self.bytes: list[bytes] = []
        for row, text in zip(rows, texts):
            if "\ufffd" in text:  # part of a character, byte by byte
                characters = "".join(tokenizer.convert_ids_to_tokens(row))
                self.bytes.append(bytes(alphabet[char] for char in characters if char in alphabet))
            else:
                self.bytes.append(text.encode())
        self.ranks: dict[bytes, int] = {}
        for token, spelt in enumerate(self.bytes):
            if spelt:
                self.ranks.setdefault(spelt, token)
        self.longest = max(map(len, self.ranks), default=0)
        # By token: whether it begins with what ends a word, and whether it ends inside a word.
        self.begins_outside = torch.tensor([not spelt or not is_letter(spelt[0]) for spelt in self.bytes])
        self.ends_inside = [bool(spelt) and is_letter(spelt[-1]) for spelt in self.bytes]

    def encode(self, text: str) -> list[int]:
        """The reader's tokens of a text."""
        alphabet = {char: byte for byte, char in byte_characters().items()}
        ids: list[int] = []
        for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(text):
            spelt = bytes(alphabet[char] for char in piece)
            for first in range(0, len(spelt), LONGEST_PIECE):
                ids += self._merge([spelt[at : at + 1] for at in range(first, min(first + LONGEST_PIECE, len(spelt)))])
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of the reader's tokens."""
        return b"".join(self.bytes[token] for token in ids).decode(errors="ignore")

    def _merge(self, parts: list[bytes]) -> list[int]:
        """Byte-pair encoding: the pair that makes the token of the lowest number is merged first."""
        while len(parts) > 1:
            ranks = [self.ranks.get(one + other, len(self.bytes)) for one, other in zip(parts, parts[1:])]
            place = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[place] == len(self.bytes):
                break
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return [self.ranks[part] for part in parts if part in self.ranks]


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in the vocabularies of byte-level tokenizers: itself where it is visible."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + place) for place, byte in enumerate(hidden)}


@dataclass(frozen=True)
class BiasState:
    """
    Where a hypothesis is in the tree of hotwords.

    Args:
        node (`int`): how far a hotword is spelt; a root where none is.
        found (`tuple[int]`): completed hotwords, each once.
        complete (`int`): a hotword that is complete within the one that is being spelt ("Ann" in "Ann Lee"), -1 for none.
    """

    node: int = AT_BOUNDARY
    found: tuple[int, ...] = ()
    complete: int = -1


class Hotwords:
    """
    The hotwords of one recording, and what they are worth.

    Args:
        words (`list[str]`): without white space at either end, and with single spaces inside.
        vocabulary ([`ReaderVocabulary`])
    """

    def __init__(self, words: list[str], vocabulary: ReaderVocabulary):
        self.words, self.vocabulary = words, vocabulary
        # Of each node: what follows, the hotword that ends there or -1, its bonus, and whether its last byte is a letter.
        self.children: list[dict[int, int]] = [{}, {}]
        self.ends, self.bonuses_at, self.inside = [-1, -1], [0.0, 0.0], [False, True]
        # Whether the next word may begin right behind a hotword, as in scripts without spaces.
        self.open_ended = [has_no_spaces(word[-1]) for word in words]
        for number, word in enumerate(words):
            for spelling in dict.fromkeys((word, word[0].upper() + word[1:], word[0].lower() + word[1:], word.lower())):
                for spelt in (spelling, " " + spelling):
                    self._insert(AT_BOUNDARY, spelt.encode(), number)
                if has_no_spaces(word[0]):
                    self._insert(IN_WORD, spelling.encode(), number)
        if words:  # what begins with a space does so everywhere
            self.children[IN_WORD][ord(" ")] = self.children[AT_BOUNDARY][ord(" ")]
        self._followers: dict[int, dict[int, int]] = {}
        self._starts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _insert(self, root: int, spelt: bytes, number: int):
        node, letters = root, 0
        for byte in spelt:
            letters += byte != ord(" ")
            if byte not in self.children[node]:
                self.children[node][byte] = len(self.children)
                self.children.append({})
                self.ends.append(-1)
                self.bonuses_at.append(START_BONUS + BYTE_BONUS * letters if letters else 0.0)
                self.inside.append(is_letter(byte))
            node = self.children[node][byte]
        self.ends[node] = number

    def followers(self, node: int) -> dict[int, int]:
        """The tokens that continue a hotword from a node, and the nodes that they lead to."""
        if node not in self._followers:
            found, waiting = {}, [(node, b"")]
            while waiting:
                place, spelt = waiting.pop()
                if spelt in self.vocabulary.ranks:
                    found[self.vocabulary.ranks[spelt]] = place
                if len(spelt) < self.vocabulary.longest:
                    waiting += [(child, spelt + bytes([byte])) for byte, child in self.children[place].items()]
            self._followers[node] = found
        return self._followers[node]

    def bonus(self, state: BiasState) -> float:
        """What a hypothesis has earned so far in nats, what may be taken back included."""
        pending = self.bonuses_at[state.node]
        if state.complete >= 0:
            pending = max(pending, KEPT_BONUS)
        return KEPT_BONUS * len(state.found) + pending

    def found_behind(self, state: BiasState, outside: bool) -> tuple[int, ...]:
        """
        The completed hotwords once a token follows that continues none.

        Args:
            state ([`BiasState`])
            outside (`bool`): whether the token begins with something else than a letter.
        """
        complete = self._complete(state, outside)
        # Once in a segment: "Baxendale, Baxendale" won where it earned the bonus twice.
        return (*state.found, complete) if complete >= 0 and complete not in state.found else state.found

    def _complete(self, state: BiasState, outside: bool) -> int:
        end = self.ends[state.node]
        return end if end >= 0 and (outside or self.open_ended[end]) else state.complete

    def advance(self, state: BiasState, token: int) -> BiasState:
        """The state behind one more token."""
        outside = bool(self.vocabulary.begins_outside[token])
        if state.node > IN_WORD and token in self.followers(state.node):
            return BiasState(self.followers(state.node)[token], state.found, self._complete(state, outside))
        start = IN_WORD if self.inside[state.node] else AT_BOUNDARY
        behind = IN_WORD if self.vocabulary.ends_inside[token] else AT_BOUNDARY
        return BiasState(self.followers(start).get(token, behind), self.found_behind(state, outside))

    def found_in(self, ids: list[int]) -> tuple[int, ...]:
        """The hotwords in a text of the reader's tokens."""
        state = BiasState()
        for token in ids:
            state = self.advance(state, token)
        return self.found_behind(state, outside=True)

    def changes(self, state: BiasState) -> torch.Tensor:
        """`(vocabulary,)` how each token that may follow changes the bonus, in nats; that of the end is among them."""
        before = self.bonus(state)
        failed = [self.bonus(BiasState(found=self.found_behind(state, flag))) - before for flag in (True, False)]
        changes = torch.where(self.vocabulary.begins_outside, *(torch.tensor(change) for change in failed))
        start = IN_WORD if self.inside[state.node] else AT_BOUNDARY
        if start not in self._starts:
            tokens = self.followers(start)
            bonuses = [self.bonuses_at[node] for node in tokens.values()]
            self._starts[start] = torch.tensor(list(tokens), dtype=torch.long), torch.tensor(bonuses)
        tokens, bonuses = self._starts[start]
        changes[tokens] += bonuses
        if state.node > IN_WORD:
            for token in self.followers(state.node):
                changes[token] = self.bonus(self.advance(state, token)) - before
        return changes
