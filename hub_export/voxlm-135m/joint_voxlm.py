"""
Writing by three: the reader proposes texts, and LLM, frames and reader choose among them by their log-probabilities together.

The LLM knows which words go together and has seen the audio through the projector, the projector's frames know how much was said
(their CTC score), the reader knows best which words were said.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch

from .ctc_voxlm import ANYTHING, read_frames, text_logprobs
from .decoding_voxlm import DecodedText, Written, stop_tokens, token_entropies
from .processing_voxlm import plain_words


# Text tokens whose scores over the LLM's whole vocabulary are held at once.
TOKENS_AT_ONCE = 160
# What frames may count against a text, for each token of the longest candidate: a projector knows fewer words than a reader, but what
# it heard of words that a short text leaves out counts in full.
LEAST_PER_TOKEN = -10.0
# Where the frames by themselves read something that is so much likelier than silence, in nats, something was said, even if no
# candidate is what they read. 100 clips of music, noise and clicks had 4 at most, 120 of cut speech 24 at least.
SURELY_HEARD = 10.0


@dataclass
class Candidate:
    """
    One text that may have been said.

    Args:
        written ([`Written`]): the text.
        ids (`list[int]`): as the LLM reads it.
        reader_logprob (`float`): of the whole text.
        ended (`bool`): whether the reader ended it.
        plain (`list[int]`): its tokens without capitals and punctuation, as the projector's frames spell it; `ANYTHING` for numbers
            in figures, which they cannot spell.
        known (`torch.Tensor` of shape `(tokens,)`): which of `ids` the LLM can judge: all but figures where it has not learnt them.
    """

    written: Written
    ids: list[int]
    plain: list[int]
    reader_logprob: float
    ended: bool
    known: torch.Tensor


@dataclass
class Scored:
    """
    What the LLM thinks of one candidate.

    Args:
        logprobs, entropies (`torch.Tensor` of shape `(tokens,)`), states (`(tokens, text_size)`): as in [`DecodedText`].
        end_logprob (`float`): log-probability of the text ending there.
    """

    logprobs: torch.Tensor
    entropies: torch.Tensor
    states: torch.Tensor
    end_logprob: float

    def logprob(self, known: torch.Tensor) -> float:
        """Log-probability of the whole text, its end included, but for tokens that are not `known`."""
        return float(self.logprobs[known].sum()) + self.end_logprob


def candidates_of(model, processor, readings) -> list[Candidate]:
    """
    The readings of one recording as candidates; of those that differ in capitals and punctuation alone, the likeliest.

    Args:
        readings (`list[Reading]`): likeliest first.
    """
    candidates: dict[tuple[int, ...], Candidate] = {}
    reads_figures = not model.config.reader_config["plain_text"]
    for reading in readings:
        pieces = model.reader.spell(reading.ids)
        flat = [token for piece in pieces for token in piece]
        owner = [number for number, piece in enumerate(pieces) for _ in piece]
        audible = [any(char.isalnum() for char in processor.decode_text(piece)) for piece in pieces]
        text, words = processor.decode_text(flat).strip(), processor.split_words(flat)
        surface = [word.text for word in words]
        plain, plain_token_words = processor.encode_words(text, surface, plain_words(surface))
        if tuple(plain) in candidates:
            same = candidates[tuple(plain)]
            same.reader_logprob = float(np.logaddexp(same.reader_logprob, reading.logprob))
            continue
        ids, token_words = plain, plain_token_words
        if reads_figures:
            ids, token_words = processor.encode_words(text, surface, surface)
        # A character that several of the reader's tokens spell together is audible by none of them alone.
        parts = [{owner[token] for token in word.tokens} for word in words]
        heard = [[part for part in sorted(word) if audible[part]] or sorted(word) for word in parts]
        written = Written(
            text=text,
            words=surface,
            token_words=token_words,
            reader_logprobs=[sum(reading.logprobs[part] for part in word) for word in heard],
            mean_logprob=float(np.mean(reading.logprobs)) if reading.ids else reading.end_logprob,
        )
        figures = np.array([any(char.isdigit() for char in word) for word in surface], dtype=bool)
        spelt = [ANYTHING if figures[word] else token for token, word in zip(plain, plain_token_words)]
        spelt = [token for token, before in zip(spelt, [None, *spelt]) if token != ANYTHING or before != ANYTHING]
        known = torch.tensor([reads_figures or not figures[word] for word in token_words], dtype=torch.bool)
        candidates[tuple(plain)] = Candidate(written, ids, spelt, reading.logprob, reading.ended, known)
    return list(candidates.values())


def joint_decode(model, processor, prompt: dict, budgets: list[int], audio) -> DecodedText:
    """
    The likeliest text of each recording of a batch.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`]): with a reader; processor ([`VoxLMProcessor`])
        prompt (`dict`): see `greedy_decode`; budgets (`list[int]`): most tokens of each recording.
        audio ([`VoxLMAudioOutput`]): of the same batch.
    """
    settings = model.config.reader_config
    readings = model.reader(audio.last_hidden_state, audio.frame_mask, budgets)
    candidates = [candidates_of(model, processor, texts) for texts in readings]
    # What a projector that reads no tokens of the LLM has to say is in the LLM's prompt alone.
    frames = read_frames(model, audio) if settings["ctc_weight"] else [None] * len(candidates)
    embeddings = model.get_input_embeddings().weight
    chosen: list[tuple[Candidate, Scored]] = []
    for texts, scores, heard in zip(candidates, score_texts(model, prompt, candidates), frames):
        by_frames = [0.0] * len(texts)
        if heard is not None:
            by_frames = text_logprobs(heard, embeddings, [text.plain for text in texts])
            least = LEAST_PER_TOKEN * max(len(text.plain) for text in texts)
            by_frames = [max(score, least) if text.ids else score for text, score in zip(texts, by_frames)]
        totals = [
            text.reader_logprob
            + settings["llm_weight"] * score.logprob(text.known)
            + settings["ctc_weight"] * by_frame
            + settings["word_bonus"] * len(text.written.words)
            for text, score, by_frame in zip(texts, scores, by_frames)
        ]
        # Whether anything was said is for the frames to say: who knows none of the words would rather hear nothing.
        surely = heard is not None and heard.heard > SURELY_HEARD
        for place, text in enumerate(texts):
            if not text.ids and (surely or by_frames[place] < max(by_frames)):
                totals[place] = -np.inf
        best = int(np.argmax(totals))
        chosen.append((texts[best], scores[best]))
    pad = torch.nn.utils.rnn.pad_sequence
    return DecodedText(
        ids=[text.ids for text, _ in chosen],
        ended=[text.ended for text, _ in chosen],
        states=pad([score.states for _, score in chosen], batch_first=True),
        logprobs=pad([score.logprobs for _, score in chosen], batch_first=True),
        entropies=pad([score.entropies for _, score in chosen], batch_first=True),
        written=[text.written for text, _ in chosen],
    )


def score_texts(model, prompt: dict, candidates: list[list[Candidate]]) -> list[list[Scored]]:
    """
    What the LLM thinks of each candidate of each recording; the prompt is read once, each text once.

    Args:
        prompt (`dict`): of the recordings, padded on the left.
    """
    output = model(**prompt, use_cache=True, logits_to_keep=1, output_hidden_states=True)
    cache, mask = output.past_key_values, prompt["attention_mask"]
    first_logprobs = output.logits[:, -1].float().log_softmax(-1)
    first_states = output.hidden_states[-1][:, -1]
    del output
    suppressed = model.generation_config.suppress_tokens or []
    stops = sorted(stop_tokens(model.generation_config.eos_token_id))
    scored: list[list[Scored]] = [[] for _ in candidates]
    rows = [(number, text) for number, texts in enumerate(candidates) for text in texts]
    for batch in _batches(rows):
        owners = torch.tensor([number for number, _ in batch], device=mask.device)
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(text.ids, dtype=torch.long) for _, text in batch], batch_first=True
        ).to(mask.device)
        lengths = [len(text.ids) for _, text in batch]
        logprobs, states = first_logprobs[owners].unsqueeze(1), first_states[owners].unsqueeze(1)
        if ids.shape[1]:
            real = torch.arange(ids.shape[1]) < torch.tensor(lengths).unsqueeze(1)
            output = model(
                input_ids=ids,
                attention_mask=torch.cat([mask[owners], real.to(mask)], dim=1),
                past_key_values=_rows_of(cache, owners),
                use_cache=True,
                output_hidden_states=True,
            )
            logprobs = torch.cat([logprobs, output.logits.float().log_softmax(-1)], dim=1)
            states = torch.cat([states, output.hidden_states[-1]], dim=1)
            del output
        entropies = torch.stack([token_entropies(row) for row in logprobs])
        logprobs[..., suppressed] = -torch.inf
        states = model.text_states(states, 1)
        for row, ((number, _), length) in enumerate(zip(batch, lengths)):
            own = logprobs[row, :length].gather(-1, ids[row, :length].unsqueeze(-1)).squeeze(-1)
            end = float(logprobs[row, length, stops].max()) if stops else 0.0
            scored[number].append(Scored(own, entropies[row, :length].clone(), states[row, :length].clone(), end))
    return scored


def _batches(rows: list) -> list[list]:
    """Rows of `(recording, candidate)` in batches of about `TOKENS_AT_ONCE` tokens, padding included."""
    batches: list[list] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row[1].ids))
        if not batches or longest * (len(batches[-1]) + 1) > TOKENS_AT_ONCE:
            batches.append([])
            longest = len(row[1].ids)
        batches[-1].append(row)
    return batches


def _rows_of(cache, rows: torch.Tensor):
    """A copy of the LLM's cache with these rows of its batch, each as often as it is named."""
    copied = copy.copy(cache)
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    copied.reorder_cache(rows)
    return copied
