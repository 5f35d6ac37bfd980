"""Generation: `generate`, `transcribe` and `align`, and how recordings pass through the model."""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from transformers.generation import GenerationMixin
from transformers.utils import logging

from .audio_voxlm import file_duration_s, is_batch, stream_audio
from .decoding_voxlm import padded_batches, token_budget
from .fallback_voxlm import transcribe_batch
from .forced_alignment_voxlm import align_segments, align_text, known_text
from .pipeline_voxlm import VoxLMASRPipeline
from .processing_voxlm import VoxLMProcessor, one_for_each
from .segmentation_voxlm import DETECTORS, AudioSegment, segment_audio
from .transcription_voxlm import Segment, VoxLMTranscription, join_segments, trim_overlap


logger = logging.get_logger(__name__)

# Segments are sorted by length within this many batches, so that little is padding and little is in memory. Chosen by hand.
BATCHES_AHEAD = 4
# Seconds of audio in one pass on a CPU, padding included: there, more only takes more memory. Chosen by hand.
CPU_BATCH_S = 60.0
# The shortest segment that a caller may ask for.
SHORTEST_CHUNK_S = 1.0


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
        generate_kwargs (`dict`): for `generate`.

    Raises:
        ValueError: for a batch size below 1 or an unknown detector.
    """

    sampling_rate: int | None = None
    with_words: bool = True
    batch_size: int = 8
    longest_s: float = math.inf
    vad: str = "energy"
    generate_kwargs: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {self.batch_size}")
        if self.vad not in DETECTORS:
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
    """

    recording: int
    audio: AudioSegment | None = None
    result: Segment | None = None
    duration_s: float = 0.0
    error: Exception | None = None


class VoxLMGenerationMixin(GenerationMixin):
    """`generate` as everywhere in transformers; `transcribe` and `align` on top of it."""

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """
        Token ids, as everywhere in transformers; the audio is encoded once, before the first step.

        For convenience, a waveform (floating-point array or tensor) as the first argument, without `input_ids`, is handed to
        `transcribe`, whose result has `["text"]` and `["words"]`.
        """
        if is_waveform(inputs) and kwargs.get("input_ids") is None:
            return self.transcribe(inputs, *args, **kwargs)
        names = ("input_features", "input_features_mask", "input_values", "input_values_mask")
        features = {name: kwargs.pop(name) for name in names if kwargs.get(name) is not None}
        states, states_mask = kwargs.pop("audio_states", None), kwargs.pop("audio_states_mask", None)
        if states is not None or "input_features" in features or "input_values" in features:
            input_ids = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else inputs
            audio = self.get_audio_features(**features) if features else self.project(states, states_mask)
            kwargs["audio_embeds"], kwargs["audio_embeds_mask"] = audio.pooler_output, audio.audio_embeds_mask
            if input_ids is not None:
                kwargs["attention_mask"] = self.visible_positions(input_ids, kwargs.get("attention_mask"), audio)
        return super().generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self, *args, inputs_embeds=None, is_first_iteration=False, cache=None, **kwargs
    ) -> dict:
        """[`GenerationMixin.prepare_inputs_for_generation`]; only the pass over the prompt takes the encoded audio."""
        if cache is not None:  # what `past_key_values` is called from 5.24 on
            kwargs["cache"] = cache
        past = kwargs.get("past_key_values") if cache is None else cache
        continued = past is not None and past.get_seq_length() > 0
        if continued or not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("audio_embeds", "audio_embeds_mask"):
                kwargs.pop(name, None)
        # `generate` accepts what this signature names.
        options = {"inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        return super().prepare_inputs_for_generation(*args, **options, **kwargs)

    def transcribe(
        self,
        audio,
        prompt=None,
        sampling_rate: int | None = None,
        return_timestamps: bool | str = "word",
        batch_size: int = 8,
        chunk_length_s: float | None = None,
        vad: str = "energy",
        stream: bool = False,
        **generate_kwargs,
    ) -> VoxLMTranscription | list[VoxLMTranscription] | Iterator[VoxLMTranscription]:
        """
        Transcribe one or many recordings of any length.

        Files are streamed. A recording longer than `chunk_length_s` is split at pauses; stretches without voice activity are
        skipped. A text that fires a quality gate (`config.quality_gates`) is replaced by a fallback; see
        `fallback_voxlm.with_fallback`.

        Args:
            audio: one recording or a list of them, of any kind `audio_voxlm.read_audio` takes.
            prompt (`str` or `list[str]`, *optional*): instruction or context; by default the trained prompt.
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz, by default the model's.
            return_timestamps (`bool` or `"word"`): whether to compute word times and confidences. The text is the same.
            batch_size (`int`): most segments in one pass; on a CPU also at most a minute of audio.
            chunk_length_s (`float`, *optional*): longest segment in seconds; by default the config's, at most the model's
                window.
            vad (`"energy"` or `"silero"`): voice activity detector; the second needs the extra `vad`.
            stream (`bool`): return an iterator that yields results as they are ready: the segments of one recording, or the
                recordings of a list, in order.
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
        options = TranscriptionOptions(
            sampling_rate=sampling_rate,
            with_words=bool(return_timestamps),
            batch_size=batch_size,
            longest_s=longest_segment(self.config, chunk_length_s),
            vad=vad,
            generate_kwargs=generate_kwargs,
        )
        by_segment = stream and not many
        tasks = transcribe_recordings(self, items, one_for_each(prompt, len(items)), options, at_once=by_segment)
        if not many:
            tasks = raise_errors(tasks)
        if by_segment:
            return (join_segments([task.result], task.audio.duration_s) for task in tasks if task.result is not None)
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
            ValueError: for a text without words, a text that is no string, a number of texts that is not the number of
                recordings, or audio that cannot be read, is long and without speech, or has fewer frames than the text has
                words.
        """
        processor = self.get_processor()
        waveforms = processor.load_batch(audio, sampling_rate)
        texts = text if is_batch(audio) else [text]
        if isinstance(texts, str) or len(texts) != len(waveforms):
            given = "one text" if isinstance(texts, str) else len(texts)
            raise ValueError(f"Got {given} for {len(waveforms)} recordings")
        known = [known_text(processor, item) for item in texts]
        options = TranscriptionOptions(longest_s=longest_segment(self.config, None))
        window, results = int(self.config.audio_window_s * processor.sampling_rate), []
        for waveform, item, request in zip(waveforms, known, one_for_each(prompt, len(waveforms))):
            if len(waveform) <= window:
                results.append(align_text(self, processor, waveform, item, request))
            else:
                tasks = raise_errors(transcribe_recordings(self, [waveform], [request], options, at_once=True))
                segments = [task.result for task in tasks if task.result is not None]
                results.append(align_segments(self, processor, waveform, item, request, segments))
        for result, item in zip(results, texts):
            result.text = item
        return results if is_batch(audio) else results[0]

    def transcription_pipeline(self, **kwargs) -> VoxLMASRPipeline:
        """An `automatic-speech-recognition` pipeline over this very model and its processor."""
        return VoxLMASRPipeline(self, self.get_processor(), task="automatic-speech-recognition", **kwargs)


def is_waveform(value) -> bool:
    """Whether `value` is a floating-point array or tensor, so audio and not token ids."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


def longest_segment(config, chunk_length_s: float | None) -> float:
    """Length of the longest segment in seconds, as the caller and the config ask for.

    Raises:
        ValueError: when the caller asks for too little.
    """
    if chunk_length_s and chunk_length_s < SHORTEST_CHUNK_S:
        raise ValueError(f"`chunk_length_s` must be at least {SHORTEST_CHUNK_S} s, got {chunk_length_s}")
    return min(config.audio_window_s, chunk_length_s or config.chunk_length_s or math.inf)


def transcribe_recordings(
    model, items: list, prompts: list[str | None], options: TranscriptionOptions, at_once: bool
) -> Iterator[SegmentTask]:
    """
    The transcribed segments of all recordings, in order, each recording followed by its end.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        items (`list`): recordings, of any kind `audio_voxlm.read_audio` takes.
        prompts (`list[str]`): of each recording, `None` for the trained prompt.
        options ([`TranscriptionOptions`])
        at_once (`bool`): prefer an early first result to full batches.

    Raises:
        ValueError: at once, for a prompt, an option or a voice activity detector that cannot be used.
    """
    processor = model.get_processor()
    token_budget(options.generate_kwargs)
    prompts = [processor.render_prompt(prompt) for prompt in prompts]
    DETECTORS[options.vad](processor.sampling_rate)
    seconds = known_seconds(items, options.sampling_rate or processor.sampling_rate)
    tasks = segment_recordings(processor, items, options)
    return finish_segments(transcribe_tasks(model, processor, tasks, prompts, options, seconds, at_once), options)


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
    prompts: list[str],
    options: TranscriptionOptions,
    seconds: float | None,
    at_once: bool,
) -> Iterator[SegmentTask]:
    """
    The tasks in the same order, their segments transcribed in batches of similar length.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        tasks: of `segment_recordings`.
        prompts (`list[str]`): of each recording, rendered.
        seconds (`float`, *optional*): length of all recordings, for the progress bar.
        at_once (`bool`): prefer an early first result to full batches.
    """
    shown = seconds is None or seconds > 2 * options.longest_s
    limit_s = CPU_BATCH_S if model.device.type == "cpu" else math.inf
    with logging.tqdm(
        total=seconds and round(seconds), unit=" s of audio", desc="Transcribing", disable=not shown
    ) as bar:
        for group in task_groups(tasks, options.batch_size, at_once):
            open_tasks = sorted((task for task in group if task.audio is not None), key=task_seconds)
            for batch in padded_batches(open_tasks, task_seconds, limit_s, options.batch_size):
                segments, requests = [task.audio for task in batch], [prompts[task.recording] for task in batch]
                words, kwargs = options.with_words, options.generate_kwargs
                results = transcribe_batch(model, processor, segments, requests, words, kwargs)
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
            error, segments = " ".join(str(task.error).split()), []
            logger.warning(f"Recording {task.recording} could not be transcribed: {error}")
        yield join_segments(segments, task.duration_s, error)
        segments = []


def known_seconds(items: list, rate: int) -> float | None:
    """Length of all recordings, as far as it is known before they are read; `None` where one does not say."""
    total = 0.0
    for item in items:
        item = item.get("path") or item.get("array", item.get("raw")) if isinstance(item, dict) else item
        if isinstance(item, (np.ndarray, torch.Tensor)) and item.ndim:
            total += item.shape[-1] / rate
        elif isinstance(item, (str, os.PathLike)):
            total += file_duration_s(item) or 0.0  # reading it will say what is wrong
        else:
            return None
    return total
