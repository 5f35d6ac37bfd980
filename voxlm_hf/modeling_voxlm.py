"""VoxLM: audio encoder, projector, causal LLM with LoRA, alignment head."""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from packaging import version
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple, is_peft_available, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .alignment_voxlm import alignment_loss, make_alignment_head
from .bases_voxlm import base_folder, read_tensors, with_bases
from .configuration_voxlm import DEFAULT_LORA, DEFAULT_READER, VoxLMConfig, preset_bases
from .projector_voxlm import make_projector
from .reader_voxlm import READER_MODELS, VoxLMReader, prompt_ids, spelling_table


if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer


logger = logging.get_logger(__name__)

# The range of transformers that this code was tested with: from the first, and before the second.
TESTED_TRANSFORMERS = ("5.20", "6")
# Encoders with Whisper's layout (two convolutions, learned positions, layers), whose own forward insists on a full window.
WINDOWED_ENCODERS = ("whisper", "qwen2_audio_encoder")


@dataclass
class VoxLMAudioOutput(BaseModelOutputWithPooling):
    """
    What the encoder and the projector make of a batch of audio.

    Args:
        last_hidden_state (`torch.Tensor` of shape `(batch, frames, audio_size)`): encoder states.
        pooler_output (`torch.Tensor` of shape `(batch, projected_frames, text_size)`): input embeddings for the LLM.
        frame_mask (`torch.LongTensor` of shape `(batch, frames)`): 1 for real encoder frames.
        audio_embeds_mask (`torch.LongTensor` of shape `(batch, projected_frames)`): 1 for real projected frames.
        speech_logits (`torch.Tensor` of shape `(batch, projected_frames)`, *optional*): with a frame gate, the log-odds
            that a frame carries a token of speech.
        tokens (`torch.LongTensor` of shape `(batch, projected_frames)`, *optional*): where frames are read as tokens, the
            likeliest token of each frame that the LLM sees, -1 elsewhere: a first transcript.
    """

    frame_mask: torch.Tensor | None = None
    audio_embeds_mask: torch.Tensor | None = None
    speech_logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class VoxLMCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    [`CausalLMOutputWithPast`] plus the audio side.

    Args:
        audio ([`VoxLMAudioOutput`], *optional*): when this pass had audio to project.
        alignment_loss (`torch.Tensor`, *optional*): the alignment head's part of `loss`, when word times were given.
    """

    audio: VoxLMAudioOutput | None = None
    alignment_loss: torch.Tensor | None = None


def encoder_output_lengths(encoder: nn.Module, lengths: torch.Tensor) -> torch.Tensor:
    """
    Number of encoder frames for `lengths` input features (or samples), from the encoder's own length function.

    Raises:
        ValueError: for an encoder that has none.
    """
    for name in ("_get_feat_extract_output_lengths", "_get_subsampling_output_length"):
        if hasattr(encoder, name):
            output = getattr(encoder, name)(lengths)
            return (output[-1] if isinstance(output, tuple) else output).long().clamp(min=0)
    raise ValueError(
        f"{type(encoder).__name__} has no length function (_get_feat_extract_output_lengths or "
        "_get_subsampling_output_length), so the number of its frames cannot be known; choose another audio encoder"
    )


@merge_with_config_defaults
@capture_outputs
def windowed_forward(encoder, input_features, attention_mask, **kwargs) -> BaseModelOutput:
    """
    Drive an encoder of Whisper's layout on bare audio of any length up to its window.

    Args:
        encoder (`PreTrainedModel`): takes the place of `self`, for the library's capture of hidden states and attentions.
        input_features (`torch.Tensor` of shape `(batch, mels, time)`)
        attention_mask (`torch.LongTensor` of shape `(batch, time)`)

    Returns:
        [`BaseModelOutput`] with `(batch, frames, audio_size)`; what lies beyond the mask is undefined.

    Raises:
        ValueError: for audio longer than the encoder's learned positions.
    """
    hidden_states = nn.functional.gelu(encoder.conv1(input_features))
    # In a batch the frame after the last real one must be the zero that the convolution pads a single clip with.
    hidden_states = hidden_states * attention_mask.unsqueeze(1).to(hidden_states.dtype)
    hidden_states = nn.functional.gelu(encoder.conv2(hidden_states)).transpose(1, 2)
    num_frames, positions = hidden_states.shape[1], encoder.embed_positions.weight
    if num_frames > len(positions):
        raise ValueError(
            f"The audio gives {num_frames} encoder frames, but the encoder knows {len(positions)} positions; "
            "cut the audio, or use `model.transcribe`, which does"
        )
    hidden_states = hidden_states + positions[:num_frames]
    hidden_states = nn.functional.dropout(hidden_states, p=encoder.dropout, training=encoder.training)
    attention_mask = create_bidirectional_mask(
        config=encoder.config, inputs_embeds=hidden_states, attention_mask=attention_mask[:, ::2][:, :num_frames]
    )
    for layer in encoder.layers:
        hidden_states = layer(hidden_states, attention_mask, **kwargs)
    if hasattr(encoder, "avg_pooler"):
        hidden_states = encoder.avg_pooler(hidden_states.transpose(1, 2)).transpose(1, 2)
    return BaseModelOutput(last_hidden_state=encoder.layer_norm(hidden_states))


class VoxLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation shared by VoxLM models."""

    config_class = VoxLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "VoxLMProjector",
        "VoxLMConvProjector",
        "VoxLMAlignmentHead",
        "VoxLMCrossAttentionHead",
        "VoxLMReader",
    ]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def initialize_weights(self):
        """Initialise what no checkpoint filled; LoRA starts as the identity (B = 0), as peft has it."""
        super().initialize_weights()
        if self.config.lora_config is not None:
            for module in self.modules():
                if isinstance(module, LoraLayer):
                    for name in module.lora_A:
                        init.kaiming_uniform_(module.lora_A[name].weight, a=5**0.5)
                        init.zeros_(module.lora_B[name].weight)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        [`PreTrainedModel.from_pretrained`], with two differences: weights of plain base models load into a model with
        LoRA, and weights that the checkpoint lacks are an error, not random numbers (LoRA tensors alone may be missing,
        since they start as the identity).

        Raises:
            ValueError: naming the weights that are missing; not with `output_loading_info=True`, which asks for their list.
        """
        first, end = TESTED_TRANSFORMERS
        if not version.parse(first) <= version.parse(transformers_version) < version.parse(end):
            logger.warning_once(
                f"This checkpoint's code was tested with transformers from {first} and before {end}; this is {transformers_version}"
            )
        output_loading_info = kwargs.pop("output_loading_info", False)
        known = config
        if known is None or not hasattr(known, "lora_config"):
            names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
            known = cls.config_class.from_pretrained(
                known or pretrained_model_name_or_path,
                **{name: kwargs[name] for name in ("lora_config", *names) if name in kwargs},
            )
        kwargs.setdefault("key_mapping", cls._lora_key_mapping(known))
        source = pretrained_model_name_or_path
        if getattr(known, "base_models", None):
            hub_options = {name: kwargs[name] for name in ("cache_dir", "local_files_only", "token") if name in kwargs}
            folder = base_folder(source, kwargs.get("revision"), **hub_options)
            kwargs["state_dict"] = with_bases(read_tensors(folder), known, **hub_options)
            config, source = known, None
        model, info = super().from_pretrained(source, *model_args, config=config, output_loading_info=True, **kwargs)
        if source is None:
            model.config._name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
            model.config.base_models = None  # the model is whole now, and so is what it saves
            model.generation_config = GenerationConfig.from_pretrained(folder)
        missing = sorted(key for key in info["missing_keys"] if ".lora_" not in key)
        if missing and not output_loading_info:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of this model: {shown}. They would be "
                "random; use the checkpoint this config belongs to, or `from_base_models` for a new model"
            )
        model._freeze()  # loading makes every parameter anew, and trainable
        # `save_pretrained` gives base weights their plain names itself; the library would try to undo the renaming once more.
        model._weight_conversions = None
        return (model, info) if output_loading_info else model

    @classmethod
    def _lora_key_mapping(cls, config: VoxLMConfig) -> dict[str, str] | None:
        """Renaming that brings plain LLM weights to the names they have under LoRA; `None` without LoRA."""
        if config.lora_config is None:
            return None
        targets = {**DEFAULT_LORA, **config.lora_config}["target_modules"]
        if isinstance(targets, str):
            with torch.device("meta"):  # "all-linear" becomes a list of names when the model is made
                targets = cls(copy.deepcopy(config)).config.lora_config["target_modules"]
        names = "|".join(sorted(targets))
        return {
            rf"(language_model\..+\.(?:{names}))\.{kind}": rf"\1.base_layer.{kind}"
            for kind in ("weight", "bias", "weight_scale")  # the last one where the checkpoint is stored in 8 bits
        }

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """
        [`PreTrainedModel.save_pretrained`]; base weights keep the names they have without LoRA.

        Raises:
            ValueError: after `pack_weights` or `quantize_dynamic`, whose weights are in no format that could be loaded.
        """
        if self.for_inference_only:
            raise ValueError(
                "A model with packed or 8-bit weights cannot be saved; save it before `pack_weights` or `quantize_dynamic`"
            )
        if self.config.lora_config is not None:
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {key.replace(".base_layer.", "."): value for key, value in state_dict.items()}
        super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)


class VoxLMForSpeechSeq2Seq(VoxLMPreTrainedModel, GenerationMixin):
    r"""
    Speech to text with an LLM, word times and word confidences.

    Example:

    ```python
    >>> from transformers import AutoModelForSpeechSeq2Seq

    >>> model = AutoModelForSpeechSeq2Seq.from_pretrained("hub_export/voxlm-135m", trust_remote_code=True)
    >>> result = model.transcribe("recording.flac")
    >>> result["text"], result["words"]
    ```
    """

    def __init__(self, config: VoxLMConfig, encoder: PreTrainedModel = None, language_model: PreTrainedModel = None):
        """
        Args:
            config ([`VoxLMConfig`])
            encoder ([`PreTrainedModel`], *optional*), language_model ([`PreTrainedModel`], *optional*):
                Pretrained parts that fit `audio_config` and `text_config`; built from the config when not given.

        Raises:
            ImportError: when the config asks for LoRA and peft is not installed.
        """
        super().__init__(config)
        audio_model = None
        if encoder is None or config.reader_config is not None:
            audio_model = AutoModel.from_config(config.audio_config)
        if encoder is None:
            encoder = audio_model.get_encoder() if config.audio_config.is_encoder_decoder else audio_model
        self.encoder = encoder
        self.reader = None if config.reader_config is None else VoxLMReader(config, audio_model.get_decoder())
        self.projector = make_projector(config)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.alignment = make_alignment_head(config)
        self.processor = None
        self.for_inference_only = False
        # The class name would not tell the library that labels are those of a causal LM.
        self.loss_type = "ForCausalLM"
        if config.lora_config is not None:
            self._inject_lora()
        self._freeze()
        self.post_init()
        if config.audio_token_id is not None:
            # The placeholder stands for audio; as a word of the answer it would mean nothing.
            self.generation_config.suppress_tokens = [config.audio_token_id]

    def _freeze(self):
        """Leave only what is to be trained trainable: not the audio model (by default), nor the LLM under LoRA."""
        if self.config.freeze_audio_encoder:
            self.encoder.requires_grad_(False)
            if self.reader is not None:
                self.reader.decoder.requires_grad_(False)
        if self.config.lora_config is not None:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_(".lora_" in name)

    def _inject_lora(self):
        if not is_peft_available():
            raise ImportError(
                "This model has LoRA weights (`lora_config` is set), which need peft: pip install peft. "
                "An export in mode `merged` does without."
            )
        settings = {**DEFAULT_LORA, **self.config.lora_config}
        inject_adapter_in_model(LoraConfig(**settings), self.language_model)
        # The names, not "all-linear": loading must know which weights lie under LoRA before the model exists.
        targets = {
            name.rsplit(".", 1)[-1]
            for name, module in self.language_model.named_modules()
            if isinstance(module, LoraLayer)
        }
        self.config.lora_config = {**settings, "target_modules": sorted(targets)}

    @classmethod
    def from_base_models(cls, audio=None, text=None, preset=None, dtype=None, **overrides) -> "VoxLMForSpeechSeq2Seq":
        """
        Compose a new, untrained model from a pretrained audio encoder and a pretrained causal LLM.

        Args:
            audio (`str`), text (`str`): Hub ids or folders. May be left out when `preset` is given.
            preset (`str`, *optional*): name of a size in `PRESETS`, which fills what is not given.
            dtype (`torch.dtype`, *optional*): dtype of all weights, float32 by default.
            **overrides: fields of [`VoxLMConfig`]. `lora_config` defaults to `{}`, LoRA with the default settings.

        Returns:
            The model in evaluation mode; `model.processor` is the matching [`VoxLMProcessor`].

        Raises:
            ValueError: for an unknown preset, a missing base, or an encoder whose frame rate cannot be derived.
        """
        from .processing_voxlm import VoxLMProcessor

        if preset is not None:
            preset_audio, preset_text, fields = preset_bases(preset)
            audio, text, overrides = audio or preset_audio, text or preset_text, {**fields, **overrides}
        if audio is None or text is None:
            raise ValueError(f"Both base models are needed, got audio={audio!r} and text={text!r}")
        dtype = dtype or torch.float32
        encoder = AutoModel.from_pretrained(audio, dtype=dtype)
        audio_config = encoder.config
        encoder = encoder.get_encoder() if audio_config.is_encoder_decoder else encoder
        language_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        processor = VoxLMProcessor.from_base_models(audio, text)
        tokenizer = processor.tokenizer
        if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(len(tokenizer))
        text_config = language_model.config
        text_config.pad_token_id = tokenizer.pad_token_id
        text_config.eos_token_id = tokenizer.eos_token_id
        attentions = [part.config._attn_implementation for part in (encoder, language_model)]
        config = VoxLMConfig(
            audio_config=audio_config,
            text_config=text_config,
            audio_token_id=processor.audio_token_id,
            dtype=dtype,
            **{"lora_config": {}, **overrides},
        )
        # A new composite config resets the attention of the configs it takes in, which the loaded parts share.
        encoder.config._attn_implementation, language_model.config._attn_implementation = attentions
        model = cls(config, encoder=encoder, language_model=language_model).to(dtype)
        model.projector.scale_to(language_model.get_input_embeddings().weight)
        processor.configure(model)
        model.processor = processor
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    @torch.no_grad()
    def add_reader(self, audio: str, language: str = "en", **settings) -> "VoxLMForSpeechSeq2Seq":
        """
        Keep the decoder of the audio model as a second reader (`reader_voxlm`), in place.

        Args:
            audio (`str`): Hub id or folder of the encoder-decoder model that the encoder is from.
            language (`str`): code of the language of the texts.
            **settings: fields of `config.reader_config`.

        Returns:
            the model. Its reader has yet to learn where audio ends (`training.reader`).

        Raises:
            ValueError: for an audio model whose decoder cannot be driven or whose encoder is not this model's, and for a language it
                does not know.
        """
        base = AutoModel.from_pretrained(audio, dtype=self.dtype)
        if base.config.model_type not in READER_MODELS:
            raise ValueError(f"A reader needs an audio model of {READER_MODELS}, {audio} is {base.config.model_type!r}")
        own = self.encoder.state_dict()
        for name, tensor in base.get_encoder().state_dict().items():
            # Storage in 16 bits may have rounded one of them.
            if name not in own or not torch.allclose(own[name], tensor.to(own[name]), rtol=1e-2, atol=1e-3):
                raise ValueError(f"{audio} is not the audio model that this model's encoder is from: {name} differs")
        generation = GenerationConfig.from_pretrained(audio)
        tokenizers = AutoTokenizer.from_pretrained(audio), self.get_processor().tokenizer
        table = spelling_table(*tokenizers, generation.suppress_tokens or [])
        self.config.reader_config = {
            **DEFAULT_READER,
            "prompt_ids": prompt_ids(generation, language),
            "eos_token_id": self.config.audio_config.eos_token_id,
            "spelling_size": len(table[0]),
            **settings,
        }
        self.config.validate()
        self.reader = VoxLMReader(self.config, base.get_decoder()).to(self.device, self.dtype).eval()
        self.reader.spelling, self.reader.spelling_offsets = (part.to(self.device) for part in table)
        self._freeze()
        return self

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, value):
        self.language_model.set_output_embeddings(value)

    def get_encoder(self, modality=None):
        return self.encoder

    def get_decoder(self):
        return self.language_model.get_decoder()

    def train(self, mode: bool = True):
        """As in torch, but a frozen encoder stays in evaluation mode: its dropout and SpecAugment would only add noise."""
        super().train(mode)
        if self.config.freeze_audio_encoder:
            self.encoder.eval()
        return self

    def audio_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Number of placeholders for `lengths` input features (or samples), a tensor of integers."""
        return self.projector.output_lengths(encoder_output_lengths(self.encoder, lengths))

    def _encode(self, inputs, mask, **kwargs) -> BaseModelOutput:
        """Encoder states `(batch, frames, audio_size)` for padded inputs; padding leaves real frames untouched."""
        if self.config.audio_config.model_type in WINDOWED_ENCODERS:
            return windowed_forward(self.encoder, inputs, attention_mask=mask, **kwargs)
        if getattr(self.config.audio_config, "feat_extract_norm", None) == "group":
            # GroupNorm over time takes the padding into its statistics, so each clip is encoded at its own length.
            rows = [
                self.encoder(row[None, : int(length)]).last_hidden_state[0] for row, length in zip(inputs, mask.sum(-1))
            ]
            return BaseModelOutput(last_hidden_state=nn.utils.rnn.pad_sequence(rows, batch_first=True))
        return self.encoder(inputs, attention_mask=mask, **kwargs)

    @can_return_tuple
    def get_audio_features(
        self, input_features=None, input_features_mask=None, input_values=None, input_values_mask=None, **kwargs
    ) -> VoxLMAudioOutput:
        r"""
        Run the encoder and the projector.

        Args:
            input_features (`torch.Tensor` of shape `(batch, mels, time)` or, for encoders that want it so,
                `(batch, time, features)`) with input_features_mask (`torch.LongTensor` of shape `(batch, time)`), or
            input_values (`torch.Tensor` of shape `(batch, samples)`) with input_values_mask (same shape), for encoders that
                take raw audio. Without a mask all of the input is real.
            **kwargs: for the encoder, such as `output_hidden_states`.

        Raises:
            ValueError: for audio too short to give one frame, or longer than the encoder's window.
        """
        inputs, mask = (
            (input_features, input_features_mask) if input_features is not None else (input_values, input_values_mask)
        )
        if inputs is None:
            raise ValueError("Audio is needed: pass `input_features`, or `input_values` for encoders of raw audio")
        time_axis = 2 if self.config.audio_config.model_type in WINDOWED_ENCODERS else 1
        if mask is None:
            mask = torch.ones(inputs.shape[0], inputs.shape[time_axis], dtype=torch.long, device=inputs.device)
        mask = mask.long()
        parameter = next(self.encoder.parameters())
        inputs, mask = inputs.to(parameter.device, parameter.dtype), mask.to(parameter.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_audio_encoder):
            encoded = self._encode(inputs, mask, **kwargs)
        lengths = encoder_output_lengths(self.encoder, mask.sum(-1))
        if int(lengths.min()) < 1:
            raise ValueError(
                f"An audio of {int(mask.sum(-1).min())} input frames is too short: the encoder makes no frame of it"
            )
        frames = encoded.last_hidden_state[:, : int(lengths.max())]
        frame_mask = (torch.arange(frames.shape[1], device=lengths.device) < lengths.unsqueeze(1)).long()
        audio = self.project(frames, frame_mask)
        audio.hidden_states, audio.attentions = encoded.hidden_states, encoded.attentions
        return audio

    def project(self, frames, frame_mask) -> VoxLMAudioOutput:
        """
        Encoder states to what the LLM reads.

        Args:
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`), frame_mask (`(batch, frames)`)
        """
        read = self.config.projector_readout == "token_mixture"
        embeds, mask, speech_logits, tokens = self.projector(
            frames, frame_mask, self.get_input_embeddings().weight if read else None
        )
        return VoxLMAudioOutput(
            last_hidden_state=frames,
            pooler_output=embeds,
            frame_mask=frame_mask,
            audio_embeds_mask=mask,
            speech_logits=speech_logits,
            tokens=tokens,
        )

    def set_projector_vocabulary(self, token_ids):
        """Read frames as these tokens of the LLM only (a list of ids); for a new or a trained projector."""
        self.config.projector_vocab_size = len(token_ids)
        self.projector.token_ids = torch.tensor(token_ids, device=self.projector.linear_in.weight.device)

    def hide_gated_frames(self, input_ids, attention_mask, audio: VoxLMAudioOutput, inputs_embeds=None):
        """`attention_mask` `(batch, length)` with the placeholders of frames below the gate's threshold set to 0."""
        if audio.speech_logits is None:
            return attention_mask
        placeholders = self._placeholders(input_ids, audio.audio_embeds_mask, inputs_embeds)
        if attention_mask is None:
            attention_mask = torch.ones_like(placeholders, dtype=torch.long)
        keep = self.projector.keep(audio.speech_logits).to(attention_mask)
        kept = torch.ones_like(attention_mask)
        kept[placeholders] = keep[audio.audio_embeds_mask.bool()].to(kept.device)
        return attention_mask * kept

    def _placeholders(self, input_ids, audio_embeds_mask, inputs_embeds=None):
        """
        Mask `(batch, length)` of the audio placeholders, checked to be as many as there are projected frames. Without
        `input_ids` they are found by their embedding.
        """
        if input_ids is not None:
            placeholders = input_ids == self.config.audio_token_id
        else:
            token = torch.tensor(self.config.audio_token_id, device=inputs_embeds.device)
            placeholders = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        wanted, given = audio_embeds_mask.sum(-1).tolist(), placeholders.sum(-1).tolist()
        if wanted != given:
            raise ValueError(
                f"`input_ids` hold {given} audio placeholders (token {self.config.audio_token_id}) per row, but the audio "
                f"gives {wanted} projected frames; prepare both with the model's own processor"
            )
        return placeholders

    def merge_audio(self, input_ids, inputs_embeds, audio_embeds, audio_embeds_mask):
        """
        Input embeddings `(batch, length, text_size)` with the audio at its placeholders.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*), inputs_embeds (`(batch, length, text_size)`,
                *optional*): one may be `None`.
            audio_embeds, audio_embeds_mask: `pooler_output` and `audio_embeds_mask` of [`VoxLMAudioOutput`].

        Raises:
            ValueError: when placeholders and projected frames differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        placeholders = self._placeholders(input_ids, audio_embeds_mask, inputs_embeds).unsqueeze(-1)
        return inputs_embeds.masked_scatter(
            placeholders.to(inputs_embeds.device),
            audio_embeds[audio_embeds_mask.bool()].to(inputs_embeds.device, inputs_embeds.dtype),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        input_features: torch.Tensor | None = None,
        input_features_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        input_values_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        audio_states: torch.Tensor | None = None,
        audio_states_mask: torch.Tensor | None = None,
        audio_embeds: torch.Tensor | None = None,
        audio_embeds_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_words: torch.LongTensor | None = None,
        word_times: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> VoxLMCausalLMOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt with one placeholder per projected frame.
            input_features, input_features_mask, input_values, input_values_mask: see [`get_audio_features`].
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 0 for padding, on either side.
            audio_states (`torch.Tensor` of shape `(batch, frames, audio_size)`), audio_states_mask: encoder states computed
                before, instead of features.
            audio_embeds (`torch.Tensor` of shape `(batch, projected_frames, text_size)`), audio_embeds_mask: audio that
                `get_audio_features` has encoded and projected, instead of features.
            labels (`torch.LongTensor` of shape `(batch, length)`): -100 where no loss is wanted; not shifted.
            token_words (`torch.LongTensor` of shape `(batch, length)`): with `labels`, the number of the word that each token
                of `input_ids` belongs to, -100 for those of none.
            word_times (`torch.Tensor` of shape `(batch, words, 2)`): starts and ends of the words in seconds, NaN where not
                known. Adds the alignment head's loss to `loss`; only the head learns from it.
            frame_times (`torch.Tensor` of shape `(batch, frames)`): with `word_times`, the middles of the encoder frames in
                seconds; NaN for those of which it is not known what is said in them, as of frames that it lacks.
            logits_to_keep (`int`): compute the logits (and the loss) of the last positions only.

        Raises:
            ValueError: when placeholders and projected frames differ in number.
        """
        audio = None
        if audio_states is not None and audio_embeds is not None:
            # Projected already: the states are for the alignment head.
            audio = VoxLMAudioOutput(last_hidden_state=audio_states, frame_mask=audio_states_mask)
        elif audio_states is not None:
            audio = self.project(audio_states, audio_states_mask)
        elif input_features is not None or input_values is not None:
            audio = self.get_audio_features(input_features, input_features_mask, input_values, input_values_mask)
        if audio is not None and audio_embeds is None:
            audio_embeds, audio_embeds_mask = audio.pooler_output, audio.audio_embeds_mask
            attention_mask = self.hide_gated_frames(input_ids, attention_mask, audio, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        # `generate` hands the encoded audio to every step; only the pass over the prompt has places for it.
        if audio_embeds is not None and past_length == 0:
            inputs_embeds = self.merge_audio(input_ids, inputs_embeds, audio_embeds, audio_embeds_mask)
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            # Positions count what is seen, so that padding on either side and hidden frames change nothing.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]

        if word_times is not None:
            kwargs["output_hidden_states"] = True
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        loss, loss_of_times = None, None
        if labels is not None:
            kept = labels[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else labels[:, logits_to_keep]
            loss = self.loss_function(
                logits=outputs.logits, labels=kept, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if word_times is not None:
                loss_of_times = self._alignment_loss(
                    outputs.hidden_states[-1], input_ids, labels, token_words, word_times, frame_times, audio, **kwargs
                )
                loss = loss + loss_of_times
        return VoxLMCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio=audio,
            alignment_loss=loss_of_times,
        )

    def _alignment_loss(
        self,
        hidden_states,
        input_ids,
        labels,
        token_words,
        word_times,
        frame_times,
        audio,
        num_items_in_batch=None,
        **kwargs,
    ):
        """
        The head's loss, each row weighted by its text tokens as in the LLM's loss, so that both add up in the same way over
        the parts of a batch.
        """
        # Only the columns that hold text somewhere.
        first = max(1, int((token_words != -100).any(0).int().argmax()))
        states = self.text_states(hidden_states, first).detach()
        scores = self.align_scores(states, input_ids[:, first:], audio)
        # Nothing is known of frames behind the last target, nor of padding.
        mask, stride = self.alignment.keys_of(audio)[1], self.alignment.frames_per_key
        missing = mask.shape[1] * stride - frame_times.shape[1]
        frame_times = nn.functional.pad(frame_times, (0, missing), value=torch.nan).unflatten(-1, (-1, stride)).mean(-1)
        frame_times = frame_times.masked_fill(mask == 0, torch.nan)
        losses = alignment_loss(scores, token_words[:, first:], word_times, frame_times)
        weights = (labels != -100).sum(-1)
        return (losses * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def generate(self, inputs=None, *args, **kwargs):
        """
        Token ids, as everywhere in transformers; the audio is encoded once, before the first step.

        For convenience a waveform (floating-point array or tensor) as the first argument, without `input_ids`, is handed to
        [`transcribe`], whose result has `["text"]` and `["words"]`.
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
                attention_mask = self.hide_gated_frames(input_ids, kwargs.get("attention_mask"), audio)
                kwargs["attention_mask"] = attention_mask
        return super().generate(inputs, *args, **kwargs)

    def text_states(self, hidden_states, first: int):
        """The LLM's last hidden states `(batch, length, text_size)` that the alignment head wants for the tokens from `first` on."""
        return hidden_states[:, first:] if self.alignment.states_at_tokens else hidden_states[:, first - 1 : -1]

    def align_scores(self, text_states, token_ids, audio: VoxLMAudioOutput):
        """
        Scores of the alignment head.

        Args:
            text_states (`torch.Tensor` of shape `(batch, tokens, text_size)`): see `text_states`, for `token_ids`
                (`torch.LongTensor` of shape `(batch, tokens)`).
            audio ([`VoxLMAudioOutput`]): of the same batch.

        Returns:
            [`AlignmentScores`].
        """
        token_embeds = self.get_input_embeddings()(token_ids)
        return self.alignment(text_states, token_embeds, *self.alignment.keys_of(audio))

    def get_processor(self):
        """The model's [`VoxLMProcessor`]: `model.processor` if set, else loaded from where the model came from.

        Raises:
            ValueError: when the model has no such place.
        """
        if self.processor is None:
            from .processing_voxlm import VoxLMProcessor

            source = self.config._name_or_path
            if not source:
                raise ValueError("The model was not loaded from a checkpoint; set `model.processor` first")
            if self.is_remote_code():
                VoxLMProcessor.register_for_auto_class()  # so that saving it keeps its code, as saving the model does
            # The same commit as the weights; and where this very code came with the checkpoint, it is trusted already.
            revision = getattr(self.config, "_commit_hash", None) or "main"
            self.processor = VoxLMProcessor.from_pretrained(
                source, revision=revision, trust_remote_code=self.is_remote_code()
            )
        return self.processor

    def transcribe(self, audio, **kwargs):
        """Text, words with times and confidences of one or many recordings; see `transcription_voxlm.transcribe`."""
        from .transcription_voxlm import transcribe

        return transcribe(self, self.get_processor(), audio, **kwargs)

    def align(self, audio, text, **kwargs):
        """Times of the words of a text that is known; see `forced_alignment_voxlm.align`."""
        from .forced_alignment_voxlm import align

        return align(self, self.get_processor(), audio, text, **kwargs)

    def pack_weights(self):
        """Compute faster on the CPU, in place, with the same result; see `cpu_voxlm.pack_weights`."""
        from .cpu_voxlm import pack_weights

        return pack_weights(self)

    def quantize_dynamic(self):
        """Compute LLM and reader in 8 bits on the CPU, in place; see `cpu_voxlm.quantize_dynamic`."""
        from .cpu_voxlm import quantize_dynamic

        return quantize_dynamic(self)

    def transcription_pipeline(self, **kwargs):
        """An `automatic-speech-recognition` pipeline over this very model and its processor."""
        from .pipeline_voxlm import VoxLMASRPipeline

        return VoxLMASRPipeline(self, self.get_processor(), task="automatic-speech-recognition", **kwargs)


def is_waveform(value) -> bool:
    """Whether `value` is a floating-point array or tensor, that is audio and not token ids."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating)


__all__ = ["VoxLMForSpeechSeq2Seq", "VoxLMPreTrainedModel"]
