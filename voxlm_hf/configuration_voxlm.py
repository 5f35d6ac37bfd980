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

# Thresholds of the quality gates. compression_ratio is Whisper's. Of 200 recordings of speech (speechocean762, voices never
# trained on) whose text the shipped model ends by itself none fires a gate: mean_logprob is -1.15 and heard_per_second 1.0 at
# least. Of 96 clips of music the model transcribes two. words_per_second and tokens_per_frame were chosen by hand.
DEFAULT_GATES = {
    "compression_ratio": 2.4,
    "mean_logprob": -2.0,
    "words_per_second": 7.0,
    "heard_per_second": 0.8,
    "tokens_per_frame": 0.5,
}

# Rank and alpha are those of the original VoxLM.
DEFAULT_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}

# `llm_weight` and `word_bonus` are from the best of 90 combinations on 150 sentences by synthetic voices (flite, festival,
# espeak-ng), which had a `ctc_weight` of 0.1; that needs a token mixture, so it is 0 by default. With fewer than a hundred
# learned end frames the decoder does not know where to stop.
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

# Temperatures at which a text that fires a gate is sampled anew, at most. Chosen by hand within Whisper's range of 0 to 1.
DEFAULT_TEMPERATURES = (0.2, 0.6, 1.0)


# Least values of numeric fields; fields may be `None` where that is their default.
LEAST_VALUES = {
    "projector_stride": 1,
    "projector_hidden_size": 1,
    "projector_num_blocks": 0,
    "projector_vocab_size": 1,
    "ctc_weight": 0,
    "alignment_hidden_size": 1,
    "alignment_num_blocks": 0,
    "alignment_num_heads": 1,
}


def _require(condition, message: str):
    if not condition:
        raise ValueError(message)


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
            Id of the placeholder token; `input_ids` contain one for each projected audio frame.
        freeze_audio_encoder (`bool`, defaults to `True`):
            Whether the encoder stays untrained, and in evaluation mode while the rest trains.
        audio_window_s (`float`, defaults to 30.0):
            Longest audio, in seconds, of one pass; `transcribe` splits longer audio at pauses.
        chunk_length_s (`float`, *optional*):
            Longest segment, in seconds, that `transcribe` makes; the window by default. Less for models that were trained on
            short recordings only.
        pad_audio_to_window (`bool`, defaults to `False`):
            Whether to pad audio with silence to the full window. Only for checkpoints that were trained that way.
        projector_kind (`"mlp"`, `"convnext"` or `"conv"`, defaults to `"mlp"`):
            `"mlp"`: `projector_stride` neighbouring frames are stacked, then Linear, GELU, Linear, RMSNorm.
            `"convnext"`: the same with residual ConvNeXt blocks over time instead of the GELU, for context.
            `"conv"`: the original VoxLM's, for converted checkpoints: Linear, GELU, Linear, a strided convolution, and a learned
            vector before and behind the audio.
        projector_stride (`int`, defaults to 4): Encoder frames per projected frame (4 x 20 ms for Whisper).
        projector_hidden_size (`int`, *optional*): Width inside the projector; the LLM's by default.
        projector_num_blocks (`int`, defaults to 3): Number of ConvNeXt blocks.
        projector_readout (`"linear"` or `"token_mixture"`, defaults to `"linear"`):
            `"linear"`: the projector's output is the LLM's input. `"token_mixture"`: the output is scored against the LLM's token
            embeddings, and the LLM's input is the mixture of embeddings by these probabilities (LegoSLM, Ma et al. 2025); for
            projectors trained by CTC on tokens. A frame that repeats the token of the frame before it is hidden, as CTC merges
            it.
        projector_vocab_size (`int`, *optional*):
            Score frames against this many of the LLM's tokens (the checkpoint says which) instead of all. A few hundred short
            subwords spell every word, and each occurs often enough to be learnt from hours of speech.
        frame_gate_threshold (`float`, *optional*):
            When set, the projector also predicts for each frame whether it carries a token of speech; frames whose probability
            is not above the threshold are hidden from the LLM (compression by CTC blanks, Gaido et al. 2021).
        ctc_weight (`float`, defaults to 0.0):
            Weight of the projector's CTC log-probabilities beside the LLM's when `transcribe` decodes without a reader (see
            `ctc_voxlm`). Above 0 only for `projector_readout="token_mixture"` with the whole vocabulary.
        reader_config (`dict`, *optional*):
            Settings of the reader, the audio model's own decoder (see `reader_voxlm`); `model.add_reader` makes them.
            "prompt_ids" and "eos_token_id": tokens that its texts begin and end with. "end_frames": number of learned frames
            behind the audio. "spelling_size": length of the table of the LLM's tokens for its own. "num_beams". How `transcribe`
            rescores its hypotheses (see `rescoring_voxlm`): "llm_weight" and "ctc_weight", weights of the log-probabilities
            beside the reader's; "word_bonus" for each word; "plain_text", whether the LLM was trained on texts without
            capitals and punctuation.
        alignment_kind (`"frames"` or `"cross_attention"`, defaults to `"frames"`):
            `"frames"`: scores on the encoder's own frames. `"cross_attention"`: the original VoxLM's, for converted checkpoints:
            the attention weights of post-norm cross-attention layers from text states to projected frames.
        alignment_hidden_size (`int`, defaults to 192): Width of the alignment head of kind `"frames"`.
        alignment_num_blocks (`int`, defaults to 2): Convolution blocks over the frames, or cross-attention layers.
        alignment_num_heads (`int`, defaults to 8): Attention heads of kind `"cross_attention"`.
        alignment_median_width (`int`, *optional*):
            For kind `"cross_attention"` only: compute word times as the original VoxLM did, by a median filter of this many
            frames and plain dynamic time warping, instead of by the Viterbi decoder that models pauses.
        lora_config (`dict`, *optional*):
            Arguments of `peft.LoraConfig` for the LLM (`{}` means the defaults: r 16, alpha 32, all linear layers); `None` means
            no LoRA.
        base_models (`dict`, *optional*):
            For checkpoints that contain only what was trained: `{"audio", "text"}`, each with "name" (Hub id or folder),
            "revision" (commit) and "sha256" of its weights, from which the rest is loaded.
        prompt (`str`): The instruction used in training and, unless the caller gives one, in inference.
        prompt_template (`str`): Text around the audio, with the fields `{audio}` and, optionally, `{prompt}`.
        quality_gates (`dict`, *optional*):
            Thresholds beyond which a text is taken for nonsense, see `fallback_voxlm.fired_gates`; `{}` for none.
        fallback_temperatures (`list[float]`): Temperatures at which `transcribe` samples a text anew when a gate fires, in order.
        confidence_calibration (`dict`):
            Word confidences from the LLM's probability p of a word, the highest entropy h among its tokens and, with a reader,
            its probability q: `sigmoid(scale * logit(p) + reader * logit(q) - entropy * h + bias)`. The LLM's probability itself
            by default.
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
            self.fallback_temperatures = list(DEFAULT_TEMPERATURES)
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
        """Raise a `ValueError` that names the field whose number is out of range."""
        for name, least in LEAST_VALUES.items():
            value = getattr(self, name)
            _require(value is None or value >= least, f"`{name}` must be at least {least}, got {value}")
        window, chunk, gate = self.audio_window_s, self.chunk_length_s, self.frame_gate_threshold
        _require(1 <= window <= 3600, f"`audio_window_s` must be at least 1 and at most 3600, got {window}")
        message = f"`chunk_length_s` must be at least 1 and at most the window of {window} s, got {chunk}"
        _require(chunk is None or 1 <= chunk <= window, message)
        _require(gate is None or 0 <= gate < 1, f"`frame_gate_threshold` must lie in [0, 1) or be None, got {gate}")
        token, vocab_size = self.audio_token_id, getattr(self.text_config, "vocab_size", None)
        message = f"`audio_token_id` is {token}, outside the LLM's vocabulary of {vocab_size} tokens"
        _require(token is None or not vocab_size or 0 <= token < vocab_size, message)

    def validate_projector(self):
        """Raise a `ValueError` for fields of the projector that do not go together."""
        kind, mixes = self.projector_kind, self.projector_readout == "token_mixture"
        gated, whole_vocabulary = self.frame_gate_threshold is not None, not self.projector_vocab_size
        message = "`projector_readout='token_mixture'` needs a `frame_gate_threshold`: not every frame is a token"
        _require(gated or not mixes, message)
        message = "`projector_kind='conv'` has neither a frame gate nor token scores: leave those fields unset"
        _require(kind != "conv" or not gated and whole_vocabulary, message)
        for name, weight in (
            ("ctc_weight", self.ctc_weight),
            ("reader_config['ctc_weight']", (self.reader_config or {}).get("ctc_weight")),
        ):
            message = (
                f"`{name}` above 0 needs `projector_readout='token_mixture'` without a `projector_vocab_size`: only then can "
                "frames be scored as any of the LLM's tokens"
            )
            _require(not weight or mixes and whole_vocabulary, message)

    def validate_alignment(self):
        """Raise a `ValueError` for fields of the alignment head that do not go together."""
        legacy, width, heads = (
            self.alignment_kind == "cross_attention",
            self.alignment_median_width,
            self.alignment_num_heads,
        )
        message = (
            '`alignment_median_width` must be odd and above 0, and is for `alignment_kind="cross_attention"` only; got '
            f"{width} with {self.alignment_kind!r}"
        )
        _require(width is None or legacy and width > 0 and width % 2 == 1, message)
        message = (
            '`alignment_kind="cross_attention"` needs `projector_kind="conv"`, whose learned vectors it leaves out'
        )
        _require(not legacy or self.projector_kind == "conv", message)
        size = self.text_config.hidden_size
        _require(
            not legacy or size % heads == 0,
            f"`alignment_num_heads` must divide the LLM's width of {size}, got {heads}",
        )

    def validate_prompt(self):
        """Raise a `ValueError` for a template that does not contain the audio exactly once."""
        template = self.prompt_template
        message = f"`prompt_template` must contain {{audio}} once and {{prompt}} once at most, got {template!r}"
        _require(template.count("{audio}") == 1 and template.count("{prompt}") <= 1, message)

    def validate_dicts(self):
        """Raise a `ValueError` for a malformed field that is a dict or list."""
        for name, known in (("reader_config", DEFAULT_READER), ("quality_gates", DEFAULT_GATES)):
            unknown = sorted(set(getattr(self, name) or {}) - set(known))
            _require(not unknown, f"`{name}` knows {sorted(known)}, got {unknown}")
        if self.lora_config is not None:
            rank = self.lora_config.get("r", 1)
            valid = isinstance(rank, int) and rank >= 1
            _require(valid, f"`lora_config['r']` must be a positive integer, got {rank!r}")
        if self.reader_config is not None:
            reader = self.reader_config
            message = (
                "`reader_config` needs 'prompt_ids', 'num_beams' of at least 1 and 'end_frames' of at least 0, got "
                f"{reader}"
            )
            _require(reader["prompt_ids"] and reader["num_beams"] >= 1 and reader["end_frames"] >= 0, message)
        temperatures, calibration = self.fallback_temperatures or [], self.confidence_calibration or {}
        message = f"`fallback_temperatures` must be above 0, got {temperatures}"
        _require(all(temperature > 0 for temperature in temperatures), message)
        message = (
            "`confidence_calibration` needs exactly 'scale', 'entropy' and 'bias', and may have 'reader', got "
            f"{sorted(calibration)}"
        )
        _require(not calibration or set(calibration) - {"reader"} == {"scale", "entropy", "bias"}, message)
        for name in set(calibration) - {"bias"}:
            message = (
                f"`confidence_calibration['{name}']` must not be negative, which would reverse the order of confidences, "
                f"got {calibration[name]}"
            )
            _require(calibration[name] >= 0, message)

    def to_dict(self) -> dict:
        """As in the library, but the sub-configs do not name the folder that they were loaded from."""
        output = super().to_dict()
        for name in self.sub_configs_defaults:
            if isinstance(output.get(name), dict):
                output[name].pop("_name_or_path", None)
        return output

    @property
    def audio_hidden_size(self) -> int:
        """Width of the encoder's output frames."""
        return getattr(self.audio_config, "output_hidden_size", None) or self.audio_config.hidden_size

    @classmethod
    def preset(cls, name: str, **overrides) -> "VoxLMConfig":
        """
        Configuration of a named size (the table of presets in the README); its two base configs come from the Hub.

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
