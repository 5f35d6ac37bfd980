"""What the dicts in a [`VoxLMConfig`] hold: LoRA, the reader, references to base models."""

import math
import re
from collections.abc import Callable


# Widest layer, most layers and largest vocabulary of any model that is known, times ten at least. A config beyond them is
# broken, and building its model would never end.
WIDEST, DEEPEST, MOST_TOKENS = 2**20, 2000, 2**24

# Rank and alpha are those of the original VoxLM.
DEFAULT_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}

# `llm_weight` and `word_bonus` are from the best of 90 combinations on 150 sentences by synthetic voices (flite, festival,
# espeak-ng), which had a `ctc_weight` of 0.1; that needs a token mixture, so it is 0 by default. With fewer than a hundred
# learned end frames the decoder does not know where to stop.
DEFAULT_READER = {
    "prompt_ids": [],
    "eos_token_id": 0,
    "end_frames": 100,
    "spelling_size": 0,
    "num_beams": 5,
    "distinct_words": False,
    "llm_weight": 0.3,
    "ctc_weight": 0.0,
    "word_bonus": 1.0,
    "llm_prompt": "audio",
    "plain_text": False,
    "previous_id": None,
    "language": "en",
    "languages": {},
    "llm_weights": {},
    "alignment_heads": None,
    "in_window": False,
}


def is_number(value, least=-math.inf, most=math.inf) -> bool:
    """Whether a value is a finite number within limits; bools are none."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and least <= value <= most
    )


def is_count(value, least=0, most=WIDEST) -> bool:
    """Whether a value is an integer within limits; bools are none."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_head(value) -> bool:
    """Whether a value is a pair of a layer's and a head's number."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_count, value))


def _is_names(value) -> bool:
    """Whether a value is a name or a list of at least one."""
    names = [value] if isinstance(value, str) else value
    return isinstance(names, (list, tuple)) and bool(names) and all(isinstance(name, str) and name for name in names)


def _is_expression(value) -> bool:
    """Whether a value is a regular expression, of which a name is one."""
    try:
        return isinstance(value, str) and bool(value) and re.compile(value) is not None
    except (re.error, OverflowError, RecursionError):  # a count or a nesting beyond what `re` can hold
        return False


def _is_targets(value) -> bool:
    """Whether a value is a list of names or a regular expression."""
    return _is_expression(value) if isinstance(value, str) else _is_names(value)


def _is_pattern(valid: Callable) -> Callable:
    """A check for a dict from regular expressions to values that are `valid`."""
    return lambda value: isinstance(value, dict) and all(_is_expression(k) and valid(v) for k, v in value.items())


def _is_by_language(valid: Callable) -> Callable:
    """A check for a dict from codes of languages to values that are `valid`."""
    return lambda value: (
        isinstance(value, dict) and all(isinstance(k, str) and k and valid(v) for k, v in value.items())
    )


# The fields of `lora_config`: those of `peft.LoraConfig` that change nothing but LoRA's own weights, so that a checkpoint
# holds the base's weights and LoRA's, and merging is exact. Of each its check and what it must be.
LORA_FIELDS = {
    "r": (lambda value: is_count(value, 1), "a positive integer"),
    "lora_alpha": (lambda value: is_number(value) and value > 0, "a number above 0"),
    "lora_dropout": (lambda value: is_number(value, 0) and value < 1, "a number in [0, 1)"),
    "target_modules": (_is_targets, 'a list of names, a regular expression or "all-linear"'),
    "exclude_modules": (lambda value: value is None or _is_targets(value), "a list of names or a regular expression"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (lambda value: isinstance(value, bool), "true or false"),
    "layers_to_transform": (
        lambda value: (
            value is None or is_count(value) or isinstance(value, (list, tuple)) and all(map(is_count, value))
        ),
        "a layer's number or a list of them",
    ),
    "layers_pattern": (
        lambda value: (
            value is None or _is_names(value) and all(map(_is_expression, [value] if isinstance(value, str) else value))
        ),
        "a name (or regular expression) or a list of them",
    ),
    "rank_pattern": (
        _is_pattern(lambda value: is_count(value, 1)),
        "positive integers by name (or regular expression)",
    ),
    "alpha_pattern": (
        _is_pattern(lambda value: is_number(value) and value > 0),
        "numbers above 0 by name (or regular expression)",
    ),
    "init_lora_weights": (lambda value: value in (True, "gaussian"), 'true or "gaussian"'),
}

# Other fields of `peft.LoraConfig`, with values that mean the same as their absence; `None`, `False` and what is empty mean
# that for every field.
LORA_NO_EFFECT = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "qalora_group_size": (16,),
    "runtime_config": ({"ephemeral_gpu_offload": False},),
}

# Fields that describe an adapter and change nothing.
LORA_DESCRIPTION = (
    "task_type",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "auto_mapping",
)

READER_FIELDS = {
    "prompt_ids": (
        lambda value: (
            isinstance(value, (list, tuple)) and bool(value) and all(is_count(v, 0, MOST_TOKENS) for v in value)
        ),
        "a list of token ids, not empty",
    ),
    "eos_token_id": (lambda value: is_count(value, 0, MOST_TOKENS), "a token id"),
    "end_frames": (lambda value: is_count(value, 0, 10_000), "an integer from 0 to 10000"),
    "spelling_size": (lambda value: is_count(value, 0, 2**28), "the length of a table"),
    "num_beams": (lambda value: is_count(value, 1, 1000), "an integer from 1 to 1000"),
    "distinct_words": (lambda value: isinstance(value, bool), "true or false"),
    "llm_weight": (is_number, "a finite number"),
    "ctc_weight": (is_number, "a finite number"),
    "word_bonus": (is_number, "a finite number"),
    "llm_prompt": (lambda value: value in ("audio", "none"), '"audio" or "none"'),
    "plain_text": (lambda value: isinstance(value, bool), "true or false"),
    "previous_id": (lambda value: value is None or is_count(value, 0, MOST_TOKENS), "a token id or null"),
    "language": (lambda value: isinstance(value, str) and bool(value), "the code of a language"),
    "languages": (_is_by_language(lambda value: is_count(value, 0, MOST_TOKENS)), "token ids by code of language"),
    "llm_weights": (_is_by_language(is_number), "finite numbers by code of language"),
    "alignment_heads": (
        lambda value: value is None or isinstance(value, (list, tuple)) and bool(value) and all(map(_is_head, value)),
        "a list of layers and heads ([[3, 1], ...]) or null",
    ),
    "in_window": (lambda value: isinstance(value, bool), "true or false"),
}

REFERENCE_FIELDS = {
    "name": (lambda value: isinstance(value, str) and bool(value), "a folder or a Hub id"),
    "revision": (lambda value: value is None or isinstance(value, str) and bool(value), "a commit or null"),
    "sha256": (lambda value: isinstance(value, str) and len(value) == 64, "64 hexadecimal digits"),
}
