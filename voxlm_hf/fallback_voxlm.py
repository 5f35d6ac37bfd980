"""Quality gates, which notice nonsense, and the fallbacks that are tried when one fires."""

import math
import zlib
from collections.abc import Callable

import torch
from transformers.utils import logging

from .beams_voxlm import decode_with_ctc
from .decoding_voxlm import (
    DecodedText,
    EncodedBatch,
    draft_and_decode,
    draft_texts,
    encode,
    encode_halves,
    generate_text,
    given_options,
    pack_prompt,
    search_options,
    split_decoded,
    spoken_tokens,
    teacher_force,
    token_budget,
    token_budgets,
)
from .processing_voxlm import VoxLMProcessor, context_length
from .request_voxlm import Request
from .rescoring_voxlm import SILENCE_S, rescore
from .segmentation_voxlm import AudioSegment, SegmentSpan
from .transcription_voxlm import Segment, merge_segments, timed_words
from .words_voxlm import longest_loop, loop_units


logger = logging.get_logger(__name__)

# A phrase may come so often in a row, or so often if there are not frames enough for half its tokens. Chosen by hand: people do
# say "no, no, no, no", not eight times.
LOOP_TIMES, UNHEARD_LOOP_TIMES, UNHEARD_TOKENS_PER_FRAME = 8, 3, 2.0
# The compression of shorter texts (bytes) says nothing: zlib's own header weighs in. Chosen by hand.
COMPRESSION_FROM = 100
# Shorter activity than this (seconds) may be a word or two, of which few frames carry a token. Chosen by hand.
NO_SPEECH_FROM_S = 5.0
# Fewer visible frames than this are a word or two, which may be one token. Chosen by hand.
LEFT_OUT_FROM = 8
# Added to the active time before words per second are counted: words are longer than the frames in which they are loud.
# Chosen by hand.
ACTIVITY_MARGIN_S = 1.0
# A shorter segment is not split in halves. Chosen by hand: halves of a second still contain a few words.
SHORTEST_TO_HALVE_S = 2.0
# Seed of the samples that are drawn as a fallback: the same text every time.
FALLBACK_SEED = 0


def fired_gates(
    text: str,
    mean_logprob: float | None,
    active_s: float,
    visible_frames: float | None,
    num_tokens: int,
    out_of_tokens: bool,
    gates: dict[str, float],
) -> list[str]:
    """
    The names of the quality gates that a text fires.

    - "token_budget": the budget, which follows the audio generously, ended the text.
    - "left_out": fewer than `tokens_per_frame` tokens for each frame that carries one.
    - "loop": a phrase of up to 8 words comes more than 8 times in a row, and another gate fires or fewer frames than tokens
      carry one (people do count); or more than 3 times, and there are more than two tokens for each such frame.
    - "compression_ratio", "mean_logprob": as in Whisper (Radford et al. 2022), bytes by compressed bytes and the mean
      log-probability of the tokens.
    - "words_per_second": more words than anybody says in the time in which the voice activity detector found activity.
    - "no_speech": music or noise. Fewer than `heard_per_second` frames carry a token for each second of activity, and there
      are five seconds of activity or more, or the text fires "mean_logprob" too.

    Args:
        text (`str`): without white space at either end.
        mean_logprob (`float`, *optional*): of its tokens, raw, in nats.
        active_s (`float`): seconds in which voice activity was found.
        visible_frames (`float`, *optional*): number of frames that carry a token, for models with a frame gate.
        num_tokens (`int`): of the text, as the frames spell it (see `decoding_voxlm.spoken_tokens`).
        out_of_tokens (`bool`): whether the budget ended the text.
        gates (`dict`): thresholds, `config.quality_gates`. A gate without one never fires; without any, none does.
    """
    fired = ["token_budget"] if out_of_tokens and gates else []
    words, size = text.split(), len(text.encode())
    gated = visible_frames is not None
    if gated and visible_frames >= LEFT_OUT_FROM and num_tokens < gates.get("tokens_per_frame", 0) * visible_frames:
        fired.append("left_out")
    if not words:
        return fired
    if size >= COMPRESSION_FROM and size / len(zlib.compress(text.encode())) > gates.get("compression_ratio", math.inf):
        fired.append("compression_ratio")
    if mean_logprob is not None and mean_logprob < gates.get("mean_logprob", -math.inf):
        fired.append("mean_logprob")
    if len(words) > gates.get("words_per_second", math.inf) * (active_s + ACTIVITY_MARGIN_S):
        fired.append("words_per_second")
    sparse = gated and visible_frames < gates.get("heard_per_second", 0) * active_s
    if sparse and (active_s >= NO_SPEECH_FROM_S or "mean_logprob" in fired):
        fired.append("no_speech")
    if gates and is_loop(
        longest_loop(loop_units(words)), num_tokens / max(1, visible_frames) if gated else math.inf, bool(fired)
    ):
        fired.append("loop")
    return fired


def is_loop(times: int, tokens_per_frame: float, other_gate: bool) -> bool:
    """
    Whether a phrase that comes so many times in a row is nonsense.

    Args:
        times (`int`): of `longest_loop`.
        tokens_per_frame (`float`): the text's tokens for each frame that carries one; infinite where that is unknown.
        other_gate (`bool`): whether the text fires another gate.
    """
    if times > LOOP_TIMES:
        return other_gate or tokens_per_frame > 1
    return times > UNHEARD_LOOP_TIMES and UNHEARD_TOKENS_PER_FRAME < tokens_per_frame < math.inf


def transcribe_batch(
    model,
    processor: VoxLMProcessor,
    segments: list[AudioSegment],
    requests: list[Request],
    with_words: bool,
    generate_kwargs: dict,
    use_reader: bool = True,
) -> list[Segment]:
    """
    Transcribe segments in one pass.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        segments (`list[AudioSegment]`)
        requests (`list[Request]`): of each segment.
        with_words (`bool`): whether to compute words with times and confidences; overlapping segments get them anyway, to be
            joined by.
        generate_kwargs (`dict`), use_reader (`bool`): see `transcribe_encoded`.
    """
    with_words = with_words or any(segment.overlap or segment.continues for segment in segments)
    token_budget(generate_kwargs)  # options that cannot be used are found before anything is encoded
    batch = encode(model, processor, segments, requests)
    return transcribe_encoded(model, processor, batch, with_words, generate_kwargs, use_reader)


def transcribe_encoded(
    model,
    processor: VoxLMProcessor,
    batch: EncodedBatch,
    with_words: bool,
    generate_kwargs: dict,
    use_reader: bool = True,
) -> list[Segment]:
    """
    Transcribe an encoded batch. With greedy search and no `max_new_tokens`, retry those that fire a gate with the fallbacks.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        batch ([`EncodedBatch`])
        with_words (`bool`): whether to compute words with times and confidences.
        generate_kwargs (`dict`): for `generate`.
        use_reader (`bool`): whether the reader, where there is one, proposes the text; otherwise the LLM writes it.
    """
    use_reader = use_reader and model.reader is not None
    generate_kwargs = given_options(generate_kwargs)
    budget, searching = token_budget(generate_kwargs), search_options(model.generation_config, generate_kwargs)
    if searching or not use_reader:
        check_llm_can_write(model)
    if searching:

        def search(prompt, budgets, batch):
            return generate_text(model, prompt, budgets, generate_kwargs)

        results = decode_segments(model, processor, batch, search, budget, with_words)
        if use_reader:  # only now, when `generate` has taken the options
            logger.warning_once(f"The reader cannot search with {', '.join(sorted(searching))}: the LLM decodes alone")
        return results

    def default(prompt, budgets, batch):
        if not use_reader and model.config.ctc_weight and model.config.projector_merges is not None:
            return decode_with_ctc(model, processor, prompt, budgets, batch)
        if not use_reader:
            return draft_and_decode(model, processor, prompt, budgets, batch)
        look_twice = budget is None and batch.clips is not None
        return rescore(model, processor, prompt, budgets, batch, look_twice=look_twice)

    results = decode_segments(model, processor, batch, default, budget, with_words)
    if budget is not None:
        return results  # not the audio but the caller may have ended a short text
    return [
        with_fallback(model, processor, batch.row(row), default, generate_kwargs, result, use_reader)
        if result.gates and result.rejected is None
        else result
        for row, result in enumerate(results)
    ]


def check_llm_can_write(model):
    """
    Raises:
        ValueError: for a model whose reader is all that hears, since its projector is not trained.
    """
    if model.leaves_projector_out:
        raise ValueError(
            "The projector of this model is untrained, so the LLM cannot hear and write by itself (`use_reader=False`, beams, "
            "sampling, ...); only the reader's greedy default works until the projector is trained"
        )


def decode_segments(
    model, processor: VoxLMProcessor, batch: EncodedBatch, decode: Callable, budget: int | None, with_words: bool
) -> list[Segment]:
    """
    One [`Segment`] for each segment of an encoded batch.

    Args:
        decode: function of the packed prompt, the token budgets and the batch that returns `list[DecodedText]`.
        budget (`int`, *optional*): the caller's token budget.
        with_words (`bool`): whether to compute words with times and confidences.
    """
    prompt = pack_prompt(model, batch)
    texts = decode(prompt, token_budgets(batch, budget, context_length(model.config)), batch)
    has_text = any(text.ids for text in texts)
    unknown = not model.times_by_attention and any(text.ids and text.states is None for text in texts)
    if with_words and has_text and (unknown or model.alignment.states_at_tokens and not model.times_by_attention):
        teacher_force(model, prompt, texts)
    for text in texts:
        split_decoded(processor, text)
    words = [([], []) for _ in texts]
    if with_words and has_text:
        durations_s = [segment.duration_s for segment in batch.segments]
        words = timed_words(model, processor, texts, batch.audio, durations_s)
    gates = model.config.quality_gates
    return [
        judged_segment(
            segment, text, *timed, frames, spoken_tokens(processor, text), not text.ended and budget is None, gates
        )
        for segment, text, timed, frames in zip(batch.segments, texts, words, batch.visible_frames)
    ]


def judged_segment(
    span: SegmentSpan,
    text: DecodedText,
    words: list[dict],
    word_scores: list[dict],
    visible_frames: int | None,
    num_tokens: int,
    out_of_tokens: bool,
    gates: dict[str, float],
) -> Segment:
    """
    The result for one segment, its words moved to where they are in the recording; rejected when it is music or noise.

    Args:
        span ([`SegmentSpan`]), text ([`DecodedText`])
        words, word_scores (`list[dict]`): of `timed_words`.
        visible_frames, num_tokens, out_of_tokens, gates: see `fired_gates`.
    """
    fired = fired_gates(text.text, text.mean_logprob, span.active_s, visible_frames, num_tokens, out_of_tokens, gates)
    segment = Segment(
        start=round(span.start_s, 3),
        end=round(span.start_s + span.duration_s, 3),
        mean_logprob=None if text.mean_logprob is None else round(text.mean_logprob, 4),
        gates=fired,
        fallback=text.fallback,
    )
    if "no_speech" in fired:
        segment.rejected = text.text
        return segment
    segment.text, segment.truncated, segment.word_scores = text.text, not text.ended, word_scores
    segment.ids = text.ids if text.reader_logprobs is None else None
    segment.words = [{**word, **{e: round(word[e] + span.start_s, 3) for e in ("start", "end")}} for word in words]
    return segment


def with_fallback(
    model,
    processor: VoxLMProcessor,
    batch: EncodedBatch,
    default: Callable,
    generate_kwargs: dict,
    first: Segment,
    use_reader: bool,
) -> Segment:
    """
    The first text of one segment that fires no gate. The fallbacks in turn:

    - "window": the reader decodes the segment padded with silence to the encoder's window, as it was trained to. (Where its
      list was in doubt, it has already decoded the segment with a second of silence; see `rescoring_voxlm.propose`.)
    - "halves": if something was left out, the text of each half by itself.
    - "projector": greedy CTC, in the language that the projector was trained on.
    - samples at the temperatures of the config, the same every time, in that language too. Like "projector", not with an untrained
      projector.

    If all fire a gate, the text that fires the fewest and, of these, the likeliest.

    All but "window" and "halves" work on the audio as it is encoded; these two need its features. Whisper's states contain their position and their
    context, so a half is encoded by itself; halves cut from the states of the whole gave other texts, and not better ones
    (six segments of LibriSpeech dev-clean, 438 words: 16 errors, 12 when encoded by themselves, 14 undivided).

    Args:
        batch ([`EncodedBatch`]): of the one segment.
        default: how `first` was decoded; see `decode_segments`.
        generate_kwargs (`dict`): of the caller.
        first ([`Segment`]): the text that fired a gate.
        use_reader (`bool`): whether the reader proposed it.
    """

    def in_window(prompt, budgets, batch):
        return rescore(model, processor, prompt, budgets, batch, in_window=True)

    def greedy_ctc(prompt, budgets, batch):
        return [DecodedText(ids, ended=True) for ids in draft_texts(model, processor, batch.audio)]

    def sample(temperature: float) -> Callable:
        sampling = {**generate_kwargs, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return lambda prompt, budgets, batch: generate_text(model, prompt, budgets, sampling)

    seconds = batch.segments[0].duration_s
    fallbacks: dict[str | float, Callable] = {}
    reads_bare = use_reader and batch.clips is not None and not model.config.reader_config["in_window"]
    if reads_bare and seconds + SILENCE_S <= model.config.audio_window_s:
        fallbacks["window"] = in_window
    if batch.clips is not None and "left_out" in first.gates and seconds >= SHORTEST_TO_HALVE_S:
        fallbacks["halves"] = default
    if batch.requests[0].own_language and not model.leaves_projector_out:  # otherwise they would be nonsense
        fallbacks["projector"] = greedy_ctc
        fallbacks.update((value, sample(value)) for value in model.config.fallback_temperatures)
    attempts = [first]
    for name, decode in fallbacks.items():
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(FALLBACK_SEED)
            tried = encode_halves(model, processor, batch) if name == "halves" else batch
            attempt = merge_segments(decode_segments(model, processor, tried, decode, None, with_words=True))
        if attempt.text:
            attempt.fallback = name
            attempts.append(attempt)
        if not attempts[-1].gates or attempts[-1].rejected is not None:
            return attempts[-1]

    def badness(segment: Segment) -> tuple[int, float]:
        return len(segment.gates), math.inf if segment.mean_logprob is None else -segment.mean_logprob

    return min(attempts, key=badness)
