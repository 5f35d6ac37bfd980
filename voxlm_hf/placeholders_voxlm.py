"""Placeholders: which audio belongs to which of them, and the positions of a prompt that the frame gate hides."""

import torch
from transformers.utils import is_torchdynamo_compiling


def check_placeholders(placeholders: torch.Tensor, audio_mask: torch.Tensor, token: int):
    """
    Check that prompts have a placeholder for each projected frame.

    A prompt may have several audios, and another none: audios are in the order of the placeholders, row by row.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`)
        audio_mask (`torch.LongTensor` of shape `(audios, projected_frames)`): 1 for real frames.
        token (`int`): the placeholder's id, for the message.

    Raises:
        ValueError: when placeholders and frames differ in number or, with as many audios as prompts, an audio would be split
            between two prompts.
    """
    if is_torchdynamo_compiling():  # the numbers would end the graph
        return
    given, wanted = placeholders.sum(-1), audio_mask.sum(-1)
    fits = int(given.sum()) == int(wanted.sum())
    if fits and len(given) == len(wanted):
        fits = bool(torch.isin(given.cumsum(0), torch.nn.functional.pad(wanted.cumsum(0), (1, 0))).all())
    if not fits:
        raise ValueError(
            f"`input_ids` hold {given.tolist()} audio placeholders (token {token}) per row, but the audio gives "
            f"{wanted.tolist()} projected frames; prepare both with the model's own processor. With a cache, pass only the "
            "audio that is not in it yet"
        )


def with_placeholders(input_ids: torch.Tensor, token: int, count: int) -> torch.Tensor:
    """A prompt `(length,)` with so many placeholders in place of its own, which stand in one row."""
    places = (input_ids == token).nonzero().flatten().tolist()
    before, after = input_ids[: places[0]], input_ids[places[-1] + 1 :]
    return torch.cat([before, input_ids.new_full((count,), token), after])


def real_frames(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    The frames `(audios * frames, ...)` of `values` `(audios, frames, ...)`, in order and those of the mask first: as
    `masked_scatter` takes them, which ignores the rest. (`values[mask]` has a shape that a compiled graph cannot know.)
    """
    order = mask.flatten().argsort(descending=True, stable=True)
    return values.flatten(0, 1)[order]


def audio_by_prompt(placeholders: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> tuple:
    """
    The frames of all audios of each prompt in one row, so that rows can be repeated for beams.

    Args:
        placeholders (`torch.BoolTensor` of shape `(batch, length)`)
        values (`torch.Tensor` of shape `(audios, frames, ...)`), mask (`torch.LongTensor` of shape `(audios, frames)`)

    Returns:
        values `(batch, most_frames, ...)` and their mask `(batch, most_frames)`.
    """
    counts = placeholders.sum(-1)
    rows = (torch.arange(int(counts.max()), device=counts.device) < counts.unsqueeze(1)).to(mask)
    grouped = values.new_zeros(*rows.shape, *values.shape[2:])
    grouped[rows.bool()] = values[mask.bool()]
    return grouped, rows


def append_answers(input_ids, attention_mask, labels, pad_token_id: int) -> tuple:
    """
    `input_ids`, `attention_mask` and `labels` `(batch, length + answer)` of prompts `(batch, length)` and answers
    `(batch, answer)` that are -100 where they are padded.
    """
    answer = labels != -100
    mask = full_mask(attention_mask, *input_ids.shape, input_ids.device)
    return (
        torch.cat([input_ids, labels.masked_fill(~answer, pad_token_id)], dim=1),
        torch.cat([mask, answer.to(mask)], dim=1),
        torch.cat([torch.full_like(input_ids, -100), labels], dim=1),
    )


def feature_mask(features: torch.Tensor, time_axis: int) -> torch.Tensor:
    """
    The mask `(batch, time)` of input features without one: 0 for what is zero at the end of a row. Samples `(batch, samples)`, and
    rows that are zero altogether, are all real.

    Args:
        features (`torch.Tensor` of shape `(batch, mels, time)`, `(batch, time, features)` or `(batch, samples)`)
        time_axis (`int`): 1 or 2.
    """
    if features.dim() == 2:
        return torch.ones_like(features, dtype=torch.long)
    filled = (features != 0).any(3 - time_axis).long()
    behind = filled.flip(1).cumsum(1).flip(1)  # how many filled ones there are from here on
    return ((behind > 0) | (behind[:, :1] == 0)).long()


def marks_tokens(attention_mask) -> bool:
    """Whether a mask is `(batch, length)`, and not one of queries and keys, or a dict of them by type of layer."""
    return isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2


def full_mask(attention_mask: torch.Tensor | None, batch: int, length: int, device) -> torch.Tensor:
    """A copy of a mask `(batch, length)`, of ones when there is none."""
    if attention_mask is None:
        return torch.ones(batch, length, dtype=torch.long, device=device)
    return attention_mask.clone()


def cache_of(output):
    """The cache among the outputs of a pass or of `generate`, which is called `cache` from transformers 5.24 on."""
    cache = getattr(output, "cache", None)
    return getattr(output, "past_key_values", None) if cache is None else cache


def past_length(cache) -> int:
    """Number of positions in a cache, 0 without one."""
    return 0 if cache is None else int(cache.get_seq_length())


def hidden_in_cache(cache, batch: int) -> torch.Tensor | None:
    """
    Positions of a cache that the frame gate hides, `(batch, positions)` of bool, as `gated_mask` left them; `None` for none.

    Raises:
        ValueError: when the cache was made for another number of rows, and `batch` is no multiple of it.
    """
    hidden = getattr(cache, "hidden_positions", None)
    if hidden is None:
        return None
    if not is_torchdynamo_compiling():
        # A cache that was cropped or reset meanwhile has other tokens there.
        hidden = cache.hidden_positions = hidden[:, : past_length(cache)]
    if batch % hidden.shape[0]:
        raise ValueError(
            f"The cache was made for {hidden.shape[0]} prompts, but there are {batch}, so it is not known which positions the "
            "frame gate hides; continue with the same prompts"
        )
    return hidden.repeat_interleave(batch // hidden.shape[0], dim=0)


def gated_mask(attention_mask, cache, shown: torch.Tensor | None, batch: int, length: int) -> tuple:
    """
    The mask of a pass without what the frame gate hides: placeholders of this pass and, with a cache, of those before it.

    Args:
        attention_mask (`torch.LongTensor` of shape `(batch, past + length)`, *optional*): another kind, which `generate` makes of
            a gated mask, is left alone.
        cache ([`Cache`], *optional*)
        shown (`torch.BoolTensor` of shape `(batch, length)`, *optional*): False for hidden placeholders of this pass.
        batch (`int`), length (`int`): of this pass.

    Returns:
        the mask, and the hidden positions `(batch, past + length)` to remember in the cache, `None` without `shown`.

    Raises:
        ValueError: for a mask that leaves out what is in the cache.
    """
    hidden = hidden_in_cache(cache, batch)
    if hidden is None and shown is None:
        return attention_mask, None
    past = past_length(cache) if shown is not None or attention_mask is None else 0
    if attention_mask is None or marks_tokens(attention_mask):
        device = (hidden if shown is None else shown).device
        attention_mask = full_mask(attention_mask, batch, past + length, device)
        if hidden is not None:
            if attention_mask.shape[1] < hidden.shape[1] + length:
                raise ValueError(
                    f"The attention mask has {attention_mask.shape[1]} columns, but there are {hidden.shape[1]} positions in the "
                    f"cache and {length} new ones; it has to cover both"
                )
            attention_mask[:, : hidden.shape[1]] *= (~hidden).to(attention_mask)
        if shown is not None:
            attention_mask[:, -length:] *= shown.to(attention_mask)
    if shown is None:
        return attention_mask, None
    if hidden is None:
        hidden = shown.new_zeros(batch, past)
    hidden = torch.nn.functional.pad(hidden, (0, past - hidden.shape[1]))
    return attention_mask, torch.cat([hidden, ~shown], dim=1)
