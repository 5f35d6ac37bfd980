"""Tiny random models of many families, and a tiny tokenizer, made on the spot."""

import functools
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperModel,
)

from voxlm_hf import VoxLMConfig, VoxLMForSpeechSeq2Seq, VoxLMProcessor
from voxlm_hf.decoding_voxlm import EncodedBatch, encode
from voxlm_hf.processing_voxlm import AUDIO_TOKEN, PAD_TOKEN
from voxlm_hf.request_voxlm import Request
from voxlm_hf.segmentation_voxlm import AudioSegment


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


@torch.no_grad()
def encoded(made: VoxLMForSpeechSeq2Seq, *clips: np.ndarray, prompt: str | None = None) -> EncodedBatch:
    """Clips on their way through the model: encoded and projected, with their prompts."""
    segments = [AudioSegment(clip, RATE, active_s=len(clip) / RATE) for clip in clips]
    return encode(made, made.processor, segments, [Request(made.processor.render_prompt(prompt))] * len(clips))


# Tokens of the tiny Whisper in `with_reader`: what texts begin and end with; words begin at 3.
READER_START, READER_END = 1, 2


def with_reader(
    letters: str = "", llm: str = "qwen3", lora_config: dict | None = None, **settings
) -> VoxLMForSpeechSeq2Seq:
    """
    A tiny model with a random reader.

    Args:
        letters: the reader's token 3 + i stands for the i-th of them; by default 40 words of the LLM's tokenizer.
        llm, lora_config: of the model.
        **settings: override those of `config.reader_config`.
    """
    tokens = tokenizer()
    words = tokens(list(letters), add_special_tokens=False)["input_ids"] if letters else [[n] for n in range(260, 300)]
    settings = {
        "prompt_ids": [READER_START],
        "eos_token_id": READER_END,
        "end_frames": 3,
        "num_beams": 4,
        "spelling_size": sum(map(len, words)),
        **settings,
    }
    options = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3, "lora_config": lora_config}
    made = model(llm=llm, reader_config=settings, **options)
    lengths = [0, 0, 0] + [len(word) for word in words]
    lengths += [0] * (made.config.audio_config.vocab_size - len(lengths))
    made.reader.spelling = torch.tensor([token for word in words for token in word], dtype=torch.int32)
    made.reader.spelling_offsets = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    torch.manual_seed(1)
    for parameter in made.reader.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def encoder_states(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random encoder states of a batch of so many frames each, and their mask."""
    torch.manual_seed(2)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).long()
    return torch.randn(len(lengths), max(lengths), 16), mask


def save_whisper(folder: Path) -> WhisperForConditionalGeneration:
    """Write `folder/audio`, a tiny Whisper as the Hub has them (weights, tokenizer, generation config), and `folder/text`."""
    save_bases(folder, "qwen2")
    special = ["<|startoftranscript|>", "<|en|>"]
    backend = _bpe([*special, "<|endoftext|>"], 300)
    whisper_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", extra_special_tokens=special
    )
    audio_config = config().audio_config
    audio_config.vocab_size, audio_config.eos_token_id, audio_config.decoder_start_token_id = 300, 2, 0
    torch.manual_seed(3)
    made = WhisperForConditionalGeneration(audio_config)
    with torch.no_grad():  # a random one would never end a text; this one does
        made.model.decoder.embed_tokens.weight[2] *= 40
    made.save_pretrained(folder / "audio")
    whisper_tokenizer.save_pretrained(folder / "audio")
    GenerationConfig(
        decoder_start_token_id=0,
        no_timestamps_token_id=0,
        is_multilingual=True,
        lang_to_id={"<|en|>": 1},
        task_to_id={"transcribe": 0},
        suppress_tokens=[10],
    ).save_pretrained(folder / "audio")
    return made


def randomise_lora(made: VoxLMForSpeechSeq2Seq) -> VoxLMForSpeechSeq2Seq:
    """LoRA starts as the identity; give it weights that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    """A waveform of noise at 16 kHz that swells and fades like syllables do."""
    samples = np.random.default_rng(seed).standard_normal(round(seconds * RATE))
    return (0.1 * samples * (0.55 + 0.45 * np.sin(np.arange(len(samples)) * 2 * np.pi * 4 / RATE))).astype(np.float32)
