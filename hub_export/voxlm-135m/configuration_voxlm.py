"""Configuration of VoxLM: an audio encoder, a projector, a causal LLM with LoRA and an alignment head."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from packaging import version
from transformers import __version__ as transformers_version


# The range of transformers that this code is tested with: from the first, and before the second. Older ones cannot load a
# checkpoint in 8 bits.
TESTED_TRANSFORMERS = ("5.23", "5.25")
WRONG_TRANSFORMERS = (
    f"VoxLM needs transformers from {TESTED_TRANSFORMERS[0]} and before {TESTED_TRANSFORMERS[1]}; this is "
    f"{transformers_version}. Install one that works: pip install "
    f'"transformers>={TESTED_TRANSFORMERS[0]},<{TESTED_TRANSFORMERS[1]}"'
)
# Checked here because this file is the first of a checkpoint's code that is imported.
if version.parse(transformers_version).release < version.parse(TESTED_TRANSFORMERS[0]).release:
    raise ImportError(WRONG_TRANSFORMERS)

from huggingface_hub.dataclasses import strict  # noqa: E402
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers import CONFIG_MAPPING, AutoConfig  # noqa: E402
from transformers.configuration_utils import PreTrainedConfig, SubConfigSpec  # noqa: E402

from .fields_voxlm import (  # noqa: E402
    DEEPEST,
    DEFAULT_LORA,
    DEFAULT_READER,
    LORA_DESCRIPTION,
    LORA_FIELDS,
    LORA_NO_EFFECT,
    MOST_TOKENS,
    READER_FIELDS,
    REFERENCE_FIELDS,
    WIDEST,
    is_number,
)


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


# Temperatures at which a text that fires a gate is sampled anew, at most. Chosen by hand within Whisper's range of 0 to 1.
DEFAULT_TEMPERATURES = (0.2, 0.6, 1.0)


# Least and largest values of numeric fields; fields may be `None` where that is their default.
LIMITS = {
    "projector_encoder_layers": (0, DEEPEST),
    "projector_stride": (1, 1000),
    "projector_hidden_size": (1, WIDEST),
    "projector_num_blocks": (0, DEEPEST),
    "projector_vocab_size": (1, MOST_TOKENS),
    "projector_merges": (0, MOST_TOKENS),
    "ctc_weight": (0, 1000),
    "alignment_hidden_size": (1, WIDEST),
    "alignment_num_blocks": (0, DEEPEST),
    "alignment_num_heads": (1, WIDEST),
    "initializer_range": (0, 1000),
}
# The same for sizes of the base models' configs, by the names that most models use and by Whisper's and GPT-2's.
BASE_LIMITS = {
    **dict.fromkeys(("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"), (1, WIDEST)),
    **dict.fromkeys(("d_model", "encoder_attention_heads", "encoder_ffn_dim", "num_mel_bins"), (1, WIDEST)),
    **dict.fromkeys(("decoder_attention_heads", "decoder_ffn_dim", "n_embd", "n_head"), (1, WIDEST)),
    **dict.fromkeys(("max_source_positions", "max_target_positions"), (1, MOST_TOKENS)),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "n_layer"), (0, DEEPEST)),
    "vocab_size": (1, MOST_TOKENS),
}


class VoxLMConfigError(StrictDataclassError, ValueError):
    """A field of a config that means nothing, named in one line."""


def _require(condition, message: str):
    if not condition:
        raise ValueError(message)


def _require_fields(name: str, values: dict, fields: dict):
    """Raise a `ValueError` that names the first entry of the config's dict `name` that its check in `fields` refuses."""
    for key, (valid, kind) in fields.items():
        if key in values:
            _require(valid(values[key]), f"`{name}[{key!r}]` must be {kind}, got {values[key]!r}")


def _require_base(part: str, fields: dict):
    """Raise a `ValueError` for a base's config of an unknown type, or with sizes no model has: its own class may loop over them."""
    kind = fields.get("model_type", "")
    known = isinstance(kind, str) and (not kind or kind in CONFIG_MAPPING)
    _require(known, f"`{part}` is of model type {kind!r}, which transformers {transformers_version} does not know")
    for name, value in fields.items():
        least, most = BASE_LIMITS.get(name, (None, DEEPEST if "layer" in name else None))
        # Other types (lists with a size for each layer, for one) are the base's own matter.
        if most is not None and isinstance(value, int):
            message = f"`{part}[{name!r}]` must be at most {most}, got {value}"
            _require(value <= most, message)
            _require(least is None or value >= least, f"`{part}[{name!r}]` must be at least {least}, got {value}")


def _effective_lora(settings: dict) -> dict:
    """
    The fields of `lora_config` that have an effect, with the defaults; for settings made by hand and `LoraConfig.to_dict()`.

    Raises:
        ValueError: naming a field that LoRA as a part of this model cannot have.
    """
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    for name in [name for name in settings if name not in LORA_FIELDS]:
        value = settings.pop(name)
        if name not in LORA_DESCRIPTION and value and value not in LORA_NO_EFFECT.get(name, ()):
            raise ValueError(
                f"`lora_config` cannot have {name}={value!r}: it may only say where LoRA is and how large "
                f"({', '.join(LORA_FIELDS)}), so that base weights stay as they are and LoRA can be merged into them"
            )
    return {**DEFAULT_LORA, **settings}


@contextmanager
def saved_with_code(cls: type, auto_class: str) -> Iterator[None]:
    """
    Let the library save a class's code as it does for remote code. Only meanwhile: the library also takes a class that is
    registered for an auto class for one whose folder is trusted.
    """
    before, cls._auto_class = cls._auto_class, auto_class
    try:
        yield
    finally:
        cls._auto_class = before


def errors_in_one_line(cls: type) -> type:
    """Class decorator: whatever is wrong with a config's fields is a [`VoxLMConfigError`] of one line."""

    def wrap(method):
        @functools.wraps(method)
        def checked(self, *args, **kwargs):
            try:
                return method(self, *args, **kwargs)
            except VoxLMConfigError:
                raise
            # The last three come from configs of base models, which compute with their fields before they check them.
            except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
                cause = error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error
                text = str(cause).split(". Errors: ")[0]  # of a field of several types, tried one after the other
                raise VoxLMConfigError(f"This VoxLM config is not valid: {' '.join(text.split())}") from error

        return checked

    cls.__init__, cls.validate = wrap(cls.__init__), wrap(cls.validate)
    return cls


@errors_in_one_line
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
        projector_encoder_layers (`int`, defaults to 0):
            Number of the encoder's last layers of which the projector has a copy of its own, which is trained with it, while
            the encoder, whose states reader and alignment head take, stays as it is. For Whisper's encoders only.
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
        projector_merges (`int`, *optional*):
            With a `projector_vocab_size`: the merges of the LLM's BPE that spell texts in those tokens, in lower case and without
            punctuation (see `subwords_voxlm`).
        frame_gate_threshold (`float`, *optional*):
            When set, the projector also predicts for each frame whether it carries a token of speech; frames whose probability
            is not above the threshold are hidden from the LLM (compression by CTC blanks, Gaido et al. 2021).
        ctc_weight (`float`, defaults to 0.0):
            Weight of the projector's CTC log-probabilities beside the LLM's when `transcribe` decodes without a reader (see
            `ctc_voxlm`). Above 0 only for `projector_readout="token_mixture"` with the whole vocabulary.
        reader_config (`dict`, *optional*):
            Settings of the reader, the audio model's own decoder (see `reader_voxlm`); `model.add_reader` makes them.
            "prompt_ids" and "eos_token_id": tokens that its texts begin and end with. "end_frames": number of learned frames
            behind the audio. "spelling_size": length of the table of the LLM's tokens for its own. "num_beams"; "distinct_words", whether
            only the likeliest of those that differ in capitals and punctuation alone goes on. How `transcribe`
            rescores its hypotheses (see `rescoring_voxlm`): "llm_weight" and "ctc_weight", weights of the log-probabilities
            beside the reader's; "word_bonus" for each word; "llm_prompt", "audio" for the LLM with LoRA behind audio and prompt,
            "none" for the base LLM as a plain language model, which never hears anything; "plain_text", whether the LLM with
            LoRA was trained on texts without capitals and punctuation. "language": code of the language in which it
            decodes unless asked for another, and which LLM and projector were trained on; "llm_weights": the LLM's weight by code
            of any other language, 0 where it is missing: the reader alone decides there. "languages": the decoder's token by code
            of language, empty for a model of one language; "previous_id": the token in front of a text before (context,
            hotwords). "alignment_heads": layers and heads of its cross-attention that follow the audio, for word times without a
            trained alignment head. "in_window": whether the reader decodes each segment padded with silence to the encoder's
            window, for end frames that are not trained.
        projector_trained (`bool`, defaults to `True`), alignment_trained (`bool`, defaults to `True`):
            Whether projector and alignment head have been trained; `from_base_models` makes new ones, and training them changes
            it. With a reader, an untrained projector is left out: the LLM judges texts as a plain language model, and CTC and
            frame gate say nothing. Without a trained alignment head the reader's cross-attention gives the word times.
        alignment_kind (`"frames"`, `"spelling"` or `"cross_attention"`, defaults to `"frames"`):
            `"frames"`: scores of the LLM's text states on the encoder's own frames. `"spelling"`: scores of the text's letters on
            the same frames, independent of the LLM. `"cross_attention"`: the original VoxLM's, for converted checkpoints:
            the attention weights of post-norm cross-attention layers from text states to projected frames.
        alignment_hidden_size (`int`, defaults to 192): Width of the alignment head, but for kind `"cross_attention"`.
        alignment_num_blocks (`int`, defaults to 2): Convolution blocks over the frames, and over the spelling, or
            cross-attention layers.
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
            its probability q and the word's posterior r among the hypotheses (see `confidence_voxlm`): `sigmoid(scale * logit(p)
            + reader * logit(q) + posterior * logit(r) - entropy * h + bias)`. The LLM's probability itself by default.
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
    projector_encoder_layers: int = 0
    projector_stride: int = 4
    projector_hidden_size: int | None = None
    projector_num_blocks: int = 3
    projector_readout: Literal["linear", "token_mixture"] = "linear"
    projector_vocab_size: int | None = None
    projector_merges: int | None = None
    frame_gate_threshold: int | float | None = None
    ctc_weight: int | float = 0.0
    reader_config: dict | None = None
    projector_trained: bool = True
    alignment_trained: bool = True
    alignment_kind: Literal["frames", "spelling", "cross_attention"] = "frames"
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
    initializer_range: int | float = 0.02

    def __post_init__(self, **kwargs):
        for name in self.sub_configs_defaults:
            if isinstance(getattr(self, name), dict):
                _require_base(name, getattr(self, name))
        if self.lora_config is not None:
            self.lora_config = _effective_lora(self.lora_config)
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
        for name, (least, most) in LIMITS.items():
            value = getattr(self, name)
            message = f"`{name}` must be at least {least} and at most {most}, got {value}"
            _require(value is None or is_number(value, least, most), message)
        for name in self.sub_configs_defaults:
            _require_base(name, getattr(self, name).to_dict())
        window, chunk, gate = self.audio_window_s, self.chunk_length_s, self.frame_gate_threshold
        _require(1 <= window <= 3600, f"`audio_window_s` must be at least 1 and at most 3600, got {window}")
        message = f"`chunk_length_s` must be at least 1 and at most the window of {window} s, got {chunk}"
        _require(chunk is None or 1 <= chunk <= window, message)
        _require(gate is None or 0 <= gate < 1, f"`frame_gate_threshold` must lie in [0, 1) or be None, got {gate}")
        token, vocab_size = self.audio_token_id, getattr(self.text_config, "vocab_size", None)
        message = f"`audio_token_id` is {token}, outside the LLM's vocabulary of {vocab_size} tokens"
        _require(token is None or not vocab_size or 0 <= token < vocab_size, message)
        scored = self.projector_vocab_size
        message = f"`projector_vocab_size` is {scored}, more than the LLM's vocabulary of {vocab_size} tokens"
        _require(scored is None or not vocab_size or scored <= vocab_size, message)

    def validate_projector(self):
        """Raise a `ValueError` for fields of the projector that do not go together."""
        kind, mixes = self.projector_kind, self.projector_readout == "token_mixture"
        gated, whole_vocabulary = self.frame_gate_threshold is not None, not self.projector_vocab_size
        spells = whole_vocabulary or self.projector_merges is not None
        message = "`projector_readout='token_mixture'` needs a `frame_gate_threshold`: not every frame is a token"
        _require(gated or not mixes, message)
        copied, audio = self.projector_encoder_layers, self.audio_config
        has = getattr(audio, "encoder_layers", 0) if audio.model_type == "whisper" else 0
        message = (
            f"`projector_encoder_layers` is {copied}, but the encoder ({audio.model_type}) has {has} layers that the projector "
            "can copy; only Whisper's can be copied, and not by a projector of kind 'conv'"
        )
        _require(not copied or copied <= has and kind != "conv", message)
        message = "`projector_kind='conv'` has neither a frame gate nor token scores: leave those fields unset"
        _require(kind != "conv" or not gated and whole_vocabulary, message)
        for name, weight in (
            ("ctc_weight", self.ctc_weight),
            ("reader_config['ctc_weight']", (self.reader_config or {}).get("ctc_weight")),
        ):
            message = (
                f"`{name}` above 0 needs `projector_readout='token_mixture'`, and with a `projector_vocab_size` also "
                "`projector_merges`: only then can "
                "frames be scored as any of the LLM's tokens"
            )
            _require(not weight or mixes and spells, message)

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
            unknown = [key for key in getattr(self, name) or {} if key not in known]
            _require(not unknown, f"`{name}` knows {sorted(known)}, got {unknown}")
        gates = dict.fromkeys(self.quality_gates, (is_number, "a finite number"))
        _require_fields("quality_gates", self.quality_gates, gates)
        if self.reader_config is not None:
            _require_fields("reader_config", self.reader_config, READER_FIELDS)
            self._validate_languages()
            self._validate_heads()
        temperatures = self.fallback_temperatures
        message = f"`fallback_temperatures` must be finite numbers above 0, got {temperatures}"
        _require(all(is_number(temperature) and temperature > 0 for temperature in temperatures), message)
        self._validate_lora()
        self._validate_calibration()
        self._validate_bases()

    def _validate_languages(self):
        """Raise a `ValueError` for languages of the reader that do not go together."""
        reader = self.reader_config
        own, languages = reader["language"], reader["languages"]
        if languages:
            message = f"`reader_config['language']` is {own!r}, which is none of `reader_config['languages']`"
            _require(own in languages, message)
            message = f"`reader_config['prompt_ids']` lacks the token of the language {own!r}, {languages[own]}"
            _require(languages[own] in reader["prompt_ids"], message)
        unknown = [code for code in reader["llm_weights"] if code not in languages]
        message = f"`reader_config['llm_weights']` names {unknown}, which are none of `reader_config['languages']`"
        _require(not unknown, message)

    def _validate_heads(self):
        """Raise a `ValueError` for alignment heads that the audio model's decoder does not have."""
        layers, heads = (
            getattr(self.audio_config, name, None) for name in ("decoder_layers", "decoder_attention_heads")
        )
        for layer, head in self.reader_config.get("alignment_heads") or []:
            message = f"`reader_config['alignment_heads']` names head {head} of layer {layer}, the decoder has {heads} in {layers}"
            _require(layers is None or heads is None or layer < layers and head < heads, message)

    def _validate_lora(self):
        """Raise a `ValueError` for a `lora_config` that peft would refuse, or with which saving or merging would not be exact."""
        if self.lora_config is None:
            return
        settings = _effective_lora(self.lora_config)
        _require_fields("lora_config", settings, LORA_FIELDS)
        layers, targets = settings.get("layers_to_transform"), settings["target_modules"]
        message = (
            "`lora_config['layers_to_transform']` needs a list of names as `target_modules`; a regular expression can name "
            f"the layers itself, got {targets!r}"
        )
        _require(layers is None or not isinstance(targets, str), message)
        message = "`lora_config['layers_pattern']` says where `layers_to_transform` counts, which is missing"
        _require(layers is not None or not settings.get("layers_pattern"), message)
        depth = getattr(self.text_config, "num_hidden_layers", None)
        for layer in [layers] if isinstance(layers, int) else layers or []:
            message = f"`lora_config['layers_to_transform']` names layer {layer}, the LLM has {depth}"
            _require(depth is None or layer < depth, message)

    def _validate_calibration(self):
        """Raise a `ValueError` for a `confidence_calibration` that is no curve, or one that falls."""
        calibration = self.confidence_calibration
        message = (
            "`confidence_calibration` needs exactly 'scale', 'entropy' and 'bias', and may have 'reader' and 'posterior', got "
            f"{list(calibration)}"
        )
        _require(set(calibration) - {"reader", "posterior"} == {"scale", "entropy", "bias"}, message)
        fields = dict.fromkeys(
            calibration,
            (
                lambda value: is_number(value, 0),
                "a finite number of at least 0: less would reverse the order of confidences",
            ),
        )
        fields["bias"] = (is_number, "a finite number")
        _require_fields("confidence_calibration", calibration, fields)

    def _validate_bases(self):
        """Raise a `ValueError` for `base_models` that do not name two bases and what their weights are."""
        if self.base_models is None:
            return
        message = f"`base_models` needs exactly 'audio' and 'text', got {list(self.base_models)}"
        _require(set(self.base_models) == {"audio", "text"}, message)
        for part, reference in self.base_models.items():
            _require(isinstance(reference, dict), f"`base_models[{part!r}]` must be a dict, got {reference!r}")
            missing = [key for key in REFERENCE_FIELDS if key not in reference]
            _require(not missing, f"`base_models[{part!r}]` lacks {missing}")
            _require_fields(f"base_models[{part!r}]", reference, REFERENCE_FIELDS)

    def save_pretrained(self, save_directory, *args, **kwargs):
        """[`PreTrainedConfig.save_pretrained`]; the config's code travels along."""
        with saved_with_code(type(self), "AutoConfig"):
            super().save_pretrained(save_directory, *args, **kwargs)

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

    @property
    def judges_without_audio(self) -> bool:
        """Whether the base LLM judges the reader's texts as a plain language model."""
        return (self.reader_config or {}).get("llm_prompt") == "none"

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
