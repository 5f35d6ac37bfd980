"""`generate` as `transcribe` writes: what keeps it from that, and the ids of the text of an encoded batch."""

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .decoding_voxlm import EncodedBatch, encoded_batch, given_options, pack_prompts, search_options, stop_tokens
from .fallback_voxlm import transcribe_encoded
from .features_voxlm import active_seconds
from .outputs_voxlm import VoxLMAudioOutput
from .placeholders_voxlm import full_mask
from .processing_voxlm import VoxLMProcessor
from .request_voxlm import OWN_LANGUAGE, Request, is_own_language
from .segmentation_voxlm import SegmentSpan


# What `generate` gives for each step of the LLM, which writes no text of the reader's step by step.
STEP_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "streamer")
# Inputs of the model among the arguments of `generate`, which are no options.
MODEL_INPUTS = {"attention_mask", "position_ids", "logits_to_keep"}


def options_of_llm_alone(model, input_ids, audio: VoxLMAudioOutput, kwargs: dict) -> list[str]:
    """
    Names of arguments of `generate` that only the LLM by itself can follow: another search than the greedy one, a cache, prompts
    as embeddings, and prompts with several audios or none.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): `None` for the trained prompt.
        audio ([`VoxLMAudioOutput`])
        kwargs (`dict`): of `generate`, without the audio.
    """
    options = {name: value for name, value in kwargs.items() if name not in {*MODEL_INPUTS, *STEP_OUTPUTS}}
    names = sorted(search_options(model.generation_config, options))
    if input_ids is not None and not one_audio_each(model, input_ids, audio):
        names.append("prompts with several audios or none")
    return names


def one_audio_each(model, input_ids, audio: VoxLMAudioOutput) -> bool:
    """Whether each prompt has one audio, in one row of placeholders."""
    counts = audio.audio_embeds_mask.sum(-1)
    placeholders = (input_ids == model.config.audio_token_id).long()
    if len(counts) != len(placeholders) or not torch.equal(placeholders.sum(-1), counts.to(placeholders.device)):
        return False
    begins = torch.nn.functional.pad(placeholders, (1, 0)).diff(dim=1) == 1
    return bool((begins.sum(-1) == 1).all())


def asked_step_outputs(kwargs: dict) -> list[str]:
    """Which of `STEP_OUTPUTS` the caller of `generate` asks for."""
    options = given_options(kwargs)
    return [name for name in STEP_OUTPUTS if options.get(name)]


def new_token_budget(kwargs: dict, prompt_length: int) -> int | None:
    """The most new tokens that the caller of `generate` asks for; `None` where the audio decides.

    Args:
        kwargs (`dict`): of `generate`.
        prompt_length (`int`): what `max_length` counts besides the new tokens.

    Raises:
        ValueError: for a `max_length` that leaves no room for one.
    """
    options = given_options(kwargs)
    if options.get("max_new_tokens") is not None or options.get("max_length") is None:
        return options.get("max_new_tokens")
    budget = options["max_length"] - prompt_length
    if budget < 1:
        raise ValueError(
            f"`max_length={options['max_length']}` leaves no room for a text behind a prompt of {prompt_length} tokens (audio "
            "included); pass `max_new_tokens`"
        )
    return budget


def popped_language(kwargs: dict):
    """
    The language among the arguments of `generate`, which is taken out with the task; that of the checkpoint by default.

    Raises:
        ValueError: for another task than transcribing.
    """
    task = kwargs.pop("task", None)
    if task not in (None, "transcribe"):
        raise ValueError(f"`task` must be 'transcribe', got {task!r}: the model does not translate")
    language = kwargs.pop("language", None)
    return OWN_LANGUAGE if language is None else language


def check_own_language(model, language):
    """
    Raises:
        ValueError: for another language than the checkpoint's own, where the LLM writes alone.
    """
    if not is_own_language(model, language):
        raise ValueError(
            f"`language={language!r}` is for the reader; the LLM alone, which these options or inputs ask for, writes the language "
            "it was trained on"
        )


def batch_for_transcript(
    model,
    processor: VoxLMProcessor,
    input_ids,
    attention_mask,
    features: dict,
    audio: VoxLMAudioOutput,
    requests: list[Request] | None = None,
) -> EncodedBatch:
    """
    The inputs of `generate` as `transcribe` has them.

    Args:
        input_ids, attention_mask (`torch.LongTensor` of shape `(batch, length)`): prompts, padded on either side; without a
            mask, pad tokens are padding.
        features (`dict`): input features with their mask; empty where the encoder's states were given.
        audio ([`VoxLMAudioOutput`]): of them.
        requests (`list[Request]`, *optional*): of each; the prompts are those in `input_ids`.
    """
    if attention_mask is None:
        pad, attention_mask = model.config.pad_token_id, full_mask(None, *input_ids.shape, input_ids.device)
        attention_mask = attention_mask if pad is None else (input_ids != pad).long()
    rows = [row[kept.bool()] for row, kept in zip(input_ids, attention_mask)]
    clips = processor.unpad_features(features) if features else None
    frame_s = processor.frame_s
    if clips is None:
        seconds = [frames * frame_s for frames in audio.frame_mask.sum(-1).tolist()]
        active = seconds
    else:
        hop_s = processor.samples_per_feature / processor.sampling_rate
        seconds = [clip.shape[processor.time_axis] * hop_s for clip in clips]
        active = [active_seconds(processor, clip) for clip in clips]
    spans = [SegmentSpan(0.0, *pair) for pair in zip(seconds, active)]
    return encoded_batch(model, spans, *pack_prompts(rows), audio, clips, requests)


def transcript_ids(
    model, processor: VoxLMProcessor, batch: EncodedBatch, budget: int | None, use_reader: bool
) -> list[list[int]]:
    """
    The LLM's tokens of the text that `transcribe` writes for each segment of a batch, followed by eos where the text ended (and
    the budget has room for it). A text of the reader is spelt as the LLM's tokenizer does it.

    Args:
        budget (`int`, *optional*): `max_new_tokens`.
        use_reader (`bool`): see `fallback_voxlm.transcribe_encoded`.
    """
    options = {} if budget is None else {"max_new_tokens": budget}
    results = transcribe_encoded(model, processor, batch, False, options, use_reader)
    stops = sorted(stop_tokens(model.generation_config.eos_token_id))
    rows = []
    for span, segment in zip(batch.segments, results):
        text = segment.text if span.active_s else ""  # of which `transcribe` makes no segment
        ids = segment.ids if segment.ids is not None and text else processor.text_ids(text)
        rows.append([*ids, *([] if segment.truncated and text else stops[:1])][:budget])
    return rows


def padded_output(model, prompts, rows: list[list[int]], kwargs: dict):
    """
    New ids as `generate` returns them: behind the prompts, padded on the right.

    Args:
        prompts (`torch.LongTensor` of shape `(batch, length)`, *optional*): `None` for new ids alone.
        rows (`list[list[int]]`): of `transcript_ids`.
        kwargs (`dict`): of `generate`.
    """
    options = given_options(kwargs)
    known = (options.get("pad_token_id"), model.generation_config.pad_token_id, model.config.pad_token_id, 0)
    pad = next(token for token in known if token is not None)
    longest = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=torch.long, device=model.device)
    sequences = ids if prompts is None else torch.cat([prompts, ids.to(prompts.device)], dim=1)
    return_dict = options.get("return_dict_in_generate", model.generation_config.return_dict_in_generate)
    return GenerateDecoderOnlyOutput(sequences=sequences) if return_dict else sequences
