"""The recordings of a recipe as datasets."""

import numpy as np
from accelerate import PartialState

from .augment import Augmentation
from .data import SpeechDataset, read_rows
from .features import FeatureCache, encode_missing, encoder_key
from .streaming import BUFFER, SpeechStream


def make_dataset(
    model,
    sources: list[dict],
    augment: bool = False,
    copies: int = 1,
    cache: str | None = None,
    bf16: bool = False,
    misheard: float = 0.0,
    seed: int = 0,
    **limits,
) -> SpeechDataset:
    """
    The rows of `sources` as a dataset; prints which rows are left out and why.

    Args:
        augment (`bool`): augment each recording at random, in `copies` different ways.
        cache (`str`, *optional*): folder in which to keep encoder states.
        bf16 (`bool`): whether to compute them in bfloat16, which GPUs and recent CPUs do several times faster.
        misheard (`float`): see [`SpeechDataset`].
        seed (`int`): of the augmentations.
        **limits: of [`Limits`].

    Raises:
        ValueError: when no row is left.
    """
    rows, report = read_rows(sources, **limits)
    # By the row's place in its source, so that leaving some rows out does not change the others, nor encodes them
    # again.
    seeds = [[seed + row.place[0], row.place[1]] + ([copy] if copy else []) for copy in range(copies) for row in rows]
    rows = rows * copies
    augmentations = [
        Augmentation.draw(np.random.default_rng(numbers), row.words) if augment else Augmentation()
        for numbers, row in zip(seeds, rows)
    ]
    store, keys = None, None
    if cache is not None:
        store = FeatureCache(cache, encoder_key(model, bf16), model.config.audio_hidden_size)
        keys = encode_missing(model, model.processor, rows, augmentations, store, report, bf16=bf16)
        kept = [number for number, key in enumerate(keys) if key is not None]
        rows, augmentations, keys = ([items[number] for number in kept] for items in (rows, augmentations, keys))
        report.kept = len(rows)
    if PartialState().is_main_process:
        print(report)
    if not rows:
        raise ValueError("No recording is left to use; see the report above")
    return SpeechDataset(rows, model.processor, augmentations, store, keys, misheard)


def make_datasets(model, data: dict, seed: int) -> tuple[SpeechDataset | SpeechStream, SpeechDataset | None]:
    """
    The datasets to train and to evaluate on; the latter is neither augmented nor given wrong words, and always in memory.

    Raises:
        ValueError: when no row is left, and for streamed data with a cache or copies.
    """
    options = dict(data)
    train_sources, dev_sources = options.pop("train"), options.pop("dev", None)
    buffer = options.pop("buffer", BUFFER)
    if is_streamed(data):
        bf16 = options.pop("bf16", False)
        if options.pop("cache", None) is not None or options.pop("copies", 1) != 1 or bf16:
            raise ValueError(
                "data: streamed data has no `cache`, no `bf16` for it and no `copies`, which need all rows beforehand; every "
                "pass over it has other augmentations"
            )
        train = SpeechStream(train_sources, model.processor, seed=seed, buffer=buffer, **options)
    else:
        train = make_dataset(model, train_sources, seed=seed, **options)
    if not dev_sources:
        return train, None
    plain = {**options, "augment": False, "copies": 1, "misheard": 0.0}
    return train, make_dataset(model, dev_sources, **plain)


def is_streamed(data: dict) -> bool:
    """Whether a source of the training data has `streaming`; then all of it is streamed."""
    return any(isinstance(source, dict) and source.get("streaming") for source in data.get("train") or [])
