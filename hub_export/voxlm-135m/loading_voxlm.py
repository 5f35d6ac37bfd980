"""Loading and saving: LoRA, checkpoints that reference their base models, and composing a model from base models."""

import copy
import hashlib
import re
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from packaging import version
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import __version__ as transformers_version
from transformers import initialization as init
from transformers.generation import GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import is_peft_available, logging

from .checkpoint_voxlm import (
    FLOATS,
    HOW_TO_CONVERT,
    check_folder,
    check_inside,
    check_values,
    check_weights,
    tensors_of,
)
from .configuration_voxlm import (
    TESTED_TRANSFORMERS,
    WRONG_TRANSFORMERS,
    preset_bases,
    saved_with_code,
)
from .features_voxlm import silence_behind
from .fields_voxlm import DEFAULT_LORA, DEFAULT_READER
from .processing_voxlm import VoxLMProcessor, context_length
from .reader_voxlm import READER_MODELS, VoxLMReader, decoder_prompt, token_table


if is_peft_available():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer


logger = logging.get_logger(__name__)

# Only these files of a base model are read: no code, no pickles.
BASE_FILES = ["*.safetensors", "*.json"]
# Options of `from_pretrained` that say where on the Hub something is.
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder", "proxies")
# Those of them that another repository is found with too.
SHARED_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
# What config.json says of the code beside it.
AUTO_MAP = {
    "AutoConfig": "configuration_voxlm.VoxLMConfig",
    "AutoModel": "modeling_voxlm.VoxLMForSpeechSeq2Seq",
    "AutoModelForSpeechSeq2Seq": "modeling_voxlm.VoxLMForSpeechSeq2Seq",
    "AutoProcessor": "processing_voxlm.VoxLMProcessor",
}
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {
        "impl": "pipeline_voxlm.VoxLMASRPipeline",
        "pt": ["AutoModelForSpeechSeq2Seq"],
        "type": "multimodal",
        "default": {},
    }
}


# How the reader's texts are chosen by an LLM that hears nothing. Chosen by hand: with Whisper-base and SmolLM2 the errors are
# about the same for weights from 0.1 to 0.5.
PLAIN_LLM = {"llm_prompt": "none", "llm_weight": 0.2, "word_bonus": 0.5}
# Noise in place of speech: recordings of so many seconds, half the greatest loudness, and the rate of its syllables. Chosen by hand.
NOISE_S, NOISE_LEVEL, SYLLABLES_PER_SECOND = (3.0, 8.0), 0.05, 4.0


class VoxLMLoadingMixin:
    """`from_pretrained`, `save_pretrained`, LoRA, and making a model from base models."""

    @torch.no_grad()
    def initialize_weights(self):
        """Initialise what no checkpoint filled; LoRA starts as the identity (B = 0), as in peft."""
        super().initialize_weights()
        if self.config.lora_config is not None:
            for module in self.modules():
                if isinstance(module, LoraLayer):
                    initialize_lora(module, self.config.lora_config.get("init_lora_weights", True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """
        [`PreTrainedModel.from_pretrained`], with three differences: only safetensors are loaded, weights of plain base models
        load into a model with LoRA, and weights that the checkpoint lacks are an error instead of random numbers (LoRA weights
        alone may be missing, all of them, since new LoRA is the identity).

        Raises:
            ValueError: naming the missing weights; not with `output_loading_info=True`, which asks for their list, nor for
                a caller's `state_dict` without a checkpoint. For weights that mean nothing, pickles, and files outside the
                folder, see `checkpoint_voxlm`.
        """
        warn_if_untested()
        output_loading_info = kwargs.pop("output_loading_info", False)
        source, delta_folder = pretrained_model_name_or_path, None
        check_source(source, kwargs, config_needed=config is None)
        kwargs.update(use_safetensors=True, weights_only=True)
        hub_options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        known = cls._known_config(source, config, kwargs)
        kwargs.setdefault("key_mapping", cls._lora_key_mapping(known))
        if source is not None and getattr(known, "base_models", None):
            shared_options = {name: kwargs[name] for name in SHARED_OPTIONS if name in kwargs}
            delta_folder = base_folder(source, kwargs.get("revision"), **shared_options) / kwargs.pop("subfolder", "")
            delta = read_tensors(delta_folder)
            for name, tensor in delta.items():
                check_values(delta_folder, name, tensor, known.text_config.vocab_size)
            kwargs["state_dict"] = with_bases(delta, known, **shared_options)
            config, source = known, None
        try:
            model, info = super().from_pretrained(
                source, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except OSError as error:
            if "safetensors" not in str(error):
                raise
            # The library's own advice is to load pickles instead.
            raise ValueError(f"{source} has no weights that can be loaded. {HOW_TO_CONVERT}") from error
        if delta_folder is not None:
            model.config._name_or_path = model.name_or_path = str(pretrained_model_name_or_path)
            model.config.base_models = None  # the model is whole now, and so is what it saves
            model.generation_config = GenerationConfig.from_pretrained(delta_folder)
        if not output_loading_info and pretrained_model_name_or_path is not None:
            names = model.state_dict().keys()
            check_missing(pretrained_model_name_or_path, names, info["missing_keys"], info["unexpected_keys"])
        model.freeze_base_weights()  # loading makes every parameter anew, and trainable
        # `save_pretrained` restores the plain names of base weights itself; the library would undo the renaming again.
        model._weight_conversions = None
        model.hub_options = hub_options
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        """The library's step between making the model on the meta device and filling it, with a check of what fills it."""
        source, files = load_config.pretrained_model_name_or_path, list(map(Path, checkpoint_files or []))
        for path in files:
            if path.suffix != ".safetensors":
                raise ValueError(f"{source} names the weights {path.name!r}. {HOW_TO_CONVERT}")
            if Path(source).is_dir():
                check_inside(path, Path(source))
        if state_dict is None:
            check_weights(model, files, load_config.hf_quantizer is not None, load_config.ignore_mismatched_sizes)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs)

    @classmethod
    def _known_config(cls, source, config, options: dict):
        """The config of a checkpoint, as the caller gave it or as it is stored."""
        if config is not None and hasattr(config, "lora_config"):
            return config
        given = {name: options[name] for name in ("lora_config", *HUB_OPTIONS) if name in options}
        return cls.config_class.from_pretrained(config or source, **given)

    @classmethod
    def _lora_key_mapping(cls, config) -> dict[str, str] | None:
        """Renaming that gives plain LLM weights the names they have under LoRA; `None` without LoRA."""
        if config.lora_config is None:
            return None
        targets = {**DEFAULT_LORA, **config.lora_config}["target_modules"]
        limits = [config.lora_config.get(name) for name in ("exclude_modules", "layers_to_transform")]
        if isinstance(targets, str) or any(limit is not None for limit in limits):
            with torch.device("meta"):  # which layers those are, peft alone can tell
                names = [name for name, _ in lora_layers(cls(copy.deepcopy(config)))]
        else:
            names = targets
        names = "|".join(re.escape(name.removeprefix("language_model.")) for name in sorted(names))
        return {
            rf"(^language_model\.(?:.+\.)?(?:{names}))\.{kind}": rf"\1.base_layer.{kind}"
            for kind in ("weight", "bias", "weight_scale")  # the last one where the checkpoint is stored in 8 bits
        }

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """
        [`PreTrainedModel.save_pretrained`]; base weights keep the names they have without LoRA, and the code travels along.

        Raises:
            ValueError: after `pack_weights` or `quantize_dynamic`, whose weights are in no format that can be loaded.
        """
        if self.for_inference_only:
            raise ValueError(
                "A model with packed or 8-bit weights cannot be saved; save it before `pack_weights` or `quantize_dynamic`"
            )
        if self.config.lora_config is not None:
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {key.replace(".base_layer.", "."): value for key, value in state_dict.items()}
        self.config.auto_map, self.config.custom_pipelines = dict(AUTO_MAP), copy.deepcopy(CUSTOM_PIPELINES)
        with saved_with_code(type(self), "AutoModel"):
            super().save_pretrained(save_directory, *args, state_dict=state_dict, **kwargs)

    def freeze_base_weights(self):
        """Freeze the audio model (unless `freeze_audio_encoder=False`) and, under LoRA, the LLM's own weights."""
        if self.config.freeze_audio_encoder:
            self.encoder.requires_grad_(False)
            if self.reader is not None:
                self.reader.decoder.requires_grad_(False)
        if self.config.lora_config is not None:
            for name, parameter in self.language_model.named_parameters():
                parameter.requires_grad_(".lora_" in name)

    def inject_lora(self):
        """Put LoRA into the LLM, as `config.lora_config` says.

        Raises:
            ImportError: without peft.
            ValueError: for targets that the LLM does not have, or that are no linear layers inside it.
        """
        if not is_peft_available():
            raise ImportError(
                "This model has LoRA weights (`lora_config` is set), which need peft: pip install peft. "
                "An export in mode `merged` works without."
            )
        settings = {**DEFAULT_LORA, **self.config.lora_config}
        try:
            inject_adapter_in_model(LoraConfig(**settings), self.language_model)
        except ValueError as error:
            # peft prints the layers that it cannot adapt, which may be the whole LLM.
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise ValueError(
                f"LoRA cannot be where `lora_config['target_modules']` = {settings['target_modules']!r} says: {reason}"
            ) from None
        output_layer = self.language_model.get_output_embeddings()
        for name, module in lora_layers(self):
            if module is output_layer or not isinstance(module.get_base_layer(), (nn.Linear, Conv1D)):
                raise ValueError(
                    f"LoRA can be in linear layers inside the LLM; `lora_config['target_modules']` also names {name}, "
                    "which is an embedding, the output layer or of another kind"
                )
        if settings["target_modules"] == "all-linear":
            # The names, which say more in a config, and are found without making the model.
            targets = {name.rsplit(".", 1)[-1] for name, _ in lora_layers(self)}
            self.config.lora_config = {**settings, "target_modules": sorted(targets)}

    @classmethod
    def from_base_models(cls, audio=None, text=None, preset=None, dtype=None, **overrides):
        """
        Compose a new model from a pretrained audio encoder and a pretrained causal LLM. Projector, LoRA and alignment head
        are untrained.

        Args:
            audio (`str`), text (`str`): Hub ids or folders; optional when `preset` is given.
            preset (`str`, *optional*): name of a size in `PRESETS`, which fills in what is not given.
            dtype (`str` or `torch.dtype`, *optional*): floating-point dtype of all weights, or its name; float32 by default.
            **overrides: fields of [`VoxLMConfig`]. `lora_config` defaults to `{}`, LoRA with the default settings.

        Returns:
            the model in evaluation mode, with the matching [`VoxLMProcessor`] as `model.processor`.

        Raises:
            ValueError: for an unknown preset, a missing base, a dtype that is not a floating-point one, or an encoder whose
                frame rate cannot be derived.
        """
        dtype = floating_dtype(dtype)
        if preset is not None:
            preset_audio, preset_text, fields = preset_bases(preset)
            audio, text, overrides = audio or preset_audio, text or preset_text, {**fields, **overrides}
        if audio is None or text is None:
            raise ValueError(f"Both base models are needed, got audio={audio!r} and text={text!r}")
        encoder = load_base(AutoModel, audio, dtype)
        audio_config = encoder.config
        encoder = encoder.get_encoder() if audio_config.is_encoder_decoder else encoder
        language_model = load_base(AutoModelForCausalLM, text, dtype)
        processor = VoxLMProcessor.from_base_models(audio, text)
        tokenizer = processor.tokenizer
        if len(tokenizer) > language_model.get_input_embeddings().num_embeddings:
            language_model.resize_token_embeddings(len(tokenizer))
        text_config = language_model.config
        text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
        attentions = [part.config._attn_implementation for part in (encoder, language_model)]
        config = cls.config_class(
            audio_config=audio_config,
            text_config=text_config,
            audio_token_id=processor.audio_token_id,
            dtype=dtype,
            **{"lora_config": {}, "projector_trained": False, "alignment_trained": False, **overrides},
        )
        # A new composite config resets the attention of the configs it takes in, which the loaded parts share.
        encoder.config._attn_implementation, language_model.config._attn_implementation = attentions
        model = cls(config, encoder=encoder, language_model=language_model).to(dtype)
        if model.config.projector_encoder_layers:
            model.projector.start_from(encoder)
        model.projector.scale_to(language_model.get_input_embeddings().weight)
        model.processor = processor.configure(model)
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    @torch.no_grad()
    def add_reader(self, audio: str, language: str = "en", **settings):
        """
        Keep the decoder of the audio model as a reader (see `reader_voxlm`), in place. It works at once, on segments padded to
        the encoder's window (`reader_config["in_window"]`). A recipe's stage of kind `reader` teaches it where audio ends that is
        not padded, which takes less time; until then the encoder's mean states of silence are the end of such audio.

        Where the projector is not trained, the LLM judges the reader's texts as a plain language model (`llm_prompt` "none"), and
        confidences are the reader's probabilities.

        Args:
            audio (`str`): Hub id or folder of the encoder-decoder model that the encoder comes from.
            language (`str`): the language in which `transcribe` decodes unless it is asked for another, and which the LLM is
                trained on; a name or a code.
            **settings: fields of `config.reader_config`.

        Returns:
            the model.

        Raises:
            ValueError: for an audio model whose decoder cannot be driven or whose encoder is not this model's, and for a
                language it does not know.
        """
        base = load_base(AutoModel, audio, self.dtype)
        if base.config.model_type not in READER_MODELS:
            raise ValueError(f"A reader needs an audio model of {READER_MODELS}, {audio} is {base.config.model_type!r}")
        own = self.encoder.state_dict()
        for name, tensor in base.get_encoder().state_dict().items():
            # Storage in 16 bits may have rounded one of them.
            if name not in own or not torch.allclose(own[name], tensor.to(own[name]), rtol=1e-2, atol=1e-3):
                raise ValueError(f"{audio} is not the audio model that this model's encoder comes from: {name} differs")
        generation = GenerationConfig.from_pretrained(audio)
        tokenizers = AutoTokenizer.from_pretrained(audio), self.get_processor().tokenizer
        table = token_table(*tokenizers, generation.suppress_tokens or [])
        self.config.reader_config = {
            **DEFAULT_READER,
            **decoder_prompt(generation, language),
            "previous_id": tokenizers[0].get_vocab().get("<|startofprev|>"),
            "eos_token_id": self.config.audio_config.eos_token_id,
            "spelling_size": len(table[0]),
            "alignment_heads": getattr(generation, "alignment_heads", None),
            "in_window": True,
            **({} if self.config.projector_trained else PLAIN_LLM),
            **settings,
        }
        if not self.config.projector_trained:
            self.config.confidence_calibration = {"scale": 0.0, "entropy": 0.0, "bias": 0.0, "reader": 1.0}
        self.config.validate()
        self.reader = VoxLMReader(self.config, base.get_decoder()).to(self.device, self.dtype).eval()
        self.reader.spelling, self.reader.spelling_offsets = (part.to(self.device) for part in table)
        self.reader.end.copy_(silence_states(self, len(self.reader.end)))
        self.freeze_base_weights()
        return self

    def get_processor(self) -> VoxLMProcessor:
        """The model's processor: `model.processor` if set, else loaded from where the model came from.

        Raises:
            ValueError: when the model has no such place.
        """
        if self.processor is None:
            source = self.config._name_or_path
            if not source:
                raise ValueError("The model was not loaded from a checkpoint; set `model.processor` first")
            options = {name: value for name, value in self.hub_options.items() if name != "force_download"}
            # The same commit as the weights; where this very code came with the checkpoint, it is trusted already.
            commit = getattr(self.config, "_commit_hash", None)
            options["revision"] = commit or options.get("revision") or "main"
            self.processor = VoxLMProcessor.from_pretrained(source, trust_remote_code=self.is_remote_code(), **options)
            self.processor.context_length = context_length(self.config)
            self.processor.projector_merges = self.config.projector_merges
        return self.processor


def silence_states(model, count: int) -> torch.Tensor:
    """
    The encoder's mean states `(count, audio_size)` of the silence right behind a recording that is padded to the window, which the
    reader has learnt to stop on. The recordings are noise that swells and fades as syllables do.
    """
    processor, generator = model.get_processor(), np.random.default_rng(0)
    rate, states = processor.sampling_rate, []
    for seconds in NOISE_S:
        samples = generator.standard_normal(round(seconds * rate))
        loudness = NOISE_LEVEL * (1 + np.cos(2 * np.pi * SYLLABLES_PER_SECOND * np.arange(len(samples)) / rate))
        (clip,) = processor.extract_clips([(loudness * samples).astype(np.float32)])
        encoded = model.encode_audio(**processor.pad_clips([silence_behind(processor, clip, None)]))
        first = -(-len(samples) // round(processor.frame_s * rate))
        states.append(encoded.last_hidden_state[0, first : first + count])
    return torch.stack(states).mean(0)


def check_source(source, options: dict, config_needed: bool):
    """
    Check what `from_pretrained` was told to load, as far as it is on this machine.

    Raises:
        ValueError: see `check_folder`; also for a path that is no folder, and for kinds of weights other than safetensors.
    """
    if options.get("gguf_file") is not None:
        raise ValueError(f"`gguf_file` is {options['gguf_file']!r}. {HOW_TO_CONVERT}")
    if source is None:
        return
    path = Path(source)
    if path.is_dir():
        check_folder(path / (options.get("subfolder") or ""), config_needed)
    elif path.is_file():
        raise ValueError(f"{source} is a file; give the folder of the checkpoint")
    elif path.is_absolute() or str(source).startswith((".", "~")):
        raise ValueError(f"{source} is not a folder")


def load_base(auto_class, name: str | Path, dtype: torch.dtype) -> PreTrainedModel:
    """
    A pretrained base model, from a folder or the Hub.

    Raises:
        ValueError: for one without safetensors, and for what `check_folder` refuses.
    """
    check_source(name, {}, config_needed=True)
    try:
        return auto_class.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise ValueError(f"The base model {name} has no weights that can be loaded. {HOW_TO_CONVERT}") from error


def lora_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Names and modules of a model's layers under LoRA; none without peft, which would have made them."""
    if not is_peft_available():
        return []
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def initialize_lora(layer: nn.Module, kind: bool | str):
    """Make a LoRA layer the identity, as peft does: B is 0 and, for DoRA, the magnitudes are those of the base's rows."""
    for name in layer.lora_A:
        if kind == "gaussian":
            init.normal_(layer.lora_A[name].weight, std=1 / layer.r[name])
        else:
            init.kaiming_uniform_(layer.lora_A[name].weight, a=5**0.5)
        init.zeros_(layer.lora_B[name].weight)
        if name in layer.lora_magnitude_vector:
            weight = layer.get_base_layer().weight
            weight = weight.T if layer.fan_in_fan_out else weight
            init.copy_(layer.lora_magnitude_vector[name].weight, torch.linalg.norm(weight, dim=1))


def warn_if_untested():
    """Warn, once, about a version of transformers that is newer than those this code was tested with; older ones are refused."""
    if version.parse(transformers_version) >= version.parse(TESTED_TRANSFORMERS[1]):
        logger.warning_once(WRONG_TRANSFORMERS)


def check_missing(source, names: Iterable[str], missing: Iterable[str], unexpected: Iterable[str] = ()):
    """
    Check that a checkpoint has all weights of its model; those of LoRA may be missing, but only all of them.

    Args:
        names: the model's weights.
        missing: those of them that the checkpoint lacks.
        unexpected: weights of the checkpoint that the model lacks.

    Raises:
        ValueError: naming missing weights, and the unexpected ones that may be meant for them.
    """
    lora, lost = ({name for name in some if ".lora_" in name} for some in (names, missing))
    strange = sorted(name for name in unexpected if ".lora_" in name)
    fresh_lora = lost == lora and not strange
    missing = sorted(name for name in missing if not (fresh_lora and name in lost))
    if missing:
        instead = f" It has {_shown(strange)} instead." if strange else ""
        raise ValueError(
            f"{source} lacks {len(missing)} weights of this model: {_shown(missing)}.{instead} They would be random; use the "
            "checkpoint that this config belongs to, or `from_base_models` for a new model"
        )


def _shown(names: list[str]) -> str:
    """The first five of some names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def floating_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """The dtype of a model's weights, as given or by its name (`"bfloat16"`, `"torch.bfloat16"`); float32 by default.

    Raises:
        ValueError: for what is no floating-point dtype of at least 16 bits.
    """
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    named = torch.float32 if dtype is None else named
    if not isinstance(named, torch.dtype) or named not in FLOATS:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in FLOATS)
        raise ValueError(f"`dtype` must be one of {known}, got {dtype!r}")
    return named


@contextmanager
def without_lora(language_model: nn.Module) -> Iterator[None]:
    """Let an LLM compute with its base weights alone; LoRA is as it was afterwards."""
    layers = [module for _, module in lora_layers(language_model)]
    # peft freezes what it disables, and lets all of it learn again.
    learning = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learns in learning:
            parameter.requires_grad_(learns)


def merge_lora(language_model: nn.Module):
    """Fold LoRA into the weights it adapts, in place; the LoRA layers become plain ones."""
    for name, module in lora_layers(language_model):
        module.merge()
        language_model.set_submodule(name, module.get_base_layer())


def base_folder(name: str, revision: str | None, **hub_options) -> Path:
    """
    The local folder of a base model, downloaded when `name` is a Hub id.

    Raises:
        ValueError: when it cannot be had, with the reason.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=BASE_FILES, **hub_options))
    except Exception as error:  # whatever the Hub's client raises: the checkpoint is useless without its base
        raise ValueError(
            f"This checkpoint needs the base model {name} at revision {revision}, which cannot be had: {error}"
        ) from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of all safetensors files of a folder, in the order of their names.

    Raises:
        ValueError: when there is none.
    """
    digest = hashlib.sha256()
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"The base model in {folder} has no safetensors weights, the only kind that is read")
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def base_reference(base: str) -> dict[str, str | None]:
    """
    `{"name", "revision", "sha256"}` of a base model given as a folder or a Hub id (`ID@REVISION` for another revision than
    its main branch). The revision is pinned to its present commit.
    """
    name, _, revision = base.partition("@") if not Path(base).is_dir() else (base, "", "")
    folder = base_folder(name, revision or None)
    # Snapshots in the Hub's cache are named by their commit.
    commit = folder.name if folder.parent.name == "snapshots" else None
    return {"name": name, "revision": commit, "sha256": weights_digest(folder)}


def base_state(config, **hub_options) -> dict[str, torch.Tensor]:
    """
    The frozen weights of `config.base_models`, under the names they have in VoxLM without LoRA.

    Raises:
        ValueError: for a base that is missing, or whose weights are not those the checkpoint was trained on.
    """
    state = {}
    for part, reference in config.base_models.items():
        folder = base_folder(reference["name"], reference["revision"], **hub_options)
        found = weights_digest(folder)
        if found != reference["sha256"]:
            raise ValueError(
                f"The weights of the base model {reference['name']} are not those that this checkpoint was trained on: their "
                f"SHA-256 is {found[:16]}..., expected {reference['sha256'][:16]}..."
            )
        if part == "audio":
            model = load_base(AutoModel, folder, torch.float32)
            if config.reader_config is not None:
                decoder = model.get_decoder().state_dict()
                state.update({f"reader.decoder.{name}": tensor for name, tensor in decoder.items()})
            model = model.get_encoder() if model.config.is_encoder_decoder else model
            prefix = "encoder."
        else:
            model, prefix = load_base(AutoModelForCausalLM, folder, torch.float32), "language_model."
        state.update({prefix + name: tensor for name, tensor in model.state_dict().items()})
    return state


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in tensors_of(path)}


def with_bases(tensors: dict[str, torch.Tensor], config, **hub_options) -> dict[str, torch.Tensor]:
    """All weights of a delta: its own `tensors`, its bases', and the rows that it adds to their embeddings."""
    state = base_state(config, **hub_options)
    for name, tensor in tensors.items():
        if name.startswith("added."):
            name = name.removeprefix("added.")
            tensor = torch.cat([state[name], tensor.to(state[name].dtype)])
        state[name] = tensor
    if config.tie_word_embeddings:
        state.pop("language_model.lm_head.weight", None)
    return state
