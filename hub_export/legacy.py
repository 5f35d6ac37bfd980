"""
Convert a checkpoint of the original VoxLM (github.com/suryaumapathy2812/voxlm) to this package's.

    voxlm-convert-legacy model.pt OUT [--audio-base FOLDER_OR_ID] [--text-base FOLDER_OR_ID]

Reads the pickle with torch's weights-only unpickler, which allows one class, the original's config, and replaces it by
a class without behaviour: no code of the file runs. Also reads the `model.safetensors` that the original's build_hf.py
writes (with its config.json).
"""

import argparse
import json
import sys
import zipfile
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, GenerationConfig

from voxlm_hf import VoxLMConfig, VoxLMForSpeechSeq2Seq, VoxLMProcessor

from .export import export


# All of the following are the original's, unless their comment says otherwise.
DEFAULT_INSTRUCTION = "Transcribe the following audio."
# Names of the original's special tokens, in the order in which it adds them.
ADDED_TOKENS = ("audio_start_token", "audio_end_token", "transcribe_token")
DEFAULTS = {
    "architecture_version": "v2",
    "use_lora": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "downsample_factor": 4,
    "alignment_num_layers": 2,
    "alignment_num_heads": 8,
    "max_audio_length": 30,
    "audio_start_token": "<|audio|>",
    "audio_end_token": "<|/audio|>",
    "transcribe_token": "<|transcribe|>",
}
# Fields that build_hf.py names differently from the training code.
OTHER_NAMES = {"whisper_model": "audio_encoder", "whisper_dim": "audio_encoder_dim", "qwen_model": "llm_model"}
# Of a number in a config; the original's largest is far below. Ours, chosen by hand, not tuned.
LARGEST_FIELD = 10_000
# How the original decodes. By default a converted model decodes as any other of this package.
ORIGINAL_DECODING = {"do_sample": False, "repetition_penalty": 1.2, "no_repeat_ngram_size": 4}
ORIGINAL_DECODING_FILE = "generation_config_original.json"


class OriginalConfig:
    """Replaces `src.config.VoxLMConfig`: holds the pickled fields and has no behaviour."""


def read_checkpoint(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """
    Config fields and tensors of an original checkpoint; the tensors are mapped from the file and read when they are
    used.

    Raises:
        ValueError: for a file that is not a checkpoint of the original, is truncated, is packed so that it grows when
            read, or whose pickle needs anything but tensors, plain values and the original's config class.
    """
    path = Path(path)
    fields, state = read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    for part in (fields, state):
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"{path} holds a {type(part).__name__} where values under their names belong")
    return dict(fields), dict(state)


def read_safetensors(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors of what the original's build_hf.py wrote; see `read_checkpoint` for the errors."""
    config_file = path.with_name("config.json")
    if not config_file.is_file():
        raise ValueError(f"{path} needs the config.json of its model beside it")
    try:
        return json.loads(config_file.read_text()), load_file(path)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def read_pickle(path: Path) -> tuple[dict, dict]:
    """
    Config and tensors of what the original's training wrote by `torch.save`; see `read_checkpoint` for the errors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is no whole file of torch.save (truncated, or of another kind): {error}") from error
    if packed or unpacked > path.stat().st_size:
        raise ValueError(
            f"{path} holds {unpacked:,} bytes in a file of {path.stat().st_size:,}; torch.save does not compress, so it did not "
            "write this file"
        )
    try:
        with torch.serialization.safe_globals([(OriginalConfig, "src.config.VoxLMConfig")]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on a broken file the unpickler can raise anything
        first_line = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{path} was refused, and nothing of it was run: {type(error).__name__}: {first_line}"
        ) from error
    if not isinstance(content, dict) or not {"config", "model_state_dict"} <= set(content):
        found = sorted(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} has no 'config' and 'model_state_dict': it holds {found}")
    fields = content["config"]
    return vars(fields) if isinstance(fields, OriginalConfig) else fields, content["model_state_dict"]


def check_values(path, fields: dict, state: dict):
    """
    Raises:
        ValueError: naming a field of the wrong type or out of range, or a weight that is not a tensor of finite
            numbers.
    """
    kinds = {"max_audio_length": (int, float), "lora_alpha": (int, float), **dict.fromkeys(ADDED_TOKENS, str)}
    kinds |= dict.fromkeys(("downsample_factor", "lora_r", "alignment_num_heads", "alignment_num_layers"), int)
    for name, kind in kinds.items():
        value = fields[name]
        valid = isinstance(value, kind) and not isinstance(value, bool) and value
        if not valid or (kind is not str and not 0 < value < LARGEST_FIELD):
            raise ValueError(f"{path}: {name} of its config is {value!r}")
    tokens = [fields[name] for name in ADDED_TOKENS]
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{path}: {', '.join(ADDED_TOKENS)} of its config must differ, got {tokens}")
    inside = [token for token in tokens if token in DEFAULT_INSTRUCTION]
    if inside:
        raise ValueError(
            f"{path}: the token {inside[0]!r} of its config is a part of the prompt {DEFAULT_INSTRUCTION!r}"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is no tensor but {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {name} is a {tensor.dtype} tensor on {tensor.device}, {tensor.layout}, and no weight"
            )
        # A view may repeat its numbers without end (a stride of 0), and would grow to that size when it is written.
        size, held = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
        if size > held:
            raise ValueError(f"{path}: {name} claims {size:,} bytes, the file holds {held:,} for it")
        # Through minimum and maximum, because a mask of a large embedding may not fit into memory.
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite; training must have failed")
    if fields["alignment_num_layers"] > len(state):
        raise ValueError(
            f"{path}: alignment_num_layers of its config is {fields['alignment_num_layers']}, and it holds {len(state)} tensors"
        )


def rename(name: str) -> str | None:
    """This package's name for one of the original's tensors; `None` for those that it does not use."""
    unused = ("audio_encoder.whisper.decoder.", "audio_encoder.encoder.")  # never run; a second name of the encoder
    if name == "_dtype_marker" or name.startswith(unused):
        return None
    layers = {
        "audio_projection.projection.0.": "projector.linear_in.",
        "audio_projection.projection.3.": "projector.linear_out.",
        "audio_projection.downsample.": "projector.conv.",
        "audio_encoder.whisper.encoder.": "encoder.",
        "audio_start_embed": "projector.start",
        "audio_end_embed": "projector.end",
        "alignment_module.": "alignment.",
        "llm.base_model.model.": "language_model.",
        "llm.": "language_model.",
    }
    for old, new in layers.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    if name.startswith("alignment."):
        name = name.replace(".ffn.0.", ".up.").replace(".ffn.3.", ".down.")
    return name


def convert(path: Path, audio_base: str | None = None, text_base: str | None = None) -> VoxLMForSpeechSeq2Seq:
    """
    The model of an original checkpoint, with its processor, in the dtypes of the file.

    Args:
        path: `model.pt`, or `model.safetensors` with config.json beside it.
        audio_base, text_base: Hub id or folder of the base models, whose configs and tokenizer are needed (the weights
            are in the checkpoint); by default the names in its config.

    Raises:
        ValueError: for what `read_checkpoint` and `check_values` refuse, version 1 checkpoints, added tokens that do
            not fit the base's tokenizer, and tensors that are missing, left over, or of another shape than the bases
            give.
    """
    fields, state = read_checkpoint(path)
    fields = complete_fields(path, fields, {"audio_encoder": audio_base, "llm_model": text_base})
    if any(name.startswith(("timestamp_head.", "confidence_head.")) for name in state):
        raise ValueError(
            f"{path} is a version 1 checkpoint: its timestamp head never worked at inference, and it has no alignment module"
        )
    check_values(path, fields, state)
    renamed = rename_all(state)
    embeddings = renamed.get("language_model.model.embed_tokens.weight")
    if embeddings is None:
        raise ValueError(f"{path} holds no embeddings of its LLM")
    tokenizer = make_tokenizer(fields, len(embeddings))
    config = make_config(fields, renamed, tokenizer)
    # On the meta device, so that no memory is allocated; the weights stay in the file until they are used.
    with init_empty_weights(include_buffers=False):
        model = VoxLMForSpeechSeq2Seq(config)
    if config.text_config.tie_word_embeddings:
        renamed.pop("language_model.lm_head.weight", None)
    check_tensors(path, renamed, model)
    model.load_state_dict(renamed, strict=False, assign=True)
    model.tie_weights()
    extractor = AutoFeatureExtractor.from_pretrained(fields["audio_encoder"], trust_remote_code=False)
    processor = VoxLMProcessor(extractor, tokenizer, audio_token=fields["audio_start_token"])
    model.processor = processor.configure(model)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        suppress_tokens=[config.audio_token_id],
    )
    return model.eval()


def complete_fields(path, fields: dict, bases: dict[str, str | None]) -> dict:
    """
    The config fields under the names of the original's training code, with its defaults and the given bases.

    Raises:
        ValueError: naming a base that is neither given nor in the config.
    """
    fields = {**DEFAULTS, **{OTHER_NAMES.get(name, name): value for name, value in fields.items()}}
    for name, given in bases.items():
        fields[name] = given or fields.get(name)
        if not fields[name] or not isinstance(fields[name], (str, Path)):
            raise ValueError(f"{path} does not name its {name} ({fields[name]!r}); give --audio-base and --text-base")
    return fields


def make_config(fields: dict, tensors: dict[str, torch.Tensor], tokenizer) -> VoxLMConfig:
    """
    The config for checked fields of the original, and for the embeddings, LoRA and alignment layers among its renamed
    tensors.
    """
    text_config = AutoConfig.from_pretrained(fields["llm_model"], trust_remote_code=False)
    embeddings = tensors["language_model.model.embed_tokens.weight"]
    head = tensors.get("language_model.lm_head.weight")
    text_config.vocab_size = len(embeddings)
    text_config.tie_word_embeddings = head is None or torch.equal(head, embeddings)
    text_config.pad_token_id, text_config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    lora_targets = sorted({name.split(".")[-4] for name in tensors if ".lora_A." in name})
    lora_config = {"r": fields["lora_r"], "lora_alpha": fields["lora_alpha"], "target_modules": lora_targets}
    alignment_layers = {name.split(".")[2] for name in tensors if name.startswith("alignment.layers.")}
    return VoxLMConfig(
        audio_config=AutoConfig.from_pretrained(fields["audio_encoder"], trust_remote_code=False),
        text_config=text_config,
        audio_token_id=tokenizer.convert_tokens_to_ids(fields["audio_start_token"]),
        audio_window_s=float(fields["max_audio_length"]),
        pad_audio_to_window=True,
        projector_kind="conv",
        projector_stride=fields["downsample_factor"],
        alignment_kind="cross_attention",
        alignment_num_blocks=len(alignment_layers) or fields["alignment_num_layers"],
        alignment_num_heads=fields["alignment_num_heads"],
        lora_config=lora_config if lora_targets else None,
        prompt=DEFAULT_INSTRUCTION,
        prompt_template="{prompt}{audio}" + fields["transcribe_token"],
        dtype=embeddings.dtype,
    )


def rename_all(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    All tensors under this package's names.

    Raises:
        ValueError: when the encoder's weights differ under its two names, or two tensors would get the same name.
    """
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        new = rename(name)
        if name.startswith("audio_encoder.encoder."):
            twin = name.replace("audio_encoder.", "audio_encoder.whisper.", 1)
            if twin not in state:
                new = "encoder." + name.removeprefix("audio_encoder.encoder.")
            elif not torch.equal(tensor, state[twin]):
                raise ValueError(f"{name} and {twin} should be one tensor, but differ")
        if new is None:
            continue
        if new in renamed:
            raise ValueError(f"Two tensors of the checkpoint would be {new}")
        renamed[new] = tensor
    return renamed


def make_tokenizer(fields: dict, num_rows: int):
    """
    The base's tokenizer with the tokens that the original added.

    Args:
        num_rows: of the embeddings; it tells whether the original added a pad token.

    Raises:
        ValueError: when the numbers of tokens and rows do not fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(fields["llm_model"], trust_remote_code=False)
    names = [fields[name] for name in ADDED_TOKENS]
    vocabulary, added = tokenizer.get_vocab(), num_rows - len(tokenizer)
    new = sum(name not in vocabulary for name in names)
    if added not in (new, new + 1):
        raise ValueError(
            f"The checkpoint has {num_rows} token embeddings, the tokenizer of {fields['llm_model']} {len(tokenizer)} tokens; the "
            f"original adds {new} or {new + 1}, so the checkpoint has another base: name it with --text-base"
        )
    if added == new + 1:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    elif "<|fim_pad|>" in tokenizer.get_vocab() and tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = "<|fim_pad|>"
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    if len(tokenizer) != num_rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens after adding {names}, the checkpoint {num_rows} rows"
        )
    if tokenizer.pad_token is None:
        # The original could not pad with such a tokenizer. Padding is masked, and the original never uses this token.
        tokenizer.pad_token = fields["audio_end_token"]
    tokenizer.padding_side = "right"
    return tokenizer


def check_tensors(path, tensors: dict[str, torch.Tensor], model):
    """
    Raises:
        ValueError: naming tensors that are missing, left over, or of the wrong shape.
    """
    tied = set(model.all_tied_weights_keys)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise ValueError(
            f"{path} does not fit its bases: {len(missing)} tensors are missing ({', '.join(missing[:3])}), {len(extra)} are left "
            f"over ({', '.join(extra[:3])})"
        )
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the bases give {tuple(tensor.shape)}; are they the ones it "
                "was trained on?"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument(
        "--audio-base", help="folder or Hub id of the Whisper model (default: the one named in the checkpoint)"
    )
    parser.add_argument("--text-base", help="folder or Hub id of the LLM (default: the one named in the checkpoint)")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")
    arguments = parser.parse_args(argv)
    try:
        model = convert(arguments.checkpoint, arguments.audio_base, arguments.text_base)
        original = GenerationConfig(**{**model.generation_config.to_dict(), **ORIGINAL_DECODING})
        export(model, arguments.output, "lora", force=arguments.force)
        original.save_pretrained(arguments.output, ORIGINAL_DECODING_FILE)
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        print(f"voxlm-convert-legacy: {error}", file=sys.stderr)
        return 1
    print(f"converted to {arguments.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
