"""The LLM writes by itself, without a reader: its likeliest texts by beam search, and CTC chooses among them."""

import numpy as np
import torch

from .ctc_voxlm import ctc_frames, text_logprobs
from .decoding_voxlm import DecodedText, generate_texts, split_decoded
from .processing_voxlm import VoxLMProcessor
from .words_voxlm import plain_words


# The LLM's beams. Chosen by hand: time grows with them, and the best text is nearly always among so many.
NUM_BEAMS = 4


@torch.no_grad()
def decode_with_ctc(model, processor: VoxLMProcessor, prompt: dict, budgets: list[int], batch) -> list[DecodedText]:
    """
    The likeliest text of each segment by LLM and, with weight `config.ctc_weight`, CTC, among the LLM's beams. For projectors
    that spell texts in subwords of their own (`projector_merges`), so that CTC can judge a whole text only.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        processor ([`VoxLMProcessor`])
        prompt (`dict`): of `decoding_voxlm.pack_prompt`.
        budgets (`list[int]`): most tokens of each segment.
        batch ([`EncodedBatch`])
    """
    beams = generate_texts(model, prompt, budgets, {"num_beams": NUM_BEAMS}, NUM_BEAMS)
    frames, embeddings = ctc_frames(model, batch.audio), model.get_input_embeddings().weight
    best = []
    for texts, row in zip(beams, frames):
        for text, _ in texts:
            split_decoded(processor, text)
        spelt = [processor.spell_words(plain_words(text.words))[0] for text, _ in texts]
        ctc = text_logprobs(row, embeddings, spelt)
        scores = [logprob + model.config.ctc_weight * score for (_, logprob), score in zip(texts, ctc)]
        best.append(texts[int(np.argmax(scores))][0])
    return best
