"""How transcripts are normalised."""

import functools
import json
import re
from pathlib import Path

from transformers.models.whisper.english_normalizer import EnglishTextNormalizer


# Titles that LibriSpeech's transcripts spell out as they are spoken.
ABBREVIATIONS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "messrs": "messieurs"}


def normalise(text: str) -> str:
    """
    Lower case, titles spelt out, hyphens as spaces; of everything else only letters, apostrophes inside words and
    spaces remain.
    """
    text = text.lower().replace("’", "'").replace("—", " ").replace("-", " ").replace("&c", "etcetera")
    text = re.sub(r"\b(mr|mrs|dr|messrs)\.?(?=\s|$)", lambda match: ABBREVIATIONS[match[1]], text)
    text = re.sub(r"[^a-z' ]+", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


@functools.cache
def whisper_normaliser() -> EnglishTextNormalizer:
    """The normaliser of Whisper's paper (Radford et al. 2022), the common ground for comparing error rates."""
    # British to American spellings, from openai/whisper (MIT licence): the list that Whisper's own normaliser uses.
    return EnglishTextNormalizer(json.loads((Path(__file__).parent / "english_spelling.json").read_text()))


# The normalisers that a recipe can name for its transcripts.
NORMALISERS = {"none": str.strip, "lower": normalise}
