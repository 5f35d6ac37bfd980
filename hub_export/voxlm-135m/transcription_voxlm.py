"""Transcription: recordings of any length and number to text, words with times and confidences."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache
from transformers.utils import ModelOutput, logging

from .alignment_voxlm import word_times
from .decoding_voxlm import DecodedText, greedy_decode, is_plain_greedy, stop_tokens, token_entropies
from .processing_voxlm import is_batch, one_for_each


logger = logging.get_logger(__name__)

# Token budget of one piece of audio: generous for fast speech (about 4 tokens a second in English) and for scripts that need
# a token or more per character.
TOKENS_PER_SECOND, TOKENS_AT_LEAST = 15, 16
# Where the projector's gate says how many frames carry a token, the text may be this much longer: beyond it is a loop.
TOKENS_PER_FRAME_HEARD = 1.25


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
        word_scores (`list[dict]`): for each word what its confidence was made from: `{"logprob", "entropy"}`, the raw
            log-probability of its tokens together and the highest entropy among them, in nats.
    """

    text: str | None = None
    words: list[dict] | None = None
    duration: float | None = None
    truncated: bool | None = None
    word_scores: list[dict] | None = None


@dataclass
class Piece:
    """A stretch of one recording that fits the model's window."""

    recording: int
    start_s: float
    waveform: np.ndarray = field(repr=False)


def cut_at_quiet_points(waveform: np.ndarray, sampling_rate: int, window_s: float) -> list[tuple[int, int]]:
    """
    Cut a waveform into stretches of at most `window_s`, each cut at the quietest tenth of a second of the last half window.

    Args:
        waveform: `(samples,)`.

    Returns:
        `(start, end)` in samples, covering the waveform without gaps.
    """
    window, hop = int(window_s * sampling_rate), max(1, sampling_rate // 100)
    cuts, start = [], 0
    while len(waveform) - start > window:
        # Never so late that a scrap too short to be heard is left over.
        latest = min(start + window, len(waveform) - window // 4)
        tail = waveform[start + window // 2 : latest].astype(np.float64)
        energy = np.add.reduceat(tail**2, np.arange(0, len(tail), hop))
        smooth = np.convolve(energy, np.ones(10), mode="same")
        end = start + window // 2 + int(smooth[:-1].argmin()) * hop + hop // 2
        cuts.append((start, end))
        start = end
    return [*cuts, (start, len(waveform))]


def word_confidence(logprob: float, max_entropy: float, scale: float, entropy: float, bias: float) -> float:
    """
    How likely a word is to be right: `sigmoid(scale * logit(p) - entropy * max_entropy + bias)`.

    Platt scaling of the LLM's probability of the word and, since a distribution that is spread out says more about errors than
    its maximum does (Laptev and Ginsburg 2023), of the highest entropy among its tokens. Monotone in both.

    Args:
        logprob (`float`): log of the product over the word's tokens; max_entropy (`float`): in nats.
        scale, entropy, bias (`float`): `config.confidence_calibration`.
    """
    score = scale * probability_logit(logprob) - entropy * max_entropy + bias
    return 1 / (1 + math.exp(-score))


def probability_logit(logprob: float) -> float:
    """Log-odds of a probability given by its logarithm, kept within 1e-4 of 0 and 1."""
    probability = min(max(math.exp(logprob), 1e-4), 1 - 1e-4)
    return math.log(probability / (1 - probability))


@torch.no_grad()
def transcribe(
    model,
    processor,
    audio,
    prompt=None,
    sampling_rate: int | None = None,
    return_timestamps: bool | str = "word",
    batch_size: int = 8,
    chunk_length_s: float | None = None,
    **generate_kwargs,
):
    """
    Transcribe one or many recordings; longer ones than the model's window are cut at quiet points and joined again.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]), processor ([`VoxLMProcessor`])
        audio: one recording or a list of them, of any kind `processing_voxlm.read_audio` takes.
        prompt (`str` or `list[str]`, *optional*): instruction or context; by default the one the model was trained with.
        sampling_rate (`int`, *optional*): of bare arrays, by default the model's.
        return_timestamps (`bool` or `"word"`): whether to compute word times and confidences. The text is the same.
        batch_size (`int`): pieces of audio in one pass.
        chunk_length_s (`float`, *optional*): longest piece, by default (and at most) the model's window.
        **generate_kwargs: for `model.generate`. The default is greedy.

    Returns:
        [`VoxLMTranscription`], or a list of them for a list.

    Raises:
        ValueError: for audio that cannot be read; FileNotFoundError for a missing file.
    """
    waveforms = processor.load_batch(audio, sampling_rate)
    prompts = one_for_each(prompt, len(waveforms))
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}")
    rate, window_s = processor.sampling_rate, model.config.audio_window_s
    if chunk_length_s:
        if chunk_length_s < 1:
            raise ValueError(f"`chunk_length_s` must be at least 1 second, got {chunk_length_s}")
        window_s = min(window_s, chunk_length_s)
    pieces = [
        Piece(index, start / rate, waveform[start:end])
        for index, waveform in enumerate(waveforms)
        for start, end in cut_at_quiet_points(waveform, rate, window_s)
    ]
    # Pieces of like length share a batch, so that little is padding.
    order = sorted(range(len(pieces)), key=lambda index: len(pieces[index].waveform))
    outputs: list = [None] * len(pieces)
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    for batch in logging.tqdm(batches, desc="Transcribing", disable=len(batches) < 3):
        inputs = processor.apply_transcription_request(
            [pieces[index].waveform for index in batch], prompt=[prompts[pieces[index].recording] for index in batch]
        )
        durations_s = [len(pieces[index].waveform) / rate for index in batch]
        results = _transcribe_batch(model, processor, inputs, durations_s, bool(return_timestamps), generate_kwargs)
        for index, result in zip(batch, results):
            outputs[index] = result

    results = []
    for recording, waveform in enumerate(waveforms):
        parts = [(piece.start_s, output) for piece, output in zip(pieces, outputs) if piece.recording == recording]
        results.append(_join(parts, len(waveform) / rate))
    return results if is_batch(audio) else results[0]


def _join(parts: list[tuple[float, VoxLMTranscription]], duration_s: float) -> VoxLMTranscription:
    """Results of the pieces of one recording, with their starts in seconds, as one result."""
    words = []
    for start_s, part in parts:
        for word in part.words:
            shifted = {key: round(min(start_s + word[key], duration_s), 3) for key in ("start", "end")}
            words.append({**word, **shifted})
    return VoxLMTranscription(
        text=" ".join(part.text for _, part in parts if part.text),
        words=words,
        duration=round(duration_s, 3),
        truncated=any(part.truncated for _, part in parts),
        word_scores=[score for _, part in parts for score in part.word_scores],
    )


def _transcribe_batch(
    model, processor, inputs, durations_s: list[float], with_words: bool, generate_kwargs: dict
) -> list[VoxLMTranscription]:
    """One padded batch of model inputs to one result each; times are relative to the piece."""
    inputs = inputs.to(model.device)
    features = {name: value for name, value in inputs.items() if name.startswith(processor.feature_name)}
    # Encoded once, for the generation and for the word times.
    audio = model.get_audio_features(**features)
    budgets = token_budgets(model, audio, durations_s, generate_kwargs.get("max_new_tokens"))
    prompt = prompt_with_audio(model, inputs, audio)
    if is_plain_greedy(model.generation_config, generate_kwargs):
        text = greedy_decode(model, prompt, budgets, draft_texts(model, processor, audio))
    else:
        text = _generate(model, prompt, budgets, generate_kwargs)
    if with_words and any(text.ids) and (text.states is None or model.alignment.states_at_tokens):
        read_states(model, prompt, text)
    results = [
        VoxLMTranscription(
            text=processor.decode_text(ids).strip(), words=[], duration=duration_s, truncated=not ended, word_scores=[]
        )
        for ids, ended, duration_s in zip(text.ids, text.ended, durations_s)
    ]
    if with_words and any(text.ids):
        _add_words(model, processor, text, audio, results)
    return results


def prompt_with_audio(model, inputs, audio) -> dict[str, torch.Tensor]:
    """What the model's `forward` takes for a prompt whose audio ([`VoxLMAudioOutput`]) is projected already."""
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": model.hide_gated_frames(inputs["input_ids"], inputs["attention_mask"], audio),
        "audio_embeds": audio.pooler_output,
        "audio_embeds_mask": audio.audio_embeds_mask,
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


def token_budgets(model, audio, durations_s: list[float], max_new_tokens: int | None) -> list[int]:
    """
    Most tokens that each recording's text may have: what the caller says, else a generous bound from the audio.

    Args:
        audio ([`VoxLMAudioOutput`]): of the batch; durations_s: of each recording, in seconds.
    """
    if max_new_tokens is not None:
        return [max_new_tokens] * len(durations_s)
    if audio.speech_logits is not None:
        heard = (model.projector.keep(audio.speech_logits) & audio.audio_embeds_mask.bool()).sum(-1).tolist()
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
    for row, (ids, result) in enumerate(zip(text.ids, results)):
        words = processor.split_words(ids)
        token_words = np.full(len(ids), -1)
        for number, word in enumerate(words):
            token_words[word.tokens] = number
        # A model fed the full window has frames of silence after the recording's end.
        frames = min(frame_counts[row], max(1, round(result.duration / frame_s)))
        times = word_times(scores, row, token_words, frames, frame_s, result.duration)
        result.word_scores = word_scores(text, row, [word.tokens for word in words])
        result.words = [
            {"word": word.text, "start": start, "end": end, "confidence": confidence}
            for word, (start, end), confidence in zip(words, times, confidences(result.word_scores, model.config))
        ]


def word_scores(text: DecodedText, row: int, word_tokens: list[list[int]]) -> list[dict]:
    """`word_scores` of [`VoxLMTranscription`] for the words of one row, whose tokens are at `word_tokens`."""
    # The probability of a word is the product over its tokens: all of them are needed to write it.
    return [
        {
            "logprob": round(float(text.logprobs[row, tokens].sum()), 4),
            "entropy": round(float(text.entropies[row, tokens].max()), 4),
        }
        for tokens in word_tokens
    ]


def confidences(scores: list[dict], config) -> list[float]:
    """Calibrated confidences of words with these `word_scores`."""
    calibration = config.confidence_calibration
    return [round(word_confidence(score["logprob"], score["entropy"], **calibration), 4) for score in scores]
