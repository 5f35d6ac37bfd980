"""Tiny random models of many families, and a tiny tokenizer, made on the spot."""

import functools
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperModel,
)

from voxlm_hf import VoxLMConfig, VoxLMForSpeechSeq2Seq, VoxLMProcessor
from voxlm_hf.processing_voxlm import AUDIO_TOKEN, PAD_TOKEN


RATE = 16000
TEXTS = [
    "he hoped there would be stew for dinner turnips and carrots",
    "the quick brown fox jumps over the lazy dog",
    "Transcribe the audio. naïve café 你好 世界 สวัสดี",
]
VOCAB_SIZE = 320

_WHISPER = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "vocab_size": 50,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_CONVOLUTIONAL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "conv_dim": [8, 8, 8],
    "conv_kernel": [10, 8, 8],
    "conv_stride": [5, 8, 8],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
ENCODERS = {
    "whisper": (_WHISPER, WhisperFeatureExtractor),
    "wav2vec2": ({"model_type": "wav2vec2", **_CONVOLUTIONAL}, Wav2Vec2FeatureExtractor),
    "wavlm": (
        {"model_type": "wavlm", **_CONVOLUTIONAL, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        Wav2Vec2FeatureExtractor,
    ),
    "hubert": ({"model_type": "hubert", **_CONVOLUTIONAL, "feat_extract_norm": "layer"}, Wav2Vec2FeatureExtractor),
    "wav2vec2-bert": (
        {
            "model_type": "wav2vec2-bert",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "feature_projection_input_dim": 160,
            "conv_depthwise_kernel_size": 7,
        },
        SeamlessM4TFeatureExtractor,
    ),
    "qwen2_audio_encoder": (
        {
            "model_type": "qwen2_audio_encoder",
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 80,
            "max_source_positions": 1500,
        },
        WhisperFeatureExtractor,
    ),
    "parakeet_encoder": (
        {
            "model_type": "parakeet_encoder",
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "conv_kernel_size": 5,
            "subsampling_conv_channels": 8,
            "num_mel_bins": 80,
        },
        ParakeetFeatureExtractor,
    ),
}

_LLM = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
LLMS = {
    "qwen2": {"model_type": "qwen2", **_LLM, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLM, "head_dim": 8},
    "llama": {"model_type": "llama", **_LLM, "tie_word_embeddings": False},
    "gemma2": {
        "model_type": "gemma2",
        **_LLM,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 2.0,
        "attn_logit_softcapping": 5.0,
        "sliding_window": 64,
    },
    "phi3": {"model_type": "phi3", **_LLM, "tie_word_embeddings": False},
    "granite": {"model_type": "granite", **_LLM, "logits_scaling": 3.0, "embedding_multiplier": 2.0},
}


def _bpe(specials: list[str], size: int) -> Tokenizer:
    """A byte-level BPE backend whose first ids are `specials`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 300 tokens: bos 0, eos 1, pad 2, and the audio placeholder."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_bpe(["<s>", "</s>", PAD_TOKEN, AUDIO_TOKEN], VOCAB_SIZE - 10),
        bos_token="<s>",
        eos_token="</s>",
        pad_token=PAD_TOKEN,
        additional_special_tokens=[AUDIO_TOKEN],
        padding_side="right",
    )


def save_bases(folder: Path, llm: str):
    """
    Write `folder/audio` and `folder/text`, base models as they come: no placeholder, no pad token, an embedding that must grow.

    Returns:
        the causal LLM that was written.
    """
    WhisperModel(AutoConfig.for_model(**ENCODERS["whisper"][0])).save_pretrained(folder / "audio")
    feature_extractor("whisper").save_pretrained(folder / "audio")
    text_config = AutoConfig.for_model(**{**LLMS[llm], "vocab_size": 300, "pad_token_id": None})
    base = AutoModelForCausalLM.from_config(text_config)
    base.save_pretrained(folder / "text")
    backend = _bpe(["<s>", "</s>"], 300)
    plain = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    plain.save_pretrained(folder / "text")
    return base


def feature_extractor(encoder: str):
    """The feature extractor that belongs to an encoder family."""
    kind = ENCODERS[encoder][1]
    return kind(return_attention_mask=True) if kind is Wav2Vec2FeatureExtractor else kind()


def config(encoder: str = "whisper", llm: str = "qwen2", **fields) -> VoxLMConfig:
    """A tiny config; `fields` override those of [`VoxLMConfig`]."""
    parts = {"audio_config": ENCODERS[encoder][0], "text_config": LLMS[llm]}
    parts = {name: AutoConfig.for_model(**values) for name, values in parts.items()}
    defaults = {"audio_token_id": tokenizer().convert_tokens_to_ids(AUDIO_TOKEN), "alignment_hidden_size": 8}
    defaults["quality_gates"] = {}  # a random model says nothing but nonsense
    return VoxLMConfig(**parts, **{**defaults, **fields})


def model(encoder: str = "whisper", llm: str = "qwen2", **fields) -> VoxLMForSpeechSeq2Seq:
    """A tiny random model in evaluation mode, with its processor."""
    torch.manual_seed(0)
    made = VoxLMForSpeechSeq2Seq(config(encoder, llm, **fields)).eval()
    made.processor = VoxLMProcessor(feature_extractor(encoder), tokenizer()).configure(made)
    made.generation_config.eos_token_id = 1
    made.generation_config.pad_token_id = 2
    return made


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A waveform of noise at 16 kHz that swells and fades like syllables do."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples * (0.55 + 0.45 * np.sin(np.arange(len(samples)) * 2 * np.pi * 4 / RATE))).astype(np.float32)
