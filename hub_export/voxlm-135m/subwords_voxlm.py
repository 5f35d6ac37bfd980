"""A small vocabulary of short subwords of an LLM that spell every word, for the projector to predict by CTC."""

import copy
import json
from collections import Counter

from tokenizers import Tokenizer


def subword_tokenizer(tokenizer, merges: int) -> Tokenizer:
    """
    The LLM's own BPE, stopped after its first `merges` merges: the same ids, but only the short and frequent ones.

    Of a vocabulary of 50,000 tokens most are too rare in any speech corpus to be learnt. Each of a few hundred subwords
    occurs in hours of speech, and the LLM understands a word spelt in subwords as it does a rare word.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): of the LLM.

    Raises:
        ValueError: for a tokenizer that is not BPE.
    """
    description = copy.deepcopy(json.loads(tokenizer.backend_tokenizer.to_str()))
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(f"The subwords come from stopping BPE early, but this tokenizer is {model['type']}")
    model["merges"] = model["merges"][:merges]
    model["ignore_merges"] = False  # otherwise BPE would still return whole words of the vocabulary
    return Tokenizer.from_str(json.dumps(description))


def encode_subwords(subwords: Tokenizer, text: str) -> list[int]:
    """A transcript as ids, with a space before its first word, as within running text; no ids for an empty one."""
    return subwords.encode(" " + text, add_special_tokens=False).ids if text else []


def subword_vocabulary(subwords: Tokenizer, texts: list[str] | None, at_least: int = 3) -> list[int]:
    """
    The ids that occur in `texts`, in order: single characters always, all others from `at_least` times on. Without texts,
    all that the merges make.
    """
    characters = {subwords.token_to_id(token) for token in subwords.get_vocab() if len(token.strip("Ġ▁")) <= 1}
    if texts is None:
        merges = json.loads(subwords.to_str())["model"]["merges"]
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        return sorted(characters | {subwords.token_to_id("".join(pair)) for pair in pairs})
    counts = Counter(token for text in texts for token in encode_subwords(subwords, text))
    return sorted(token for token, count in counts.items() if count >= at_least or token in characters)
