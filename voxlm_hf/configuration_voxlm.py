"""Configuration of VoxLM: an audio encoder, a projector, a causal LLM with LoRA and an alignment head."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec


# preset -> (audio encoder, causal LLM, fields that differ from the defaults)
PRESETS = {
    "voxlm-135m": ("openai/whisper-base", "HuggingFaceTB/SmolLM2-135M-Instruct", {}),
    "voxlm-0.5b": ("openai/whisper-tiny", "Qwen/Qwen2-0.5B", {}),
    "voxlm-2b": ("openai/whisper-small", "Qwen/Qwen2-1.5B", {}),
    "voxlm-4b-multilingual": ("openai/whisper-large-v3-turbo", "Qwen/Qwen2.5-3B", {}),
    "voxlm-9b-global": ("openai/whisper-large-v3", "Qwen/Qwen2.5-7B", {"lora_config": {"r": 32, "lora_alpha": 64}}),
    "voxlm-llama-8b": ("openai/whisper-large-v3", "meta-llama/Llama-3.1-8B-Instruct", {}),
    "voxlm-phi-4": ("openai/whisper-large-v3", "microsoft/phi-4", {}),
    "voxlm-gemma-9b": ("openai/whisper-large-v3", "google/gemma-2-9b-it", {}),
}

# Of 200 recordings of speech (speechocean762, voices never trained on) none that the shipped model ends by itself passes one of these
# thresholds: mean_logprob is -1.15 and heard_per_second 1.0 at least. Of 96 pieces of music it writes words for two.
DEFAULT_GATES = {
    "compression_ratio": 2.4,
    "mean_logprob": -2.0,
    "words_per_second": 7.0,
    "heard_per_second": 0.8,
    "tokens_per_frame": 0.5,
}

DEFAULT_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}

# The weights were chosen on synthetic voices; with less than a hundred frames of silence the decoder does not know where to stop.
DEFAULT_READER = {
    "prompt_ids": [],
    "eos_token_id": 0,
    "end_frames": 100,
    "spelling_size": 0,
    "num_beams": 5,
    "llm_weight": 0.3,
    "ctc_weight": 0.0,
    "word_bonus": 1.0,
    "plain_text": False,
}


@strict
class VoxLMConfig(PreTrainedConfig):
    r"""
    Configuration of [`VoxLMForSpeechSeq2Seq`].

    Args:
        audio_config (`PreTrainedConfig` or `dict`):
            Configuration of the audio encoder, of any model type `AutoModel` knows (Whisper by default).
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the causal LLM, of any model type `AutoModelForCausalLM` knows (Qwen2 by default).
        audio_token_id (`int`, *optional*):
            Id of the placeholder that marks the place of one projected audio frame in `input_ids`.
        freeze_audio_encoder (`bool`, defaults to `True`):
            Leave the encoder untrained, and in evaluation mode while the rest trains.
        audio_window_s (`float`, defaults to 30.0):
            Longest audio, in seconds, of one pass; `transcribe` cuts longer audio at quiet points.
        chunk_length_s (`float`, *optional*): longest piece, in seconds, that `transcribe` cuts recordings into, by default the
            window; less for models that have seen short recordings only.
        pad_audio_to_window (`bool`, defaults to `False`):
            Feed the encoder and the LLM the full window, padded with silence, instead of the real audio alone. Only for
            checkpoints that were trained that way.
        projector_kind (`"mlp"`, `"convnext"` or `"conv"`, defaults to `"mlp"`):
            `"mlp"`: `projector_stride` neighbouring frames are stacked, then Linear, GELU, Linear, RMSNorm.
            `"convnext"`: the same with residual ConvNeXt blocks over time instead of the GELU, for context.
            `"conv"`: the original VoxLM's, for converted checkpoints: Linear, GELU, Linear, a strided convolution, and a learned
            vector before and behind the audio.
        projector_stride (`int`, defaults to 4): Encoder frames per projected frame (4 x 20 ms for Whisper).
        projector_hidden_size (`int`, *optional*): Width inside the projector, by default the LLM's.
        projector_num_blocks (`int`, defaults to 3): Number of ConvNeXt blocks.
        projector_readout (`"linear"` or `"token_mixture"`, defaults to `"linear"`):
            `"linear"`: the projector's output is what the LLM reads. `"token_mixture"`: the output is scored against the LLM's
            token embeddings, and the LLM reads the mixture of embeddings by these probabilities (LegoSLM, Ma et al. 2025);
            for projectors that learnt by CTC to write tokens. A frame that repeats the token of the one before it is
            hidden, as CTC merges it.
        projector_vocab_size (`int`, *optional*):
            Read frames as so many of the LLM's tokens only (which ones, the checkpoint says), by default as all. A few hundred
            short pieces spell every word, and each is heard often enough to be learnt from hours of speech.
        frame_gate_threshold (`float`, *optional*):
            When set, the projector also scores each frame for carrying a token of speech, and frames whose probability is
            not above the threshold are hidden from the LLM (compression by CTC blanks, Gaido et al. 2021).
        ctc_weight (`float`, defaults to 0.0): how much the tokens that the projector reads count beside the LLM when `transcribe` writes
            the text (hybrid decoding, see `ctc_voxlm`). Above 0 only for `projector_readout="token_mixture"` with the whole
            vocabulary.
        reader_config (`dict`, *optional*): keep the audio model's own decoder as a second reader (see `reader_voxlm`; made by
            `model.add_reader`): "prompt_ids" that its texts begin with, "eos_token_id" that ends them, "end_frames" learned ones
            behind the audio, "spelling_size", "num_beams"; and how `transcribe` chooses among its texts (see `joint_voxlm`): the
            weights "llm_weight" and "ctc_weight" of log-probabilities beside the reader's, "word_bonus" for each word, "plain_text"
            whether the LLM was trained on texts without capitals and punctuation.
        alignment_kind (`"frames"` or `"cross_attention"`, defaults to `"frames"`):
            `"frames"`: scores on the encoder's own frames. `"cross_attention"`: the original VoxLM's, for converted checkpoints:
            the attention weights of post-norm cross-attention layers from text states to projected frames.
        alignment_hidden_size (`int`, defaults to 192): Width of the alignment head of kind `"frames"`.
        alignment_num_blocks (`int`, defaults to 2): Convolution blocks over the frames, or cross-attention layers.
        alignment_num_heads (`int`, defaults to 8): Attention heads of kind `"cross_attention"`.
        alignment_median_width (`int`, *optional*): for kind `"cross_attention"` only: read word times as the original VoxLM did, by a
            median filter of so many frames and plain dynamic time warping, instead of by the Viterbi decoder that knows pauses.
        lora_config (`dict`, *optional*):
            Arguments of `peft.LoraConfig` for the LLM (`{}` means the defaults: r 16, alpha 32, all linear layers);
            `None` means no LoRA.
        base_models (`dict`, *optional*):
            For checkpoints that hold only what was trained: `{"audio", "text"}`, each with "name" (Hub id or folder), "revision"
            (commit) and "sha256" of its weights, from which the rest is loaded.
        prompt (`str`): The instruction used in training and, unless the caller gives one, in inference.
        prompt_template (`str`): Text around the audio, with the fields `{audio}` and, optionally, `{prompt}`.
        quality_gates (`dict`, *optional*): thresholds beyond which a text is taken for nonsense, see
            `quality_voxlm.fired_gates`; `{}` for none.
        fallback_temperatures (`list[float]`): at which `transcribe` draws a text anew when a gate fires, in this order.
        confidence_calibration (`dict`): word confidences from the LLM's probability p of a word, the highest entropy h among its
            tokens and, with a reader, its probability q, `sigmoid(scale * logit(p) + reader * logit(q) - entropy * h + bias)`; by
            default the LLM's probability itself.
    """

    model_type = "voxlm"
    sub_configs_defaults = {
        "audio_config": SubConfigSpec(config_class=AutoConfig, model_type="whisper"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen2"),
    }

    audio_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    audio_token_id: int | None = None
    freeze_audio_encoder: bool = True
    audio_window_s: int | float = 30.0
    chunk_length_s: int | float | None = None
    pad_audio_to_window: bool = False
    projector_kind: Literal["mlp", "convnext", "conv"] = "mlp"
    projector_stride: int = 4
    projector_hidden_size: int | None = None
    projector_num_blocks: int = 3
    projector_readout: Literal["linear", "token_mixture"] = "linear"
    projector_vocab_size: int | None = None
    frame_gate_threshold: int | float | None = None
    ctc_weight: int | float = 0.0
    reader_config: dict | None = None
    alignment_kind: Literal["frames", "cross_attention"] = "frames"
    alignment_hidden_size: int = 192
    alignment_num_blocks: int = 2
    alignment_num_heads: int = 8
    alignment_median_width: int | None = None
    lora_config: dict | None = None
    base_models: dict | None = None
    prompt: str = "Transcribe the audio."
    prompt_template: str = "{audio}\n{prompt}\n"
    quality_gates: dict | None = None
    fallback_temperatures: list[float] | None = None
    confidence_calibration: dict | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.lora_config is not None:
            self.lora_config = {**DEFAULT_LORA, **self.lora_config}
        if self.quality_gates is None:
            self.quality_gates = dict(DEFAULT_GATES)
        if self.fallback_temperatures is None:
            self.fallback_temperatures = [0.2, 0.6, 1.0]
        if self.confidence_calibration is None:
            self.confidence_calibration = {"scale": 1.0, "entropy": 0.0, "bias": 0.0}
        if self.reader_config is not None:
            self.reader_config = {**DEFAULT_READER, **self.reader_config}
        super().__post_init__(**kwargs)
        if self.projector_hidden_size is None:
            self.projector_hidden_size = self.text_config.hidden_size
        # The library's tying, generation and Trainer code reads these from the outermost config.
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, name, None) is None:
                setattr(self, name, getattr(self.text_config, name, None))

    def validate_sizes(self):
        """Raise a `ValueError` that names the field for a number outside its range."""
        for name in (
            "projector_stride",
            "projector_hidden_size",
            "projector_vocab_size",
            "alignment_hidden_size",
            "alignment_num_heads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        for name in ("projector_num_blocks", "alignment_num_blocks"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if self.projector_readout == "token_mixture" and self.frame_gate_threshold is None:
            raise ValueError(
                "`projector_readout='token_mixture'` needs a `frame_gate_threshold`: not every frame is a token"
            )
        if self.ctc_weight < 0:
            raise ValueError(f"`ctc_weight` must not be negative, got {self.ctc_weight}")
        if self.ctc_weight and (self.projector_readout != "token_mixture" or self.projector_vocab_size is not None):
            raise ValueError(
                "`ctc_weight` above 0 needs `projector_readout='token_mixture'` without a `projector_vocab_size`: only then are the "
                "frames' tokens those of the LLM's texts"
            )
        if self.projector_kind == "conv" and (self.frame_gate_threshold is not None or self.projector_vocab_size):
            raise ValueError("`projector_kind='conv'` has no frame gate and reads no tokens: leave those fields unset")
        width = self.alignment_median_width
        if width is not None and (width < 1 or width % 2 == 0 or self.alignment_kind != "cross_attention"):
            raise ValueError(
                '`alignment_median_width` must be odd and above 0, and is for `alignment_kind="cross_attention"` only; got '
                f"{width} with {self.alignment_kind!r}"
            )
        if self.alignment_kind == "cross_attention" and self.text_config.hidden_size % self.alignment_num_heads:
            raise ValueError(
                f"`alignment_num_heads` must divide the LLM's width of {self.text_config.hidden_size}, got {self.alignment_num_heads}"
            )
        if not 0 < self.audio_window_s <= 3600:
            raise ValueError(f"`audio_window_s` must be above 0 and at most 3600, got {self.audio_window_s}")
        if self.chunk_length_s is not None and not 1 <= self.chunk_length_s <= self.audio_window_s:
            raise ValueError(
                f"`chunk_length_s` must be at least 1 and at most the window of {self.audio_window_s} s, got {self.chunk_length_s}"
            )
        if self.frame_gate_threshold is not None and not 0 <= self.frame_gate_threshold < 1:
            raise ValueError(f"`frame_gate_threshold` must lie in [0, 1) or be None, got {self.frame_gate_threshold}")
        vocab_size = getattr(self.text_config, "vocab_size", None)
        if self.audio_token_id is not None and vocab_size and not 0 <= self.audio_token_id < vocab_size:
            raise ValueError(
                f"`audio_token_id` is {self.audio_token_id}, outside the LLM's vocabulary of {vocab_size} tokens"
            )

    def validate_prompt(self):
        """Raise a `ValueError` for a template that does not hold the audio exactly once."""
        if self.prompt_template.count("{audio}") != 1:
            raise ValueError(f"`prompt_template` must contain {{audio}} exactly once, got {self.prompt_template!r}")
        if self.prompt_template.count("{prompt}") > 1:
            raise ValueError(f"`prompt_template` may contain {{prompt}} once at most, got {self.prompt_template!r}")

    def validate_dicts(self):
        """Raise a `ValueError` for malformed `lora_config` or `confidence_calibration`."""
        if self.lora_config is not None:
            rank = self.lora_config.get("r", 1)
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"`lora_config['r']` must be a positive integer, got {rank!r}")
        if self.reader_config is not None:
            reader = self.reader_config
            unknown = set(reader) - set(DEFAULT_READER)
            if unknown:
                raise ValueError(f"`reader_config` knows {sorted(DEFAULT_READER)}, got {sorted(unknown)}")
            if not reader["prompt_ids"] or reader["num_beams"] < 1 or reader["end_frames"] < 0:
                raise ValueError(
                    f"`reader_config` needs 'prompt_ids', 'num_beams' of at least 1 and 'end_frames' that are not negative, got {reader}"
                )
            if reader["ctc_weight"] and (self.projector_readout != "token_mixture" or self.projector_vocab_size):
                raise ValueError(
                    "`reader_config['ctc_weight']` needs a projector that reads frames as any of the LLM's tokens"
                )
        unknown = set(self.quality_gates or {}) - set(DEFAULT_GATES)
        if unknown:
            raise ValueError(f"`quality_gates` knows {sorted(DEFAULT_GATES)}, got {sorted(unknown)}")
        if any(temperature <= 0 for temperature in self.fallback_temperatures or []):
            raise ValueError(f"`fallback_temperatures` must be above 0, got {self.fallback_temperatures}")
        calibration = self.confidence_calibration
        if calibration is not None:
            if set(calibration) - {"reader"} != {"scale", "entropy", "bias"}:
                raise ValueError(
                    f"`confidence_calibration` needs exactly 'scale', 'entropy' and 'bias', and may have 'reader', got {sorted(calibration)}"
                )
            for name in set(calibration) - {"bias"}:
                if calibration[name] < 0:
                    raise ValueError(
                        f"`confidence_calibration['{name}']` must not be negative, which would turn the order of "
                        f"confidences around, got {calibration[name]}"
                    )

    @property
    def audio_hidden_size(self) -> int:
        """Width of the encoder's output frames."""
        return getattr(self.audio_config, "output_hidden_size", None) or self.audio_config.hidden_size

    @classmethod
    def preset(cls, name: str, **overrides) -> "VoxLMConfig":
        """
        Configuration of a named size (see ARCHITECTURE's table in the README), its two base configs read from the Hub.

        Raises:
            ValueError: for an unknown name; the known ones are listed.
        """
        audio, text, fields = preset_bases(name)
        return cls(
            audio_config=AutoConfig.from_pretrained(audio),
            text_config=AutoConfig.from_pretrained(text),
            **{"lora_config": {}, **fields, **overrides},
        )


def preset_bases(name: str) -> tuple[str, str, dict]:
    """Hub ids of the encoder and the LLM of a preset, and the config fields it sets.

    Raises:
        ValueError: for an unknown name; the known ones are listed.
    """
    if name not in PRESETS:
        raise ValueError(f"Unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    return PRESETS[name]


__all__ = ["VoxLMConfig"]
