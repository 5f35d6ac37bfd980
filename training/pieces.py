"""Short pieces of an LLM's vocabulary that spell every word, for the projector to write by CTC."""

import copy
import json
from collections import Counter

from tokenizers import Tokenizer


def short_piece_tokenizer(tokenizer, merges: int) -> Tokenizer:
    """
    The LLM's own BPE, stopped after its first `merges` merges: the same ids, but short and frequent ones.

    A whole vocabulary of 50,000 tokens needs more speech than anybody has to be heard often enough; a few hundred pieces
    are each learnt from hours of it, and the LLM reads a word in pieces as it reads a rare word.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): of the LLM.

    Raises:
        ValueError: for a tokenizer that is not BPE.
    """
    description = copy.deepcopy(json.loads(tokenizer.backend_tokenizer.to_str()))
    model = description["model"]
    if model["type"] != "BPE":
        raise ValueError(f"Pieces are made by stopping BPE early, but this tokenizer is {model['type']}")
    model["merges"] = model["merges"][:merges]
    model["ignore_merges"] = False  # else whole words of the vocabulary would be found all the same
    return Tokenizer.from_str(json.dumps(description))


def encode_pieces(pieces: Tokenizer, text: str) -> list[int]:
    """A transcript as ids; it starts with a space, as words in running text do. Nothing for an empty one."""
    return pieces.encode(" " + text, add_special_tokens=False).ids if text else []


def piece_vocabulary(pieces: Tokenizer, texts: list[str], at_least: int = 3) -> list[int]:
    """The ids that `texts` use, those of single characters always, others from `at_least` times on; in order."""
    counts = Counter(token for text in texts for token in encode_pieces(pieces, text))
    characters = {pieces.token_to_id(token) for token in pieces.get_vocab() if len(token.strip("Ġ▁")) <= 1}
    return sorted(token for token, count in counts.items() if count >= at_least or token in characters)
