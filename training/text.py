"""Transcripts: normalisation, and which words of two of them belong together."""

import functools
import json
import re
from pathlib import Path

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

from voxlm_hf.forced_alignment_voxlm import match_in_order


# Costs of the alignment: a substitution by how differently the words are spelt, at most this; a word on one side only.
SUBSTITUTION, GAP = 1.2, 0.7
ABBREVIATIONS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "messrs": "messieurs"}


def normalise(text: str) -> str:
    """Lower case, titles spelt out, hyphens to spaces, nothing kept but letters, apostrophes inside words and spaces."""
    text = text.lower().replace("’", "'").replace("—", " ").replace("-", " ").replace("&c", "etcetera")
    text = re.sub(r"\b(mr|mrs|dr|messrs)\.?(?=\s|$)", lambda match: ABBREVIATIONS[match[1]], text)
    text = re.sub(r"[^a-z' ]+", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


@functools.cache
def whisper_normaliser() -> EnglishTextNormalizer:
    """The normaliser of Whisper's paper (Radford et al. 2022), by which error rates are compared."""
    # British to American spellings, from openai/whisper (MIT licence), where Whisper's own normaliser has them.
    return EnglishTextNormalizer(json.loads((Path(__file__).parent / "english_spelling.json").read_text()))


# What a recipe may do to transcripts, by name.
NORMALISERS = {"none": str.strip, "lower": normalise}


def match_words(reference: list[str], timed: list[str]) -> list[int | None]:
    """
    For each timed word the place in the reference it stands for, by edit-distance alignment of the two, or `None`.

    A word spelt differently is matched to what stands at its place; words that one side has more than the other are matched
    to nothing.
    """
    spelling = SUBSTITUTION * cdist(reference, timed, scorer=Levenshtein.normalized_distance, dtype=np.float64)
    places: list[int | None] = [None] * len(timed)
    for row, column in match_in_order(spelling.__getitem__, len(reference), len(timed), GAP):
        places[column] = row
    return places
