"""Generation: `generate`, `transcribe` and `align`, and how recordings pass through the model."""

import math
import numbers
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .audio_voxlm import RATES, check_rate, file_duration_s, is_batch, stream_audio
from .decoding_voxlm import (
    MIN_TOKENS,
    check_flag,
    check_prompt_length,
    pack_left,
    padded_batches,
    search_options,
    token_budget,
)
from .fallback_voxlm import check_llm_can_write, transcribe_batch
from .forced_alignment_voxlm import align_segments, align_text, known_text
from .language_voxlm import with_languages
from .pipeline_voxlm import VoxLMASRPipeline, check_timestamps
from .placeholders_voxlm import audio_by_prompt, cache_of, feature_mask, gated_mask, hidden_in_cache, past_length
from .processing_voxlm import VoxLMProcessor, one_for_each
from .request_voxlm import OWN_LANGUAGE, Request, check_search, make_requests
from .segmentation_voxlm import DETECTORS, AudioSegment, segment_audio
from .transcript_ids_voxlm import (
    asked_step_outputs,
    batch_for_transcript,
    check_own_language,
    new_token_budget,
    options_of_llm_alone,
    padded_output,
    popped_language,
    transcript_ids,
)
from .transcription_voxlm import Segment, VoxLMTranscription, error_line, join_segments, trim_overlap


logger = logging.get_logger(__name__)
# Of recordings that fail alone; a caller who reports them anyway can disable it.
recording_logger = logging.get_logger(f"{__name__}.recordings")

# Segments are sorted by length within this many batches, so that little is padding and little is in memory. Chosen by hand.
BATCHES_AHEAD = 4
# Seconds of audio in one pass on a CPU, padding included: there, more only takes more memory. Chosen by hand.
CPU_BATCH_S = 60.0
# Audio of unknown length gets a progress bar after this many seconds of work. Chosen by hand.
BAR_AFTER_S = 5.0
# The shortest segment that a caller may ask for.
SHORTEST_CHUNK_S = 1.0
# The encoder's inputs, and the targets of training batches that `Seq2SeqTrainer` hands to `generate` with the rest.
FEATURES = ("input_features", "input_features_mask", "input_values", "input_values_mask")
TARGETS = ("token_words", "spelling", "spelling_words", "word_times", "frame_times")


@dataclass
class TranscriptionOptions:
    """
    What the caller of `transcribe` asks for.

    Args:
        sampling_rate (`int`, *optional*): of bare arrays, in Hz.
        with_words (`bool`): whether to compute word times and confidences.
        batch_size (`int`): most segments in one pass.
        longest_s (`float`): longest segment, in seconds.
        vad (`str`): name of the voice activity detector.
        use_reader (`bool`): whether the reader proposes the text.
        generate_kwargs (`dict`): for `generate`.

    Raises:
        ValueError: for a batch size or a number of beams that is no integer of at least 1, a sampling rate outside of
            `audio_voxlm.RATES`, or an unknown detector.
    """

    sampling_rate: int | None = None
    with_words: bool = True
    batch_size: int = 8
    longest_s: float = math.inf
    vad: str = "energy"
    use_reader: bool = True
    generate_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.batch_size is None:
            raise ValueError("`batch_size` must be an integer of at least 1, got None")
        check_number("batch_size", self.batch_size, 1, whole=True)
        check_number("num_beams", self.generate_kwargs.get("num_beams"), 1, whole=True)
        check_flag("use_reader", self.use_reader)
        if self.sampling_rate is not None:
            check_rate(self.sampling_rate)
        if not isinstance(self.vad, str) or self.vad not in DETECTORS:
            raise ValueError(f"`vad` must be one of {', '.join(map(repr, DETECTORS))}, got {self.vad!r}")


@dataclass
class SegmentTask:
    """
    A segment of one of several recordings on its way to text; without a segment, the end of the recording.

    Args:
        recording (`int`): index of the recording.
        audio ([`AudioSegment`], *optional*)
        result ([`Segment`], *optional*): its transcription.
        duration_s (`float`): at the end of a recording, its length in seconds.
        error (`Exception`, *optional*): what ended the recording early.
        spoken (`dict`): language and its probability, see [`Request`].
    """

    recording: int
    audio: AudioSegment | None = None
    result: Segment | None = None
    duration_s: float = 0.0
    error: Exception | None = None
    spoken: dict = field(default_factory=dict)


class VoxLMGenerationMixin(GenerationMixin):
    """`generate` as everywhere in transformers; `transcribe` and `align` on top of it."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, use_reader: bool = True, **kwargs):
        """
        Token ids, as everywhere in transformers: with `input_ids`, the prompt and the new ids behind it.

        Greedily, which is the default, they are the ids of the text that `transcribe` writes for the same audio, quality gates
        and fallbacks included, in the LLM's vocabulary. `max_new_tokens`, `max_length` and `return_dict_in_generate` keep their
        meaning. Every other search (beams, sampling, processors of scores, ...), and prompts with several audios, a cache or
        embeddings, are the LLM's alone, which a warning says once where the model has a reader.

        With the audio alone (no `input_ids`) the prompt is the trained one, and the result has the new ids alone. Input features
        may be the first argument, as of Whisper. A waveform as the first argument (an array, or a tensor of floating-point or
        16-bit numbers) is handed to `transcribe`, whose result has `["text"]` and `["words"]`. Audio longer than
        `config.chunk_length_s`, of which `transcribe` makes several segments, stays whole.

        With `labels`, as [`Seq2SeqTrainer`] passes them, the result is the new ids alone, to be compared with them; reference
        texts in `input_ids` (`VoxLMProcessor.collate` for training) are taken out of the prompt first.

        Args:
            use_reader (`bool`): whether the reader, where there is one, proposes the text. Without it the LLM writes by itself.
            **kwargs: also `language` (not `None`, which stands for the checkpoint's) and `task`, "transcribe", as of Whisper.

        Raises:
            ValueError: for audio that does not fit the placeholders of the prompt or, with a cache, of that part of the prompt
                that is not in the cache yet; for a prompt longer than the LLM's context; and, with a reader, for a `streamer` or
                outputs of every step (`output_scores`, ...), which only a text of the LLM's has: pass `use_reader=False`.
        """
        check_flag("use_reader", use_reader)
        if is_waveform(inputs) and kwargs.get("input_ids") is None:
            if inputs.ndim != 3:
                return self.transcribe(inputs, *args, use_reader=use_reader, **kwargs)
            inputs, kwargs["input_features"] = None, torch.as_tensor(inputs)
        if args:  # of the rest, positional ones are rare, and they are the LLM's alone
            kwargs["generation_config"], *args = args
        check_number("num_beams", kwargs.get("num_beams"), 1, whole=True)
        if kwargs.get("input_ids") is not None and inputs is None:
            inputs = kwargs.pop("input_ids")
        labels, language = kwargs.pop("labels", None), popped_language(kwargs)
        for name in TARGETS:
            kwargs.pop(name, None)
        if labels is not None and inputs is not None and labels.shape == inputs.shape:
            inputs, kwargs["attention_mask"] = self._without_answers(inputs, kwargs.get("attention_mask"), labels)
        features = self._input_features(kwargs)
        audio, only_new = self._encode_inputs(features, kwargs), labels is not None
        if audio is not None and inputs is None and kwargs.get("inputs_embeds") is None:
            inputs, kwargs["attention_mask"] = self._trained_prompts(audio)
            only_new = True
        if audio is not None and not args and self._writes_transcripts(inputs, audio, kwargs, use_reader):
            processor = self.get_processor()
            requests = make_requests(self, processor, len(inputs), language=language, use_reader=use_reader)
            batch = batch_for_transcript(
                self, processor, inputs, kwargs.get("attention_mask"), features, audio, requests
            )
            budget = new_token_budget(kwargs, 0 if only_new else inputs.shape[1])
            rows = transcript_ids(self, processor, batch, budget, use_reader)
            return padded_output(self, None if only_new else inputs, rows, kwargs)
        check_own_language(self, language)
        return self._generate_by_llm(inputs, audio, only_new, *args, **kwargs)

    def _writes_transcripts(self, input_ids, audio, kwargs: dict, use_reader: bool) -> bool:
        """
        Whether `generate` is asked for what `transcribe` writes.

        Raises:
            ValueError: with a reader, for what only a text of the LLM's has.
        """
        has_reader = use_reader and self.reader is not None
        others, outputs = options_of_llm_alone(self, input_ids, audio, kwargs), asked_step_outputs(kwargs)
        if has_reader and others:
            logger.warning_once(f"The reader cannot follow {', '.join(others)}: `generate` is the LLM alone")
        elif has_reader and outputs:
            raise ValueError(
                f"`{outputs[0]}` is for texts that the LLM writes step by step, and here the reader proposes the text; pass "
                "`use_reader=False` to have one by the LLM alone"
            )
        # A model that nobody gave a processor cannot transcribe.
        has_processor = has_reader or self.processor is not None or bool(self.config._name_or_path)
        return not others and not outputs and has_processor

    def _generate_by_llm(self, inputs, audio, only_new: bool, *args, **kwargs):
        """`generate` by the library's loops; the audio is encoded once, before the first step."""
        if audio is not None:
            check_llm_can_write(self)
        if only_new and audio is not None:
            kwargs["max_new_tokens"] = self._new_tokens(audio, kwargs)
        hidden = self._place_audio(inputs, audio, kwargs)
        whole = inputs if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        check_prompt_length(self.config, kwargs.get("attention_mask"), whole)
        output = super().generate(inputs, *args, **kwargs)
        if hidden is not None:
            # Whoever continues from the cache has a mask of the tokens, which does not say what the gate hides.
            for cache in (kwargs.get("past_key_values"), kwargs.get("cache"), cache_of(output)):
                if cache is not None:
                    cache.hidden_positions = hidden
        if not only_new or inputs is None:
            return output
        if isinstance(output, torch.Tensor):
            return output[:, inputs.shape[1] :]
        output.sequences = output.sequences[:, inputs.shape[1] :]
        return output

    def _trained_prompts(self, audio):
        """The trained prompt for each audio of a batch, as `input_ids` and `attention_mask`."""
        processor = self.get_processor()
        counts = audio.audio_embeds_mask.sum(-1).tolist()
        prompts = processor.prompt_ids([processor.render_prompt()] * len(counts), counts)
        return prompts["input_ids"].to(self.device), prompts["attention_mask"].to(self.device)

    def _new_tokens(self, audio, kwargs: dict) -> int:
        """
        How many tokens `generate` may add where it returns the new ones alone: what the caller says, `max_length` included,
        which counts them too then ([`Seq2SeqTrainer`] knows no other), or one for each projected frame.
        """
        configs = [config for config in (kwargs.get("generation_config"), self.generation_config) if config is not None]
        given = [kwargs.pop("max_new_tokens", None), kwargs.pop("max_length", None)]
        given += [config.max_new_tokens for config in configs]
        given.append(int(audio.audio_embeds_mask.sum(-1).max()) + MIN_TOKENS)
        return next(value for value in given if value is not None)

    def _without_answers(self, input_ids, attention_mask, labels):
        """Prompts and their mask, padded on the left, of training batches: what has a label is left out."""
        pad_token_id = self.config.pad_token_id or 0
        real = input_ids != pad_token_id if attention_mask is None else attention_mask.bool()
        kept = (labels == -100) & real
        columns = {"input_ids": (input_ids, pad_token_id), "attention_mask": (kept.long(), 0)}
        packed = pack_left(kept, columns)
        return packed["input_ids"], packed["attention_mask"]

    def _input_features(self, kwargs: dict) -> dict[str, torch.Tensor]:
        """
        The encoder's inputs among the arguments of `generate`, which are taken out, with their mask. Without one, features that
        are zero at the end of a clip are padding (no feature of audio is exactly 0), as pad tokens are in `input_ids`.
        """
        features = {name: value for name in FEATURES if (value := kwargs.pop(name, None)) is not None}
        for name in ("input_features", "input_values"):
            if name in features and not features[name].isfinite().all():
                raise ValueError(f"`{name}` has values that are not finite (NaN or infinite)")
            if name in features and f"{name}_mask" not in features:
                features[f"{name}_mask"] = feature_mask(features[name], self.time_axis)
        return features

    def _encode_inputs(self, features: dict[str, torch.Tensor], kwargs: dict):
        """Encode and project audio: features or, among the arguments of `generate`, states, which are taken out; `None` without."""
        states, states_mask = kwargs.pop("audio_states", None), kwargs.pop("audio_states_mask", None)
        if features:
            return self.get_audio_features(**features)
        return None if states is None else self.project(states, states_mask)

    def _place_audio(self, input_ids, audio, kwargs: dict):
        """
        Put encoded audio in its place among the arguments of `generate`, and the mask of what the LLM sees.

        Returns:
            the positions `(batch, length)` that the frame gate hides, `None` without audio or without a gate.
        """
        cache = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
        mask, embeds = kwargs.get("attention_mask"), kwargs.get("inputs_embeds")
        whole = input_ids if embeds is None else embeds
        if whole is None or audio is None and hidden_in_cache(cache, len(whole)) is None:
            return None
        if mask is None and input_ids is not None and self.config.pad_token_id is not None:
            mask = (input_ids != self.config.pad_token_id).long()
        # With a cache, the ids are either the whole sequence or, with a longer mask, only what is new.
        done = past_length(cache) if mask is None or mask.shape[1] == whole.shape[1] else 0
        batch, length = whole.shape[0], whole.shape[1] - done
        new_ids, new_embeds = (None if part is None else part[:, done:] for part in (input_ids, embeds))
        shown = None if audio is None else self.shown_positions(new_ids, audio, new_embeds)
        gated, hidden = gated_mask(mask, cache, shown, batch, length)
        if gated is not mask:
            kwargs["attention_mask"] = gated
        if audio is None:
            return None
        if embeds is None:
            placeholders = self._placeholders(new_ids, audio.audio_embeds_mask)
            found = audio_by_prompt(placeholders, audio.pooler_output, audio.audio_embeds_mask)
            kwargs["audio_embeds"], kwargs["audio_embeds_mask"] = found
        else:
            merged = self.merge_audio(new_ids, new_embeds, audio.pooler_output, audio.audio_embeds_mask)
            kwargs["inputs_embeds"] = torch.cat([embeds[:, :done], merged], dim=1)
        return hidden

    def prepare_inputs_for_generation(
        self,
        *args,
        inputs_embeds=None,
        is_first_iteration=False,
        audio_embeds=None,
        audio_embeds_mask=None,
        cache=None,
        **kwargs,
    ) -> dict:
        """
        [`GenerationMixin.prepare_inputs_for_generation`]; with a cache, only the pass over the prompt takes the encoded audio,
        as the library has it for inputs whose names it knows.
        """
        # `generate` accepts what this signature names.
        kwargs |= {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        if audio_embeds is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            kwargs |= {"audio_embeds": audio_embeds, "audio_embeds_mask": audio_embeds_mask}
        if cache is not None:  # what `past_key_values` is called from 5.24 on
            kwargs["cache"] = cache
        return super().prepare_inputs_for_generation(*args, **kwargs)

    def transcribe(
        self,
        audio,
        prompt=None,
        sampling_rate: int | None = None,
        context=None,
        hotwords=None,
        language: str | list | None = OWN_LANGUAGE,
        return_timestamps: bool | str = "word",
        batch_size: int = 8,
        chunk_length_s: float | None = None,
        vad: str = "energy",
        stream: bool = False,
        use_reader: bool = True,
        **generate_kwargs,
    ) -> VoxLMTranscription | list[VoxLMTranscription] | Iterator[VoxLMTranscription]:
        """
        Transcribe one or many recordings of any length.

        Files are streamed. A recording longer than `chunk_length_s` is split at pauses; stretches without voice activity are
        skipped. A text that fires a quality gate (`config.quality_gates`) is replaced by a fallback; see
        `fallback_voxlm.with_fallback`.

        Args:
            audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes.
            prompt (`str` or `list[str]`, *optional*): instruction; by default the trained prompt.
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz, by default the model's.
            context (`str` or `list[str]`, *optional*): what the recording is about, names, or the text before it. Its last 1000
                characters are in the LLM's prompt, and of these the last tokens that fit into half of the reader's.
            hotwords (`list[str]`, or a list with one for each recording, *optional*): up to 2000 words and terms to expect, see
                `biasing_voxlm`. Of more than 40, those are sought in a segment that are spelt most like something in it. Symbols
                that the reader never writes, such as quotation marks, cannot be expected.
            language (`str` or `list`, *optional*): name or code; by default that of the checkpoint. `None` lets the reader detect
                it, once for each recording. In a language that is not the checkpoint's the text is the reader's own, and word
                times and confidences are less exact.
            return_timestamps (`bool` or `"word"`): whether to compute word times and confidences. The text is the same.
            batch_size (`int`): most segments in one pass; on a CPU also at most a minute of audio.
            chunk_length_s (`float`, *optional*): longest segment in seconds; by default the config's, at most the model's
                window.
            vad (`"energy"` or `"silero"`): voice activity detector; the second needs the extra `vad`.
            stream (`bool`): return an iterator that yields results as they are ready: the segments of one recording, or the
                recordings of a list, in order.
            use_reader (`bool`): whether the reader, where there is one, proposes the text. Without it the LLM writes by itself,
                with the projector's CTC beside it where `config.ctc_weight` says so.
            **generate_kwargs: for `generate`. The default is greedy; any other search, and any text with a given
                `max_new_tokens`, has no fallback.

        Returns:
            [`VoxLMTranscription`], or a list of them for a list, in which a recording that cannot be read has an `error` and
            leaves the others alone; with `stream=True` an iterator of them.

        Raises:
            ValueError: for an argument out of range, and for one recording that cannot be read.
            FileNotFoundError: for a missing file.
        """
        many = is_batch(audio)
        items = list(audio) if many else [audio]
        if not items:
            raise ValueError("No audio was given: the list is empty")
        check_timestamps(return_timestamps)
        options = TranscriptionOptions(
            sampling_rate=sampling_rate,
            with_words=bool(return_timestamps),
            batch_size=batch_size,
            longest_s=longest_segment(self.config, chunk_length_s),
            vad=vad,
            use_reader=use_reader,
            generate_kwargs=generate_kwargs,
        )
        by_segment = stream and not many
        processor = self.get_processor()
        requests = make_requests(self, processor, len(items), prompt, context, hotwords, language, use_reader)
        tasks = transcribe_recordings(self, items, requests, options, at_once=by_segment)
        if not many:
            tasks = raise_errors(tasks)
        if by_segment:
            return (
                join_segments([task.result], task.audio.duration_s, spoken=task.spoken)
                for task in tasks
                if task.result is not None
            )
        results = join_recordings(tasks)
        if stream:
            return results
        return list(results) if many else next(results)

    @torch.no_grad()
    def align(
        self, audio, text, prompt=None, sampling_rate: int | None = None
    ) -> VoxLMTranscription | list[VoxLMTranscription]:
        """
        Times of the words of a known text.

        A recording longer than the model's window is transcribed first. Where the transcript matches the text, the text is
        divided among the segments.

        Args:
            audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes. Recordings are held in memory
                as a whole; a long one also takes a byte for each pair of a given and a transcribed word (an hour: 100 MB).
            text (`str` or `list[str]`): what is said, one for each recording; any script and symbol the tokenizer can encode.
            prompt (`str` or `list[str]`, *optional*): see `transcribe`.
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz, by default the model's.

        Returns:
            [`VoxLMTranscription`] (or a list of them for a list) with the words as given: in order, none empty, inside the
            recording. `"spoken"` of a word is `False` where the model believes that it is not in the recording; its times
            then say only where it would have been. `"confidence"` is that of the word given the words before it.

        Raises:
            ValueError: for a number of texts that is not the number of recordings, and for a prompt that cannot be used. For one
                recording also for a text without words or that is no string, and for audio that cannot be read, is long and
                without speech, or has fewer frames than the text has words; of a list, such a recording has an `error`.
        """
        processor, many = self.get_processor(), is_batch(audio)
        items, texts = (list(audio), text) if many else ([audio], [text])
        if not items:
            raise ValueError("No audio was given: the list is empty")
        if isinstance(texts, str) or len(texts) != len(items):
            given = "one text" if isinstance(texts, str) else len(texts)
            raise ValueError(f"Got {given} for {len(items)} recordings")
        requests, results = one_for_each(prompt, len(items)), []
        for request in requests:
            processor.render_prompt(request)
        options = TranscriptionOptions(longest_s=longest_segment(self.config, None), sampling_rate=sampling_rate)
        for number, (item, words, request) in enumerate(zip(items, texts, requests)):
            try:
                results.append(self._align_one(processor, item, words, request, options))
            except (OSError, ValueError) as error:
                if not many:
                    raise
                results.append(join_segments([], 0.0, log_failure(number, error, "aligned")))
        return results if many else results[0]

    def _align_one(self, processor, item, text, prompt, options) -> VoxLMTranscription:
        """`align` for one recording."""
        waveform, known = processor.load_audio(item, options.sampling_rate), known_text(processor, text)
        if len(waveform) <= int(self.config.audio_window_s * processor.sampling_rate):
            result = align_text(self, processor, waveform, known, prompt)
        else:
            requests = make_requests(self, processor, 1, prompt)
            tasks = raise_errors(transcribe_recordings(self, [waveform], requests, options, at_once=True))
            segments = [task.result for task in tasks if task.result is not None]
            result = align_segments(self, processor, waveform, known, prompt, segments)
        result.text = text
        return result

    def transcription_pipeline(self, **kwargs) -> VoxLMASRPipeline:
        """An `automatic-speech-recognition` pipeline over this very model and its processor."""
        return VoxLMASRPipeline(self, self.get_processor(), task="automatic-speech-recognition", **kwargs)


def is_waveform(value) -> bool:
    """Whether `value` is samples and not token ids, which are tensors of 32 or 64-bit integers."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.dtype == torch.int16
    return isinstance(value, np.ndarray)


def check_number(name: str, value, least: float, whole: bool = False):
    """
    Check an argument of the caller; `None` stands for its default.

    Raises:
        ValueError: for what is no finite number, or no whole number if it has to be one, and for less than `least`.
    """
    if value is None:
        return
    kind = numbers.Integral if whole else numbers.Real
    # `math.isfinite` cannot take integers beyond those of a float.
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= sys.float_info.max:
        raise ValueError(f"`{name}` must be {'an integer' if whole else 'a number'} of at least {least}, got {value!r}")


def longest_segment(config, chunk_length_s: float | None) -> float:
    """Length of the longest segment in seconds, as the caller and the config ask for.

    Raises:
        ValueError: when the caller asks for too little, or for what is no number.
    """
    if chunk_length_s != 0:  # as in the library's pipelines, 0 stands for the default
        check_number("chunk_length_s", chunk_length_s, SHORTEST_CHUNK_S)
    return min(config.audio_window_s, chunk_length_s or config.chunk_length_s or math.inf)


def transcribe_recordings(
    model, items: list, requests: list[Request], options: TranscriptionOptions, at_once: bool
) -> Iterator[SegmentTask]:
    """
    The transcribed segments of all recordings, in order, each recording followed by its end.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        items (`list`): recordings, of any kind `audio_voxlm.read_audio` takes.
        requests (`list[Request]`): of each recording.
        options ([`TranscriptionOptions`])
        at_once (`bool`): prefer an early first result to full batches.

    Raises:
        ValueError: at once, for a prompt, an option or a voice activity detector that cannot be used.
    """
    processor = model.get_processor()
    token_budget(options.generate_kwargs)
    check_search(model, requests, search_options(model.generation_config, options.generate_kwargs))
    for prompt in {request.prompt for request in requests}:
        check_prompt_length(model.config, **processor.prompt_ids([prompt], [1]), new_tokens=MIN_TOKENS)
    DETECTORS[options.vad](processor.sampling_rate)
    seconds = known_seconds(items, options.sampling_rate or processor.sampling_rate)
    tasks = with_languages(model, processor, segment_recordings(processor, items, options), requests)
    return finish_segments(transcribe_tasks(model, processor, tasks, requests, options, seconds, at_once), options)


def segment_recordings(processor: VoxLMProcessor, items: list, options: TranscriptionOptions) -> Iterator[SegmentTask]:
    """The segments of all recordings, read block by block and in order, each recording followed by its end."""
    rate = processor.sampling_rate
    for number, item in enumerate(items):
        samples = 0

        def blocks(item=item):
            nonlocal samples
            for block in stream_audio(item, rate, options.sampling_rate):
                samples += len(block)
                yield block

        try:
            checked = False
            for segment in segment_audio(blocks(), DETECTORS[options.vad](rate), rate, options.longest_s):
                if not checked:
                    processor.check_length(len(segment.waveform))
                    checked = True
                yield SegmentTask(number, segment)
            if not checked:
                processor.check_length(samples)
            yield SegmentTask(number, duration_s=samples / rate)
        except (OSError, ValueError) as error:
            yield SegmentTask(number, duration_s=samples / rate, error=error)


@torch.no_grad()
def transcribe_tasks(
    model,
    processor: VoxLMProcessor,
    tasks: Iterable[SegmentTask],
    requests: list[Request],
    options: TranscriptionOptions,
    seconds: float | None,
    at_once: bool,
) -> Iterator[SegmentTask]:
    """
    The tasks in the same order, their segments transcribed in batches of similar length.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        tasks: of `segment_recordings`.
        requests (`list[Request]`): of each recording.
        seconds (`float`, *optional*): length of all recordings, for the progress bar.
        at_once (`bool`): prefer an early first result to full batches.
    """
    shown = seconds is None or seconds > 2 * options.longest_s
    limit_s = CPU_BATCH_S if model.device.type == "cpu" else math.inf
    with logging.tqdm(
        total=seconds and round(seconds),
        unit=" s of audio",
        desc="Transcribing",
        disable=not shown,
        delay=BAR_AFTER_S if seconds is None else 0,
    ) as bar:
        for group in task_groups(tasks, options.batch_size, at_once):
            open_tasks = sorted((task for task in group if task.audio is not None), key=task_seconds)
            for batch in padded_batches(open_tasks, task_seconds, limit_s, options.batch_size):
                segments, requested = [task.audio for task in batch], [requests[task.recording] for task in batch]
                asked = options.with_words, options.generate_kwargs, options.use_reader
                results = transcribe_batch(model, processor, segments, requested, *asked)
                for task, result in zip(batch, results):
                    task.result = result
                    bar.update(round(task.audio.duration_s))
                while group and (group[0].audio is None or group[0].result is not None):
                    yield group.pop(0)
            yield from group


def task_seconds(task: SegmentTask) -> float:
    """Length of a task's segment in seconds."""
    return task.audio.duration_s


def task_groups(tasks: Iterable[SegmentTask], batch_size: int, at_once: bool) -> Iterator[list[SegmentTask]]:
    """Tasks in groups of `BATCHES_AHEAD` batches; with `at_once`, of one batch, the first of a single segment."""
    group: list[SegmentTask] = []
    size = 1 if at_once else BATCHES_AHEAD * batch_size
    for task in tasks:
        group.append(task)
        if sum(task.audio is not None for task in group) >= size:
            yield group
            group, size = [], batch_size if at_once else size
    yield group


def finish_segments(tasks: Iterable[SegmentTask], options: TranscriptionOptions) -> Iterator[SegmentTask]:
    """The tasks without the words that two overlapping segments share, and without words that were not asked for."""
    waiting: SegmentTask | None = None
    for task in chain(tasks, [None]):
        if task is not None and task.audio is not None and task.audio.overlap:
            trim_overlap(waiting.result, task.result)
        if waiting is not None:
            if waiting.result is not None and not options.with_words:
                waiting.result.words, waiting.result.word_scores = [], []
            yield waiting
        waiting = task
        if waiting is not None and waiting.audio is None:  # the end of a recording waits for nothing
            yield waiting
            waiting = None


def raise_errors(tasks: Iterable[SegmentTask]) -> Iterator[SegmentTask]:
    """The tasks up to the first error, which is raised."""
    for task in tasks:
        if task.error is not None:
            raise task.error
        yield task


def join_recordings(tasks: Iterable[SegmentTask]) -> Iterator[VoxLMTranscription]:
    """One result for each recording."""
    segments: list[Segment] = []
    for task in tasks:
        if task.result is not None:
            segments.append(task.result)
            continue
        error = None
        if task.error is not None:
            error, segments = log_failure(task.recording, task.error, "transcribed"), []
        yield join_segments(segments, task.duration_s, error, task.spoken)
        segments = []


def log_failure(recording: int, error: Exception, done: str) -> str:
    """Log that a recording could not be `done` ("transcribed", ...); returns the error in one line."""
    line = error_line(error)
    recording_logger.warning(f"Recording {recording} could not be {done}: {line}")
    return line


def known_seconds(items: list, rate: int) -> float | None:
    """
    Length of all recordings, as far as it is known before they are read; `None` where one does not say.

    Args:
        items (`list`): recordings, of any kind `audio_voxlm.read_audio` takes.
        rate (`int`): of those that do not have their own, in Hz.
    """
    total = 0.0
    for item in items:
        item_rate = rate
        if isinstance(item, dict):
            samples = item.get("array") if item.get("array") is not None else item.get("raw")
            if samples is not None:
                item, item_rate = samples, item.get("sampling_rate")
            else:
                item = item.get("path")
        if isinstance(item, torch.Tensor) and item.is_nested:
            return None  # reading it will say what is wrong
        if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim:
            if not isinstance(item_rate, numbers.Real) or not RATES[0] <= item_rate <= RATES[1]:
                return None
            total += item.shape[-1] / item_rate
        elif isinstance(item, (str, os.PathLike)):
            total += file_duration_s(item) or 0.0  # reading it will say what is wrong
        else:
            return None
    return total
