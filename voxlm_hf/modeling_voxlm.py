"""The network: audio encoder, projector, causal LLM with LoRA, alignment head."""

import copy

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, is_torchdynamo_compiling

from .alignment_voxlm import VoxLMAlignmentHead, VoxLMConvNeXtBlock, VoxLMSpellingAlignmentHead
from .configuration_voxlm import VoxLMConfig
from .cpu_voxlm import VoxLMInferenceMixin
from .encoders_voxlm import WINDOWED_ENCODERS, encoder_output_lengths, run_encoder, run_last_layers
from .generation_voxlm import VoxLMGenerationMixin
from .legacy_voxlm import VoxLMConvProjector, VoxLMCrossAttentionHead
from .loading_voxlm import VoxLMLoadingMixin
from .outputs_voxlm import VoxLMAudioOutput, VoxLMCausalLMOutputWithPast
from .placeholders_voxlm import append_answers, cache_of, check_placeholders, gated_mask, marks_tokens, real_frames
from .reader_voxlm import VoxLMReader
from .timing_voxlm import AlignmentScores, alignment_loss, key_times


# Projected frames that are scored against the whole vocabulary at once: a row of scores is as long as the vocabulary, so
# 64 rows of 50,000 take 13 MB.
FRAMES_AT_ONCE = 64


class VoxLMProjector(nn.Module):
    """
    Encoder states to input embeddings of the LLM: `projector_encoder_layers` layers like the encoder's last ones, but trained,
    then `projector_stride` frames are stacked, then an MLP or ConvNeXt blocks, then RMSNorm; with
    `projector_readout="token_mixture"`, then a mixture of the LLM's token embeddings.

    Args:
        config ([`VoxLMConfig`])
        encoder (`PreTrainedModel`, *optional*): whose last layers are copied; needed with `projector_encoder_layers`.
    """

    def __init__(self, config: VoxLMConfig, encoder: PreTrainedModel | None = None):
        super().__init__()
        hidden_size, text_size = config.projector_hidden_size, config.text_config.hidden_size
        self.stride = config.projector_stride
        self.encoder_config, self.encoder_layers, self.encoder_norm = config.audio_config, None, None
        if config.projector_encoder_layers:
            self.encoder_layers = copy.deepcopy(encoder.layers[-config.projector_encoder_layers :])
            self.encoder_norm = copy.deepcopy(encoder.layer_norm)
        self.linear_in = nn.Linear(self.stride * config.audio_hidden_size, hidden_size)
        num_blocks = config.projector_num_blocks if config.projector_kind == "convnext" else 0
        self.blocks = nn.ModuleList([VoxLMConvNeXtBlock(hidden_size) for _ in range(num_blocks)])
        self.linear_out = nn.Linear(hidden_size, text_size)
        self.norm = nn.RMSNorm(text_size, eps=1e-6)
        self.gate_threshold = config.frame_gate_threshold
        self.gate = nn.Linear(hidden_size, 1) if self.gate_threshold is not None else None
        # The inverse temperature of the token scores, as a logarithm; not a scalar, which FSDP2 cannot shard.
        self.log_scale = nn.Parameter(torch.zeros(1)) if config.projector_readout == "token_mixture" else None
        # The tokens that frames are scored against; the first ones until training chooses.
        vocab_size = config.projector_vocab_size
        self.register_buffer("token_ids", None if vocab_size is None else torch.arange(vocab_size))

    def init_own_tensors(self):
        """Initialise what is in no layer."""
        if self.log_scale is not None:
            init.zeros_(self.log_scale)
        if self.token_ids is not None:
            init.copy_(self.token_ids, torch.arange(len(self.token_ids)))

    def output_lengths(self, frames: torch.Tensor) -> torch.Tensor:
        """Number of projected frames for a number of encoder frames."""
        return (frames + self.stride - 1) // self.stride

    def scale_to(self, embeddings: torch.Tensor):
        """Start at the scale of the embeddings that the LLM is used to."""
        nn.init.constant_(self.norm.weight, embeddings.detach().float().pow(2).mean().sqrt().item())

    def start_from(self, encoder: PreTrainedModel):
        """Give the copies of the encoder's last layers its weights."""
        if self.encoder_layers is not None:
            last_layers = encoder.layers[-len(self.encoder_layers) :]
            self.encoder_layers.load_state_dict(last_layers.state_dict())
            self.encoder_norm.load_state_dict(encoder.layer_norm.state_dict())

    def forward(self, frames, frame_mask, token_embeddings=None) -> dict[str, torch.Tensor]:
        """
        Args:
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): `projector_states` of [`VoxLMAudioOutput`].
            frame_mask (`torch.LongTensor` of shape `(batch, frames)`)
            token_embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`, *optional*): of the LLM, for the token
                mixture. Mixed inside `forward`, because FSDP gathers sharded parameters only there.

        Returns:
            the fields of [`VoxLMAudioOutput`] from `pooler_output` to `tokens`.
        """
        frames = frames.to(self.linear_in.weight.dtype)
        if self.encoder_layers is not None:
            frames = run_last_layers(self.encoder_layers, self.encoder_norm, self.encoder_config, frames, frame_mask)
        frames = frames * frame_mask.unsqueeze(-1).to(frames.dtype)
        missing = -frames.shape[1] % self.stride
        frames = nn.functional.pad(frames, (0, 0, 0, missing))
        mask = nn.functional.pad(frame_mask, (0, missing))[:, :: self.stride]
        hidden_states = self.linear_in(frames.reshape(frames.shape[0], -1, self.stride * frames.shape[2]))
        if len(self.blocks) == 0:
            hidden_states = nn.functional.gelu(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states, mask.unsqueeze(-1).to(hidden_states.dtype))
        embeds = self.norm(self.linear_out(hidden_states))
        if self.gate is None:
            return {"pooler_output": embeds, "audio_embeds_mask": mask, "visible_mask": mask}
        gate_logits = self.gate(hidden_states).squeeze(-1)
        output = {"audio_embeds_mask": mask, "gate_logits": gate_logits}
        passes = (gate_logits.float().sigmoid() > self.gate_threshold).long()
        if token_embeddings is None:
            return {**output, "pooler_output": embeds, "visible_mask": mask * passes}
        mixtures, tokens = self.mix_tokens(embeds, passes.bool(), token_embeddings)
        tokens = tokens.masked_fill(mask == 0, -1)
        visible = (tokens >= 0).to(mask.dtype)
        return {**output, "pooler_output": mixtures, "visible_mask": visible, "ctc_states": embeds, "tokens": tokens}

    def mix_tokens(self, embeds, passes, token_embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Score projected frames against token embeddings (LegoSLM, Ma et al. 2025).

        Args:
            embeds (`torch.Tensor` of shape `(batch, frames, text_size)`)
            passes (`torch.BoolTensor` of shape `(batch, frames)`): frames that pass the gate.
            token_embeddings (`torch.Tensor` of shape `(vocabulary, text_size)`): of the LLM.

        Returns:
            mixtures of token embeddings by the softmax of the scores `(batch, frames, text_size)`, zero for frames that do
            not pass; and the likeliest tokens `(batch, frames)`, -1 for frames that do not pass or that repeat the token of
            the frame before them, as CTC merges them.
        """
        if self.token_ids is not None:
            token_embeddings = token_embeddings[self.token_ids]
        token_embeddings = token_embeddings.to(embeds.dtype)
        # A compiled graph scores all frames, since its shapes cannot depend on how many pass.
        scored = torch.ones_like(passes) if is_torchdynamo_compiling() else passes
        frames = embeds.flatten(0, 1) if is_torchdynamo_compiling() else embeds[passes]
        mixed, best = [embeds[:0, 0]], [passes.new_zeros(0, dtype=torch.long)]
        for part in frames.split(FRAMES_AT_ONCE):
            scores = part @ token_embeddings.T * self.log_scale.exp()
            mixed.append(scores.softmax(-1) @ token_embeddings)
            best.append(scores.argmax(-1))
        best = torch.cat(best)
        best = best if self.token_ids is None else self.token_ids[best]
        mixtures = torch.zeros_like(embeds).masked_scatter(scored.unsqueeze(-1), torch.cat(mixed))
        mixtures = mixtures.masked_fill(~passes.unsqueeze(-1), 0.0)
        tokens = torch.full_like(passes, -1, dtype=torch.long).masked_scatter(scored, best).masked_fill(~passes, -1)
        repeats = nn.functional.pad((tokens[:, 1:] == tokens[:, :-1]) & passes[:, 1:], (1, 0))
        return mixtures, tokens.masked_fill(repeats, -1)


def make_projector(config: VoxLMConfig, encoder: PreTrainedModel | None = None) -> nn.Module:
    """The projector that `config.projector_kind` names."""
    return VoxLMConvProjector(config) if config.projector_kind == "conv" else VoxLMProjector(config, encoder)


def make_alignment_head(config: VoxLMConfig) -> nn.Module:
    """The alignment head that `config.alignment_kind` names."""
    text_size, num_blocks = config.text_config.hidden_size, config.alignment_num_blocks
    if config.alignment_kind == "spelling":
        return VoxLMSpellingAlignmentHead(config.audio_hidden_size, config.alignment_hidden_size, num_blocks)
    if config.alignment_kind == "cross_attention":
        return VoxLMCrossAttentionHead(text_size, num_blocks, config.alignment_num_heads, config.projector_stride)
    return VoxLMAlignmentHead(text_size, config.audio_hidden_size, config.alignment_hidden_size, num_blocks)


class VoxLMPreTrainedModel(VoxLMLoadingMixin, PreTrainedModel):
    """What the library needs to know of VoxLM models."""

    config_class = VoxLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("audio", "text")
    supports_gradient_checkpointing = True
    # Not tested: what the frame gate hides lies in the middle of a prompt, where flash attention expects no padding.
    _supports_flash_attn = False
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _no_split_modules = [
        "VoxLMProjector",
        "VoxLMConvProjector",
        "VoxLMAlignmentHead",
        "VoxLMSpellingAlignmentHead",
        "VoxLMCrossAttentionHead",
        "VoxLMReader",
    ]
    _skip_keys_device_placement = ["past_key_values"]

    @torch.no_grad()
    def _init_weights(self, module):
        """Initialise what is in no layer of the library's: a checkpoint may lack it, and then it was never made."""
        super()._init_weights(module)
        if isinstance(module, (VoxLMProjector, VoxLMConvProjector, VoxLMReader)):
            module.init_own_tensors()


class VoxLMForSpeechSeq2Seq(VoxLMPreTrainedModel, VoxLMGenerationMixin, VoxLMInferenceMixin):
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
                pretrained parts that fit `audio_config` and `text_config`; built from the config when not given.

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
        self.projector = make_projector(config, encoder)
        self.language_model = language_model or AutoModelForCausalLM.from_config(config.text_config)
        self.alignment = make_alignment_head(config)
        self.processor = None
        self.hub_options = {}  # where on the Hub `from_pretrained` found the model; the processor is there too
        self.for_inference_only = False
        # The class name does not tell the library that labels are those of a causal LM.
        self.loss_type = "ForCausalLM"
        if config.lora_config is not None:
            self.inject_lora()
        self.freeze_base_weights()
        self.post_init()
        if config.audio_token_id is not None:
            # The placeholder stands for audio and means nothing as a word of the answer.
            self.generation_config.suppress_tokens = [config.audio_token_id]

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
        """
        As in torch, but a frozen encoder stays in evaluation mode: its dropout and SpecAugment would only add noise. A projector
        that can learn counts as trained from now on (`config.projector_trained`).
        """
        super().train(mode)
        if mode and any(parameter.requires_grad for parameter in self.projector.parameters()):
            self.config.projector_trained = True
        if self.config.freeze_audio_encoder:
            self.encoder.eval()
        return self

    @property
    def leaves_projector_out(self) -> bool:
        """Whether the reader's texts are judged without the projector, which is not trained."""
        return self.reader is not None and not self.config.projector_trained

    @property
    def times_by_attention(self) -> bool:
        """Whether word times come from the reader's cross-attention, since the alignment head is not trained."""
        return self.reader is not None and not self.config.alignment_trained

    @property
    def time_axis(self) -> int:
        """Axis of time in the encoder's inputs `(batch, mels, time)` or `(batch, time, ...)`."""
        return 2 if self.config.audio_config.model_type in WINDOWED_ENCODERS else 1

    def audio_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Number of placeholders for `lengths` input features (or samples), a tensor of integers."""
        return self.projector.output_lengths(encoder_output_lengths(self.encoder, lengths))

    def set_projector_vocabulary(self, token_ids: list[int], merges: int):
        """
        Score projected frames only against these tokens of the LLM, those of its BPE after so many merges; for a new or a
        trained projector.
        """
        self.config.projector_vocab_size, self.config.projector_merges = len(token_ids), merges
        if self.processor is not None:
            self.processor.projector_merges = merges
        self.projector.token_ids = torch.tensor(token_ids, device=self.projector.linear_in.weight.device)

    def set_alignment_head(self, kind: str):
        """Start a new alignment head of this `config.alignment_kind`, which has yet to be trained, unless the model's is one."""
        before = self.config.alignment_kind
        if kind == before:
            return
        self.config.alignment_kind = kind
        try:
            self.config.validate()
        except ValueError:
            self.config.alignment_kind = before
            raise
        head = make_alignment_head(self.config).to(next(self.projector.parameters()))
        head.apply(self._init_weights)
        self.alignment, self.config.alignment_trained = head, False

    def encode_audio(
        self,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VoxLMAudioOutput:
        r"""
        Run the encoder, and nothing else.

        Args:
            input_features (`torch.Tensor` of shape `(batch, mels, time)` or, for encoders that want it so,
                `(batch, time, features)`) with input_features_mask (`torch.LongTensor` of shape `(batch, time)`), or
            input_values (`torch.Tensor` of shape `(batch, samples)`) with input_values_mask (same shape), for encoders of
                raw audio. Without a mask all of the input is real.
            **kwargs: for the encoder, such as `output_hidden_states`.

        Returns:
            [`VoxLMAudioOutput`] with `last_hidden_state`, `projector_states` and `frame_mask`.

        Raises:
            ValueError: for audio too short to give one frame, or longer than the encoder's window.
        """
        inputs, mask = (
            (input_features, input_features_mask) if input_features is not None else (input_values, input_values_mask)
        )
        if inputs is None:
            raise ValueError("Audio is missing: pass `input_features`, or `input_values` for encoders of raw audio")
        if mask is None:
            mask = torch.ones(inputs.shape[0], inputs.shape[self.time_axis], dtype=torch.long, device=inputs.device)
        mask = mask.long()
        parameter = next(self.encoder.parameters())
        inputs, mask = inputs.to(parameter.device, parameter.dtype), mask.to(parameter.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_audio_encoder):
            encoded = run_encoder(self.encoder, inputs, mask, self.config.projector_encoder_layers, **kwargs)
        lengths = encoder_output_lengths(self.encoder, mask.sum(-1))
        frames = encoded.last_hidden_state
        inner_states = frames if encoded.get("inner_states") is None else encoded.inner_states
        if not is_torchdynamo_compiling():  # a compiled graph can neither raise nor cut by what is in a tensor
            if int(lengths.min()) < 1:
                raise ValueError(
                    f"An audio of {int(mask.sum(-1).min())} input frames is too short: the encoder makes no frame of it"
                )
            frames, inner_states = (states[:, : int(lengths.max())] for states in (frames, inner_states))
        return VoxLMAudioOutput(
            last_hidden_state=frames,
            projector_states=inner_states,
            frame_mask=(torch.arange(frames.shape[1], device=lengths.device) < lengths.unsqueeze(1)).long(),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def project(self, frames, frame_mask=None, last_hidden_state=None) -> VoxLMAudioOutput:
        """
        Run the projector on encoder states.

        Args:
            frames (`torch.Tensor` of shape `(batch, frames, audio_size)`): `projector_states` of [`VoxLMAudioOutput`].
            frame_mask (`torch.LongTensor` of shape `(batch, frames)`, *optional*): without one, all frames are real.
            last_hidden_state (`torch.Tensor` of shape `(batch, frames, audio_size)`, *optional*): the encoder's output for
                the same audio; computed from `frames` when not given.
        """
        if frame_mask is None:
            frame_mask = torch.ones(frames.shape[:2], dtype=torch.long, device=frames.device)
        if last_hidden_state is None:
            last_hidden_state = self.finish_encoding(frames, frame_mask)
        mixes_tokens = self.config.projector_readout == "token_mixture"
        token_embeddings = self.get_input_embeddings().weight if mixes_tokens else None
        projected = self.projector(frames, frame_mask, token_embeddings)
        return VoxLMAudioOutput(
            last_hidden_state=last_hidden_state, projector_states=frames, frame_mask=frame_mask, **projected
        )

    def finish_encoding(self, frames, frame_mask) -> torch.Tensor:
        """The encoder's output `(batch, frames, audio_size)` from the states that the projector takes, see `project`."""
        count, encoder = self.config.projector_encoder_layers, self.encoder
        if not count:
            return frames
        dtype = next(encoder.parameters()).dtype
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_audio_encoder):
            layers = encoder.layers[-count:]
            return run_last_layers(layers, encoder.layer_norm, encoder.config, frames.to(dtype), frame_mask)

    @can_return_tuple
    def get_audio_features(
        self,
        input_features=None,
        input_features_mask=None,
        input_values=None,
        input_values_mask=None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VoxLMAudioOutput:
        """Run the encoder and the projector; arguments and errors as in `encode_audio`."""
        encoded = self.encode_audio(input_features, input_features_mask, input_values, input_values_mask, **kwargs)
        audio = self.project(encoded.projector_states, encoded.frame_mask, encoded.last_hidden_state)
        audio.hidden_states, audio.attentions = encoded.hidden_states, encoded.attentions
        return audio

    def visible_positions(self, input_ids, attention_mask, audio: VoxLMAudioOutput, inputs_embeds=None):
        """
        `attention_mask` `(batch, length)` with the placeholders of hidden frames set to 0. Unchanged without a frame gate.
        """
        if audio.gate_logits is None:
            return attention_mask
        shown = self.shown_positions(input_ids, audio, inputs_embeds)
        return gated_mask(attention_mask, None, shown, *shown.shape)[0]

    def shown_positions(self, input_ids, audio: VoxLMAudioOutput, inputs_embeds=None):
        """
        Mask `(batch, length)` of bool, False at the placeholders of hidden frames; `None` without a frame gate. The one place
        where the frame gate acts on the LLM's input.
        """
        if audio.gate_logits is None:
            return None
        placeholders = self._placeholders(input_ids, audio.audio_embeds_mask, inputs_embeds)
        visible = real_frames(audio.visible_mask, audio.audio_embeds_mask).bool()
        return torch.ones_like(placeholders).masked_scatter(placeholders, visible)

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
        check_placeholders(placeholders, audio_embeds_mask, self.config.audio_token_id)
        return placeholders

    def merge_audio(self, input_ids, inputs_embeds, audio_embeds, audio_embeds_mask):
        """
        Input embeddings `(batch, length, text_size)` with the audio at its placeholders.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`), inputs_embeds (`torch.Tensor` of shape `(batch,
                length, text_size)`): one of them may be `None`.
            audio_embeds, audio_embeds_mask: embeddings of projected frames, and 1 for those that have a placeholder.

        Raises:
            ValueError: when placeholders and projected frames differ in number.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        placeholders = self._placeholders(input_ids, audio_embeds_mask, inputs_embeds).unsqueeze(-1)
        audio_embeds = real_frames(audio_embeds, audio_embeds_mask).to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders.to(inputs_embeds.device), audio_embeds)

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
        spelling: torch.LongTensor | None = None,
        spelling_words: torch.LongTensor | None = None,
        word_times: torch.Tensor | None = None,
        frame_times: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VoxLMCausalLMOutputWithPast:
        r"""
        Encode and project the audio, put it in its places in the prompt, run the LLM, compute the losses. Long because it
        lists all inputs of the model; the body is in the order of the data.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`): prompt with one placeholder per projected frame.
            input_features, input_features_mask, input_values, input_values_mask: see `encode_audio`.
            attention_mask (`torch.Tensor` of shape `(batch, length)`): 0 for padding, on either side.
            audio_states (`torch.Tensor` of shape `(batch, frames, audio_size)`), audio_states_mask: `projector_states` of
                `encode_audio`, computed before, instead of features.
            audio_embeds (`torch.Tensor` of shape `(batch, projected_frames, text_size)`), audio_embeds_mask: audio that
                `get_audio_features` has encoded and projected, instead of features.
            labels (`torch.LongTensor` of shape `(batch, length)`): -100 where no loss is wanted; not shifted. With another
                length than that of `input_ids`, the answers alone, which are appended to the prompts (see
                `VoxLMProcessor.collate`).
            token_words (`torch.LongTensor` of shape `(batch, length)`): with `labels`, the index of the word that each
                token of `input_ids` belongs to, -100 for tokens of no word.
            spelling (`torch.LongTensor` of shape `(batch, bytes)`), spelling_words (same shape): the bytes of the text for an
                alignment head of kind `"spelling"` (`alignment_voxlm.spell_words`), padded with 0, and the index of each one's
                word, -100 for bytes of no word.
            word_times (`torch.Tensor` of shape `(batch, words, 2)`): starts and ends of the words in seconds, NaN where
                unknown. Adds the alignment head's loss to `loss`; only the head learns from it.
            frame_times (`torch.Tensor` of shape `(batch, frames)`): with `word_times`, the centres of the encoder frames in
                seconds, NaN for frames whose target is unknown.
            logits_to_keep (`int`): compute the logits (and the loss) of the last positions only.

        Raises:
            ValueError: without a prompt, when placeholders and projected frames differ in number, and for word times without
                what else the alignment head's loss needs.
        """
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "The prompt is missing: pass `input_ids` with a placeholder for each projected frame, as the model's processor "
                "makes them, or `inputs_embeds`"
            )
        if labels is not None and input_ids is not None and labels.shape[1] != input_ids.shape[1]:
            pad_token_id = self.config.pad_token_id or 0
            input_ids, attention_mask, labels = append_answers(input_ids, attention_mask, labels, pad_token_id)
        audio = None
        if audio_states is not None and audio_embeds is not None:
            # Already projected: the states are for the alignment head.
            states = self.finish_encoding(audio_states, audio_states_mask)
            audio = VoxLMAudioOutput(last_hidden_state=states, frame_mask=audio_states_mask)
        elif audio_states is not None:
            audio = self.project(audio_states, audio_states_mask)
        elif input_features is not None or input_values is not None:
            audio = self.get_audio_features(input_features, input_features_mask, input_values, input_values_mask)
        cache, shown = kwargs.get("cache") if past_key_values is None else past_key_values, None
        if audio is not None and audio_embeds is None:
            audio_embeds, audio_embeds_mask = audio.pooler_output, audio.audio_embeds_mask
            shown = self.shown_positions(input_ids, audio, inputs_embeds)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if audio_embeds is not None:
            inputs_embeds = self.merge_audio(input_ids, inputs_embeds, audio_embeds, audio_embeds_mask)
        attention_mask, hidden = gated_mask(attention_mask, cache, shown, *inputs_embeds.shape[:2])
        if position_ids is None and marks_tokens(attention_mask):
            # Positions count what is visible, so that padding on either side and hidden frames change nothing.
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        if word_times is not None:
            kwargs["output_hidden_states"] = True
        if past_key_values is not None:  # from 5.24 on, the library's `generate` calls it `cache`, which is in `kwargs`
            kwargs["past_key_values"] = past_key_values
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **{key: value for key, value in kwargs.items() if key != "num_items_in_batch"},
        )
        if hidden is not None and cache_of(outputs) is not None:
            # Whoever continues from the cache has a mask of the tokens, which does not say what the gate hides.
            cache_of(outputs).hidden_positions = hidden
        loss, timing_loss = None, None
        if labels is not None:
            kept = labels[:, -logits_to_keep:] if isinstance(logits_to_keep, int) else labels[:, logits_to_keep]
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=outputs.logits, labels=kept, vocab_size=vocab_size, **kwargs)
            if word_times is not None:
                text = (spelling, spelling_words) if self.alignment.from_spelling else (input_ids, token_words)
                states = None if self.alignment.from_spelling else outputs.hidden_states[-1]
                timing_loss = self._alignment_loss(states, *text, labels, word_times, frame_times, audio, **kwargs)
                loss = loss + timing_loss
        return VoxLMCausalLMOutputWithPast(
            loss=loss,
            logits=outputs.logits,
            past_key_values=cache_of(outputs),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            audio=audio,
            alignment_loss=timing_loss,
        )

    def _alignment_loss(
        self, hidden_states, ids, words, labels, word_times, frame_times, audio, num_items_in_batch=None, **kwargs
    ):
        """
        The alignment head's loss, with each row weighted by its text tokens as in the LLM's loss, so that both add up in the
        same way over the parts of a batch.

        Args:
            hidden_states: of the LLM; `None` for a head that reads the spelling.
            ids, words: `input_ids` and `token_words`, or `spelling` and `spelling_words`; see `forward`.
        """
        if audio is None or audio.last_hidden_state.shape[0] != len(labels) or words is None or frame_times is None:
            needed = "`spelling`, `spelling_words`" if self.alignment.from_spelling else "`token_words`"
            raise ValueError(
                f"With `word_times`, the alignment head's loss also needs {needed}, `frame_times` and, for each row, the "
                "audio as features or `audio_states`; `audio_embeds` have lost the encoder's frames"
            )
        if self.training:
            self.config.alignment_trained = True
        if self.alignment.from_spelling:
            scores = self.align_spelling(ids, audio)
        else:
            # Only the columns that contain text in some row.
            first = max(1, int((words != -100).any(0).int().argmax()))
            states, words = self.text_states(hidden_states, first).detach(), words[:, first:]
            scores = self.align_scores(states, ids[:, first:], audio)
        mask, stride = self.alignment.keys_of(audio)[1], self.alignment.frames_per_key
        losses = alignment_loss(scores, words, word_times, key_times(frame_times, mask, stride))
        weights = (labels != -100).sum(-1)
        return (losses * weights).sum() / (weights.sum() if num_items_in_batch is None else num_items_in_batch)

    def text_states(self, hidden_states, first: int):
        """Those of the LLM's last hidden states `(batch, length, text_size)` that align the tokens from `first` on."""
        return hidden_states[:, first:] if self.alignment.states_at_tokens else hidden_states[:, first - 1 : -1]

    def align_scores(self, text_states, token_ids, audio: VoxLMAudioOutput) -> AlignmentScores:
        """
        Scores of the alignment head.

        Args:
            text_states (`torch.Tensor` of shape `(batch, tokens, text_size)`): see `text_states`.
            token_ids (`torch.LongTensor` of shape `(batch, tokens)`)
            audio ([`VoxLMAudioOutput`]): of the same batch.
        """
        # Detached, so that the alignment loss trains the head alone.
        token_embeds = self.get_input_embeddings()(token_ids).detach()
        return self.alignment(text_states, token_embeds, *self.alignment.keys_of(audio))

    def align_spelling(self, spelling, audio: VoxLMAudioOutput) -> AlignmentScores:
        """
        Scores of an alignment head of kind `"spelling"`.

        Args:
            spelling (`torch.LongTensor` of shape `(batch, bytes)`): see `alignment_voxlm.spell_words`, padded with 0.
            audio ([`VoxLMAudioOutput`]): of the same batch.
        """
        return self.alignment(spelling, *self.alignment.keys_of(audio))


__all__ = ["VoxLMForSpeechSeq2Seq", "VoxLMPreTrainedModel"]
