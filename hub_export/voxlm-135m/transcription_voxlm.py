"""Transcription: recordings of any length and number to text, words with times and confidences."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import soundfile
import torch
from transformers import DynamicCache
from transformers.utils import ModelOutput, logging

from .activity_voxlm import DETECTORS
from .alignment_voxlm import word_times
from .audio_voxlm import is_batch, one_for_each, stream_audio
from .ctc_voxlm import CTCPrefix, read_frames
from .decoding_voxlm import DecodedText, greedy_decode, is_plain_greedy, stop_tokens, token_entropies
from .joint_voxlm import joint_decode
from .pieces_voxlm import Piece, cut, halves, in_order, stitch
from .processing_voxlm import joined_text
from .quality_voxlm import fired_gates


logger = logging.get_logger(__name__)

# Token budget of one piece of audio: generous for fast speech (about 4 tokens a second in English) and for scripts that need
# a token or more per character.
TOKENS_PER_SECOND, TOKENS_AT_LEAST = 15, 16
# Where the projector's gate says how many frames carry a token, the text may be this much longer: beyond it is a loop.
TOKENS_PER_FRAME_HEARD = 1.25
# Pieces are sorted by length within so many batches, so that little is padding and little is in memory.
BATCHES_AHEAD = 4
# Seconds of audio, padding included, in one pass on a CPU: more only takes more memory there.
CPU_BATCH_S = 60.0
# A piece shorter than this is not read in halves.
SHORTEST_TO_HALVE_S = 2.0
# Of the samples drawn when a gate fires: the same text every time.
FALLBACK_SEED = 0


@dataclass
class VoxLMTranscription(ModelOutput):
    """
    The result for one recording; also a dict (`result["text"]`).

    Args:
        text (`str`): the transcript.
        words (`list[dict]`): `{"word", "start", "end", "confidence"}` in order, times in seconds of the recording, confidence
            in 0..1; empty when times were not asked for.
        duration (`float`): length of the recording in seconds.
        truncated (`bool`): whether the token budget ended the text somewhere before the model did.
        word_scores (`list[dict]`): for each word what its confidence was made from: `{"logprob", "entropy"}`, the LLM's raw
            log-probability of its tokens together and the highest entropy among them, in nats; and "reader", the reader's
            log-probability, where the text is a reader's.
        segments (`list[dict]`): the stretches the recording was cut into: `{"start", "end", "text", "mean_logprob", "gates",
            "fallback"}`. "fallback" says where the text is from if the first one fired a gate (see `_with_fallback`), "gates" which
            signs of nonsense (see `quality_voxlm.fired_gates`) the text that was chosen still shows. A text that was taken for
            music or noise is "rejected" and no part of the result.
        error (`str`, *optional*): why one recording of several could not be transcribed.
    """

    text: str | None = None
    words: list[dict] | None = None
    duration: float | None = None
    truncated: bool | None = None
    word_scores: list[dict] | None = None
    segments: list[dict] | None = None
    error: str | None = None


@dataclass
class Options:
    """What the caller of `transcribe` asked for."""

    sampling_rate: int | None
    with_words: bool
    batch_size: int
    longest_s: float
    vad: str
    generate_kwargs: dict


@dataclass
class Part:
    """A piece of a recording on its way to text; without a piece, the end of the recording or the error that ended it."""

    recording: int
    piece: Piece | None = None
    duration_s: float = 0.0
    error: Exception | None = None
    result: VoxLMTranscription | None = None


def word_confidence(score: dict, calibration: dict) -> float:
    """
    How likely a word is to be right: `sigmoid(scale * logit(p) + reader * logit(q) - entropy * h + bias)`.

    Platt scaling of the LLM's probability p of the word, of the reader's q if there is a reader and, since a distribution that is
    spread out says more about errors than its maximum does (Laptev and Ginsburg 2023), of the highest entropy h among the word's
    tokens. Monotone in each.

    Args:
        score (`dict`): one of `word_scores` of [`VoxLMTranscription`]; calibration (`dict`): `config.confidence_calibration`.
    """
    total = calibration["scale"] * probability_logit(score["logprob"]) + calibration["bias"]
    total -= calibration["entropy"] * score["entropy"]
    if "reader" in score:
        total += calibration.get("reader", 0.0) * probability_logit(score["reader"])
    return 1 / (1 + math.exp(-total))


def probability_logit(logprob: float) -> float:
    """Log-odds of a probability given by its logarithm, kept within 1e-4 of 0 and 1."""
    probability = min(max(math.exp(logprob), 1e-4), 1 - 1e-4)
    return math.log(probability / (1 - probability))


def transcribe(
    model,
    processor,
    audio,
    prompt=None,
    sampling_rate: int | None = None,
    return_timestamps: bool | str = "word",
    batch_size: int = 8,
    chunk_length_s: float | None = None,
    vad: str = "energy",
    stream: bool = False,
    **generate_kwargs,
):
    """
    Transcribe one or many recordings of any length.

    Files are read as a stream. What is longer than `chunk_length_s` is cut in its pauses; stretches without voice activity are
    left out. A text that shows signs of nonsense (`config.quality_gates`) is replaced: by what is read in each half by itself, where
    something was left out, by what the projector alone read, or by samples at `config.fallback_temperatures`.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes.
        prompt (`str` or `list[str]`, *optional*): instruction or context; by default the one the model was trained with.
        sampling_rate (`int`, *optional*): of bare arrays, by default the model's.
        return_timestamps (`bool` or `"word"`): whether to compute word times and confidences. The text is the same.
        batch_size (`int`): pieces of audio in one pass, at most; on a CPU also no more than a minute of audio.
        chunk_length_s (`float`, *optional*): longest piece; by default the config's, at most the model's window.
        vad (`"energy"` or `"silero"`): voice activity detector; the second needs the extra `vad`.
        stream (`bool`): return an iterator that yields results as they come: of one recording its segments, of a list its
            recordings, in order.
        **generate_kwargs: for `model.generate`. The default is greedy; any other search has no fallback.

    Returns:
        [`VoxLMTranscription`], or a list of them for a list, in which a recording that cannot be read has an `error` and spoils
        no other; with `stream=True` an iterator of them.

    Raises:
        ValueError: for an argument out of range, and for one recording that cannot be read; FileNotFoundError for a missing
            file.
    """
    items = list(audio) if is_batch(audio) else [audio]
    if not items:
        raise ValueError("No audio was given: the list is empty")
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    if chunk_length_s and chunk_length_s < 1:
        raise ValueError(f"`chunk_length_s` must be at least 1 second, got {chunk_length_s}")
    if vad not in DETECTORS:
        raise ValueError(f"`vad` must be one of {', '.join(map(repr, DETECTORS))}, got {vad!r}")
    prompts = one_for_each(prompt, len(items))
    for text in prompts:
        processor.render_prompt(text)
    DETECTORS[vad](processor.sampling_rate)
    options = Options(
        sampling_rate=sampling_rate,
        with_words=bool(return_timestamps),
        batch_size=batch_size,
        longest_s=min(model.config.audio_window_s, chunk_length_s or model.config.chunk_length_s or math.inf),
        vad=vad,
        generate_kwargs=generate_kwargs,
    )
    by_segment = stream and not is_batch(audio)
    parts = read_parts(processor, items, options)
    parts = transcribe_parts(
        model,
        processor,
        parts,
        prompts,
        options,
        known_seconds(items, sampling_rate or processor.sampling_rate),
        by_segment,
    )
    if by_segment:
        return (part.result for part in raised(joined(parts, options)) if part.piece is not None)
    results = whole_recordings(joined(parts, options) if is_batch(audio) else raised(joined(parts, options)))
    if stream:
        return results
    return list(results) if is_batch(audio) else next(results)


def read_parts(processor, items: list, options: Options) -> Iterator[Part]:
    """The recordings, read block by block, as pieces in order, each recording followed by its end."""
    rate = processor.sampling_rate
    for number, item in enumerate(items):
        samples = 0

        def blocks(item=item):
            nonlocal samples
            for block in stream_audio(item, rate, options.sampling_rate):
                samples += len(block)
                yield block

        try:
            for piece in cut(blocks(), DETECTORS[options.vad](rate), rate, options.longest_s):
                if piece.start == 0:
                    processor.check_length(len(piece.waveform))
                yield Part(number, piece)
            processor.check_length(samples)
            yield Part(number, duration_s=samples / rate)
        except (OSError, ValueError) as error:
            yield Part(number, duration_s=samples / rate, error=error)


@torch.no_grad()
def transcribe_parts(
    model, processor, parts: Iterable[Part], prompts: list, options: Options, seconds: float | None, at_once: bool
) -> Iterator[Part]:
    """
    The parts in the same order, their pieces transcribed in batches of like length.

    Args:
        seconds (`float`, *optional*): length of all recordings, for the progress bar.
        at_once (`bool`): rather the first result soon than the best batches.
    """
    rate = processor.sampling_rate
    shown = seconds is None or seconds > 2 * options.longest_s
    with logging.tqdm(
        total=seconds and round(seconds), unit=" s of audio", desc="Transcribing", disable=not shown
    ) as bar:
        for window in windows(parts, options.batch_size, at_once):
            pieces = sorted(
                (part for part in window if part.piece is not None), key=lambda part: len(part.piece.waveform)
            )
            limit_s = CPU_BATCH_S if model.device.type == "cpu" else math.inf
            for batch in batches(pieces, options.batch_size, limit_s * rate):
                results = _transcribe_batch(
                    model,
                    processor,
                    [part.piece for part in batch],
                    [prompts[part.recording] for part in batch],
                    options,
                )
                for part, result in zip(batch, results):
                    part.result = result
                    bar.update(round(len(part.piece.waveform) / rate))
            yield from window


def batches(pieces: list[Part], size: int, samples: float) -> Iterator[list[Part]]:
    """Pieces, sorted by length, in batches of at most `size` and, with their padding, of at most `samples`."""
    batch: list[Part] = []
    for part in pieces:
        if len(batch) == size or batch and (len(batch) + 1) * len(part.piece.waveform) > samples:
            yield batch
            batch = []
        batch.append(part)
    if batch:
        yield batch


def windows(parts: Iterable[Part], batch_size: int, at_once: bool) -> Iterator[list[Part]]:
    """Parts in groups of `BATCHES_AHEAD` batches; with `at_once`, of one batch, the first of a single piece."""
    window: list[Part] = []
    size = 1 if at_once else BATCHES_AHEAD * batch_size
    for part in parts:
        window.append(part)
        if sum(part.piece is not None for part in window) >= size:
            yield window
            window, size = [], batch_size if at_once else size
    yield window


def joined(parts: Iterable[Part], options: Options) -> Iterator[Part]:
    """Transcribed parts, without the words that two pieces both have where they overlap."""
    waiting = None
    for part in parts:
        if part.piece is not None and part.piece.overlap:
            _join(waiting.result, part.result)
        if waiting is not None:
            yield _as_asked(waiting, options)
        waiting = part
    if waiting is not None:
        yield _as_asked(waiting, options)


def _as_asked(part: Part, options: Options) -> Part:
    """The part, its words left out where times were not asked for."""
    if part.result is not None and not options.with_words:
        part.result.words, part.result.word_scores = [], []
    return part


def _join(left: VoxLMTranscription, right: VoxLMTranscription):
    """Leave out, in place, what two neighbouring pieces heard twice."""
    start_s, end_s = right.segments[0]["start"], left.segments[0]["end"]
    kept, dropped = stitch(left.words, right.words, start_s, end_s)
    for result, words in ((left, slice(0, kept)), (right, slice(dropped, None))):
        ends, position = [], 0
        for word in result.words:
            position = result.text.index(word["word"], position) + len(word["word"])
            ends.append(position)
        first, last = words.start or 0, len(ends) if words.stop is None else words.stop
        result.text = result.text[ends[first - 1] if first else 0 : ends[last - 1] if last else 0].strip()
        result.words, result.word_scores = result.words[words], result.word_scores[words]
        result.segments[0]["text"] = result.text
    cut_s = max([start_s, *(word["end"] for word in left.words[-1:])])
    in_order(right.words, cut_s)
    left.segments[0]["end"] = right.segments[0]["start"] = round(cut_s, 3)


def raised(parts: Iterable[Part]) -> Iterator[Part]:
    """The parts, up to the first error, which is raised."""
    for part in parts:
        if part.error is not None:
            raise part.error
        yield part


def in_a_row(results: list[VoxLMTranscription]) -> dict:
    """Text, words and what belongs to them of results that follow each other."""
    return {
        "text": joined_text([result.text for result in results]),
        "words": [word for result in results for word in result.words],
        "truncated": any(result.truncated for result in results),
        "word_scores": [score for result in results for score in result.word_scores],
    }


def whole_recordings(parts: Iterable[Part]) -> Iterator[VoxLMTranscription]:
    """One result for each recording."""
    pieces: list[VoxLMTranscription] = []
    for part in parts:
        if part.piece is not None:
            pieces.append(part.result)
            continue
        error = None
        if part.error is not None:
            error, pieces = " ".join(str(part.error).split()), []
            logger.warning(f"Recording {part.recording} could not be transcribed: {error}")
        yield VoxLMTranscription(
            **in_a_row(pieces),
            duration=round(part.duration_s, 3),
            segments=[segment for piece in pieces for segment in piece.segments],
            error=error,
        )
        pieces = []


def known_seconds(items: list, rate: int) -> float | None:
    """Length of all recordings as far as it is known before they are read, `None` where one does not say."""
    total = 0.0
    for item in items:
        item = item.get("path") or item.get("array", item.get("raw")) if isinstance(item, dict) else item
        if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim:
            total += item.shape[-1] / rate
        elif isinstance(item, (str, os.PathLike)):
            try:
                total += soundfile.info(item).duration
            except (soundfile.LibsndfileError, RuntimeError):
                continue  # reading it will say what is wrong
        else:
            return None
    return total


def _transcribe_batch(
    model, processor, pieces: list[Piece], prompts: list, options: Options
) -> list[VoxLMTranscription]:
    """One result for each piece, read in one pass; with greedy search, those that fire a gate once more, each by itself."""
    # Words are needed to join overlapping pieces too.
    with_words = options.with_words or any(piece.overlap or piece.continues for piece in pieces)
    if not is_plain_greedy(model.generation_config, options.generate_kwargs):

        def search(prompt, budgets, audio):
            return _generate(model, prompt, budgets, options.generate_kwargs)

        return _read(model, processor, pieces, prompts, options, search, with_words)

    def greedy(prompt, budgets, audio):
        if model.reader is not None:
            return joint_decode(model, processor, prompt, budgets, audio)
        prefixes = None
        if model.config.ctc_weight:
            embeddings = model.get_input_embeddings().weight
            prefixes = [CTCPrefix(frames, embeddings) for frames in read_frames(model, audio)]
        return greedy_decode(model, prompt, budgets, draft_texts(model, processor, audio), prefixes)

    results = _read(model, processor, pieces, prompts, options, greedy, with_words)
    return [
        _with_fallback(model, processor, piece, prompt, options, greedy, result)
        if result.segments[0]["gates"]
        else result
        for piece, prompt, result in zip(pieces, prompts, results)
    ]


def _with_fallback(
    model, processor, piece: Piece, prompt, options: Options, greedy, first: VoxLMTranscription
) -> VoxLMTranscription:
    """
    The first text of one piece that no gate fires for. Where something was left out, each half by itself ("halves"); then what the
    projector alone read ("projector"); then samples, the same every time, at the temperatures of the config. If there is none, that
    with the fewest gates, and of these the likeliest.
    """

    def reading(prompt, budgets, audio):
        return DecodedText(ids=draft_texts(model, processor, audio), ended=[True])

    def sample(temperature):
        sampling = {**options.generate_kwargs, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return lambda prompt, budgets, audio: _generate(model, prompt, budgets, sampling)

    attempts, parts = [first], {}
    if "left_out" in first.segments[0]["gates"] and first.duration >= SHORTEST_TO_HALVE_S:
        parts["halves"] = halves(piece, processor.sampling_rate), greedy
    parts["projector"] = [piece], reading
    parts.update((value, ([piece], sample(value))) for value in model.config.fallback_temperatures)
    for name, (pieces, decode) in parts.items():
        if not attempts[-1].segments[0]["gates"] or "rejected" in attempts[-1].segments[0]:
            return attempts[-1]
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(FALLBACK_SEED)
            prompts = [prompt] * len(pieces)
            attempt = _as_one(_read(model, processor, pieces, prompts, options, decode, with_words=True))
        if attempt.text:
            attempt.segments[0]["fallback"] = name
            attempts.append(attempt)
    segments = [attempt.segments[0] for attempt in attempts]
    unlikely = [math.inf if segment["mean_logprob"] is None else -segment["mean_logprob"] for segment in segments]
    return min(zip(attempts, segments, unlikely), key=lambda one: (len(one[1]["gates"]), one[2]))[0]


def _as_one(results: list[VoxLMTranscription]) -> VoxLMTranscription:
    """The result for a piece that was read in parts, as if at once, but for parts that were rejected; as likely as the unlikeliest."""
    start, end = results[0].segments[0]["start"], results[-1].segments[0]["end"]
    duration = sum(result.duration for result in results)
    kept = [result for result in results if "rejected" not in result.segments[0]] or results
    segments = [result.segments[0] for result in kept]
    likelihoods = [segment["mean_logprob"] for segment in segments if segment["mean_logprob"] is not None]
    whole = in_a_row(kept)
    segment = {
        **segments[0],
        "start": start,
        "end": end,
        "text": whole["text"],
        "mean_logprob": min(likelihoods, default=None),
        "gates": sorted({gate for segment in segments for gate in segment["gates"]}),
    }
    return VoxLMTranscription(**whole, duration=duration, segments=[segment])


def _read(model, processor, pieces: list[Piece], prompts: list, options: Options, decode, with_words: bool):
    """
    One padded batch of pieces to one result each.

    Args:
        decode: function of the prompt, the token budgets and the [`VoxLMAudioOutput`] of the batch to [`DecodedText`].
    """
    rate = processor.sampling_rate
    inputs = processor.apply_transcription_request([piece.waveform for piece in pieces], prompt=prompts)
    inputs = inputs.to(model.device)
    features = {name: value for name, value in inputs.items() if name.startswith(processor.feature_name)}
    # Encoded once, for the generation and for the word times.
    audio = model.get_audio_features(**features)
    durations_s = [len(piece.waveform) / rate for piece in pieces]
    heard = frames_heard(model, audio)
    given_budget = options.generate_kwargs.get("max_new_tokens")
    prompt = prompt_with_audio(model, inputs, audio)
    text = decode(prompt, token_budgets(heard, durations_s, given_budget), audio)
    if with_words and any(text.ids) and (text.states is None or model.alignment.states_at_tokens):
        read_states(model, prompt, text)
    results = []
    for row, (piece, ids, ended) in enumerate(zip(pieces, text.ids, text.ended)):
        if text.written is not None:
            written, logprob = text.written[row].text, text.written[row].mean_logprob
        else:
            written = processor.decode_text(ids).strip()
            logprob = float(text.logprobs[row, : len(ids)].mean()) if ids and text.logprobs is not None else None
        start_s = piece.start / rate
        segment = {
            "start": round(start_s, 3),
            "end": round(start_s + durations_s[row], 3),
            "text": written,
            "mean_logprob": None if logprob is None else round(logprob, 4),
            "gates": fired_gates(
                written,
                logprob,
                piece.active,
                None if heard is None else heard[row],
                len(ids),
                not ended and given_budget is None,
                model.config.quality_gates,
            ),
            "fallback": None,
        }
        results.append(
            VoxLMTranscription(
                text=written,
                words=[],
                duration=durations_s[row],
                truncated=not ended,
                word_scores=[],
                segments=[segment],
            )
        )
    if with_words and any(text.ids):
        _add_words(model, processor, text, audio, results)
    for result, piece in zip(results, pieces):
        segment = result.segments[0]
        for word in result.words:
            for edge in ("start", "end"):
                word[edge] = round(word[edge] + piece.start / rate, 3)
        if "no_speech" in segment["gates"]:
            segment["rejected"], segment["text"] = segment["text"], ""
            result.text, result.words, result.word_scores, result.truncated = "", [], [], False
    return results


def prompt_with_audio(model, inputs, audio) -> dict[str, torch.Tensor]:
    """
    What the model's `forward` takes for a prompt whose audio ([`VoxLMAudioOutput`]) is projected already.

    Frames that the gate hides are left out, so that the LLM spends nothing on them (not where the config asks for the full
    window: that is what it gets).
    """
    ids = inputs["input_ids"]
    mask = model.hide_gated_frames(ids, inputs["attention_mask"], audio)
    audio_mask = audio.audio_embeds_mask
    if audio.speech_logits is not None and not model.config.pad_audio_to_window:
        audio_mask = audio_mask * model.projector.keep(audio.speech_logits).to(audio_mask)
        # Hidden places to the left, where the padding is; the order of the others stays.
        order = mask.argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
        ids, mask = ids.gather(1, order), mask.gather(1, order)
        # What is padding now must not look like audio.
        ids = ids.masked_fill((mask == 0) & (ids == model.config.audio_token_id), 0)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "audio_embeds": audio.pooler_output,
        "audio_embeds_mask": audio_mask,
    }


def draft_texts(model, processor, audio) -> list[list[int]]:
    """What the projector alone reads in each recording, in the LLM's own tokenization; empty where it does not read."""
    # A cache with a sliding window counts tokens that the mask hides, so rejected drafts would push real ones out.
    sliding = DynamicCache(config=model.config.text_config).is_sliding
    if audio.tokens is None or any(sliding):
        return [[] for _ in audio.frame_mask]
    texts = [processor.text_prefix + processor.decode_text(row[row >= 0]).lstrip() for row in audio.tokens.cpu()]
    special = processor.special_ids
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [[token for token in row if token not in special] for row in ids]


def _generate(model, prompt, budgets: list[int], generate_kwargs: dict) -> DecodedText:
    """
    Stock `generate`, for beams, sampling and whatever else its options say; without the LLM's states.

    The prompt goes in as embeddings, so that penalties on repetition see the text alone.
    """
    options = {"do_sample": False, **generate_kwargs, "max_new_tokens": max(budgets)}
    embeds = model.merge_audio(prompt["input_ids"], None, prompt["audio_embeds"], prompt["audio_embeds_mask"])
    attention_mask = prompt["attention_mask"]
    output = model.generate(
        inputs_embeds=embeds, attention_mask=attention_mask, **options, return_dict_in_generate=True
    )
    new_ids = output.sequences
    # Each row at its own budget, so that the text does not depend on what else is in the batch.
    stops = stop_tokens(model.generation_config.eos_token_id)
    rows = [_until_stop(row[:budget], stops) for row, budget in zip(new_ids.tolist(), budgets)]
    return DecodedText(ids=[ids for ids, _ in rows], ended=[ended for _, ended in rows])


def read_states(model, prompt, text: DecodedText):
    """
    Fill in the states and log-probabilities of a text by a teacher-forced pass over prompt and text.

    The pass sees the same tokens as the generation did, so the states are those of the text that was chosen.
    """
    text_ids = _pad_ids(text.ids, prompt["input_ids"].device)
    longest = text_ids.shape[1]
    lengths = torch.tensor([len(ids) for ids in text.ids], device=text_ids.device)
    text_mask = (torch.arange(longest, device=text_ids.device) < lengths.unsqueeze(1)).to(prompt["attention_mask"])
    output = model(
        **{
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], text_ids], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], text_mask], dim=1),
        },
        output_hidden_states=True,
        logits_to_keep=longest + 1,
        use_cache=False,
    )
    text.states = model.text_states(output.hidden_states[-1], output.hidden_states[-1].shape[1] - longest)
    logprobs = output.logits[:, :-1].float().log_softmax(-1)
    text.logprobs = logprobs.gather(-1, text_ids.unsqueeze(-1)).squeeze(-1)
    text.entropies = token_entropies(logprobs)


def _pad_ids(rows: list[list[int]], device) -> torch.Tensor:
    """Token ids of rows of unlike length, `(batch, tokens)`, padded on the right with 0."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in rows]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)


def frames_heard(model, audio) -> list[int] | None:
    """Projected frames of each recording that carry a token; `None` for models without a frame gate."""
    if audio.speech_logits is None:
        return None
    return (model.projector.keep(audio.speech_logits) & audio.audio_embeds_mask.bool()).sum(-1).tolist()


def token_budgets(heard: list[int] | None, durations_s: list[float], max_new_tokens: int | None) -> list[int]:
    """
    Most tokens that each recording's text may have: what the caller says, else a generous bound from the audio.

    Args:
        heard: see `frames_heard`; durations_s: of each recording, in seconds.
    """
    if max_new_tokens is not None:
        return [max_new_tokens] * len(durations_s)
    if heard is not None:
        return [int(TOKENS_PER_FRAME_HEARD * count) + TOKENS_AT_LEAST for count in heard]
    return [int(TOKENS_PER_SECOND * duration_s) + TOKENS_AT_LEAST for duration_s in durations_s]


def _until_stop(ids: list[int], stops: set[int]) -> tuple[list[int], bool]:
    """The ids before the first stop token, and whether there was one."""
    for position, token in enumerate(ids):
        if token in stops:
            return ids[:position], True
    return ids, False


def _add_words(model, processor, text: DecodedText, audio, results):
    """Fill `results` with words, times and confidences."""
    scores = model.align_scores(text.states, _pad_ids(text.ids, text.states.device), audio)
    frame_counts = model.alignment.keys_of(audio)[1].sum(-1).tolist()
    frame_s = processor.frame_s * model.alignment.frames_per_key
    for row, result in enumerate(results):
        words, token_words = words_of(processor, text, row)
        # A model fed the full window has frames of silence after the recording's end.
        frames = min(frame_counts[row], max(1, round(result.duration / frame_s)))
        width = model.config.alignment_median_width
        times = word_times(scores, row, token_words, frames, frame_s, result.duration, words, width)
        places = [np.flatnonzero(token_words == number).tolist() for number in range(len(words))]
        result.word_scores = word_scores(text, row, places)
        result.words = [
            {"word": word, "start": start, "end": end, "confidence": confidence}
            for word, (start, end), confidence in zip(words, times, confidences(result.word_scores, model.config))
        ]


def words_of(processor, text: DecodedText, row: int) -> tuple[list[str], np.ndarray]:
    """The words of one row of a text, and `(tokens,)` the number of the word of each token, -1 for those of none."""
    if text.written is not None:
        return text.written[row].words, text.written[row].token_words
    words = processor.split_words(text.ids[row])
    token_words = np.full(len(text.ids[row]), -1)
    for number, word in enumerate(words):
        token_words[word.tokens] = number
    return [word.text for word in words], token_words


def word_scores(text: DecodedText, row: int, word_tokens: list[list[int]]) -> list[dict]:
    """`word_scores` of [`VoxLMTranscription`] for the words of one row, whose tokens are at `word_tokens`."""
    # The probability of a word is the product over its tokens: all of them are needed to write it.
    scores = [
        {
            "logprob": round(float(text.logprobs[row, tokens].sum()), 4),
            "entropy": round(float(text.entropies[row, tokens].max()), 4),
        }
        for tokens in word_tokens
    ]
    if text.written is not None:
        for score, logprob in zip(scores, text.written[row].reader_logprobs):
            score["reader"] = round(logprob, 4)
    return scores


def confidences(scores: list[dict], config) -> list[float]:
    """Calibrated confidences of words with these `word_scores`."""
    return [round(word_confidence(score, config.confidence_calibration), 4) for score in scores]
