"""Text normalisation for training transcripts."""

import re


ABBREVIATIONS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "messrs": "messieurs"}


def normalise(text: str) -> str:
    """Lower case, titles spelt out, hyphens to spaces, nothing kept but letters, apostrophes inside words and spaces."""
    text = text.lower().replace("’", "'").replace("—", " ").replace("-", " ").replace("&c", "etcetera")
    text = re.sub(r"\b(mr|mrs|dr|messrs)\.?(?=\s|$)", lambda match: ABBREVIATIONS[match[1]], text)
    text = re.sub(r"[^a-z' ]+", " ", text)
    text = re.sub(r"(?<![a-z])'|'(?![a-z])", " ", text)
    return " ".join(text.split())


# What a recipe may do to transcripts, by name.
NORMALISERS = {"none": str.strip, "lower": normalise}
