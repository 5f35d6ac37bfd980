"""
Write a model as a checkpoint folder that loads wherever transformers is: `voxlm-export MODEL FOLDER [--mode ...]`.

    merged (default)    LoRA folded into the LLM; self-contained, peft is not needed
    lora                self-contained and still trainable
    delta               only what was trained, with references to the base models (`--audio-base`, `--text-base`)

Frozen weights lie in shards of their own (`encoder-*`, `decoder-*`, `language-model-*`), what is trained in `trained.safetensors`, so that a
better checkpoint changes one small file (with `--frozen-from FOLDER`). `--code FOLDER` refreshes only the code files in it.
"""

import argparse
import copy
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import voxlm_hf
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.bases_voxlm import base_reference, base_state


PACKAGE = Path(voxlm_hf.__file__).parent
# The flat modules of the package are the remote code; `__init__` only registers them for who has the package installed.
CODE_FILES = sorted(path.name for path in PACKAGE.glob("*_voxlm.py"))
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
SHARD_BYTES = 90_000_000
TRAINED_FILE = "trained.safetensors"
INT8_WEIGHTS = {
    "quant_method": "compressed-tensors",
    "format": "naive-quantized",
    "quantization_status": "compressed",
    "dequantize": True,
    "config_groups": {
        "weights": {
            "targets": ["Linear", "Embedding"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
    "ignore": [],
}


def copy_code(folder: Path):
    """Put the package's flat modules into a checkpoint folder."""
    for name in CODE_FILES:
        shutil.copyfile(PACKAGE / name, folder / name)


def to_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    A matrix as 8-bit integers with one scale per row, as compressed-tensors stores and restores it.

    Args:
        weight (`torch.Tensor` of shape `(rows, columns)`)
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme.model_validate(INT8_WEIGHTS["config_groups"]["weights"])
    weight = weight.float()
    scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(INT8_WEIGHTS["format"])
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return {name.removesuffix("weight") + key: tensor for key, tensor in packed.items()}


def merge_lora(model: VoxLMForSpeechSeq2Seq) -> tuple[dict[str, torch.Tensor], object]:
    """State and config of the same model with LoRA folded into the weights it adapts."""
    from peft.tuners.lora import LoraLayer

    config, state = copy.deepcopy(model.config), model.state_dict()
    config.lora_config = None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            weight = state[f"{name}.base_layer.weight"]
            for adapter in module.active_adapters:
                weight = (weight.float() + module.get_delta_weight(adapter).float()).to(weight.dtype)
            state[f"{name}.base_layer.weight"] = weight
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}, config


def delta_state(model: VoxLMForSpeechSeq2Seq, config) -> dict[str, torch.Tensor]:
    """
    What the base models of `config.base_models` do not have: trained weights, and the embeddings of added tokens.

    Raises:
        ValueError: naming a frozen weight that the base has otherwise.
    """
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    for name, tensor in base_state(config).items():
        own = state.pop(name, None)
        if own is None:
            raise ValueError(f"The base model has a weight that this model lacks: {name}")
        rows = len(tensor) if tensor.dim() else None
        if own.shape[1:] != tensor.shape[1:] or not torch.equal(own[:rows].cpu(), tensor.to(own.dtype)):
            raise ValueError(f"The base model is not the one this model has: {name} differs")
        if tensor.dim() and len(own) > rows and name not in model.all_tied_weights_keys:
            state[f"added.{name}"] = own[rows:].clone()
    return {name: tensor for name, tensor in state.items() if name not in model.all_tied_weights_keys}


def store(name: str, tensor: torch.Tensor, storage: str) -> dict[str, torch.Tensor]:
    """
    One tensor as it is written.

    Args:
        storage: "as is", a dtype's name, or "int8": the matrices of LLM and decoder in 8 bits, the encoder in float16, what is
            trained in bfloat16. There, norms and other vectors stay in float32: they are small, and not all of them fit float16.
    """
    if not tensor.is_floating_point() or storage == "as is":
        return {name: tensor}
    if storage != "int8":
        return {name: tensor.to(getattr(torch, storage))}
    if tensor.dim() < 2:
        return {name: tensor.float()}
    # Learned positions are no matrix that something is multiplied by, and are not restored.
    if part_of(name) in ("language-model", "decoder") and "embed_positions" not in name:
        return to_int8(name, tensor)
    return {name: tensor.bfloat16() if part_of(name) == "trained" else tensor.half()}


def part_of(name: str) -> str:
    """The file, or beginning of the names of files, that a tensor goes to."""
    if name.startswith("encoder."):
        return "encoder"
    if name.startswith("reader.decoder."):
        return "decoder"
    return "language-model" if name.startswith("language_model.") and ".lora_" not in name else "trained"


def split_shards(
    state: dict[str, torch.Tensor], tied: set[str], storage: str, shard_bytes: int = SHARD_BYTES
) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by file name, in files of at most `shard_bytes` (more where one tensor is larger)."""
    parts: dict[str, list[dict[str, torch.Tensor]]] = {
        part: [{}] for part in ("encoder", "decoder", "language-model", "trained")
    }
    for name, tensor in state.items():
        if name in tied:
            continue
        key = name.replace(".base_layer.", ".")
        stored, shards = store(key, tensor.detach().cpu(), storage), parts[part_of(key)]
        if shards[-1] and num_bytes(shards[-1]) + num_bytes(stored) > shard_bytes:
            shards.append({})
        shards[-1].update(stored)
    return {
        f"{part}.safetensors"
        if len(shards) == 1 and part != "language-model"
        else f"{part}-{number}.safetensors": shard
        for part, shards in parts.items()
        for number, shard in enumerate(shards, 1)
        if shard
    }


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def read_frozen_shards(model: VoxLMForSpeechSeq2Seq, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """
    The tensors of the frozen shards of an earlier export, by file name, checked to be the model's own weights.

    Rounding to 8 bits what was rounded before would not give the same bytes, and a new 90 MB file in the repository.

    Raises:
        ValueError: naming a weight that the model has otherwise, or not at all.
    """
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors")) if path.name != TRAINED_FILE}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                continue
            stored = tensor.float() * tensors[name + "_scale"] if tensor.dtype == torch.int8 else tensor.float()
            if name not in state or not torch.allclose(stored, state[name].float(), rtol=1e-4, atol=1e-6):
                raise ValueError(f"{folder / file} does not hold this model's frozen weights: {name} differs")
    return files


def write_weights(files: dict[str, dict[str, torch.Tensor]], folder: Path, frozen_from: Path | None = None):
    """Write shards and their index; with `frozen_from`, those that are there, but for what is trained, as copies."""
    weight_map = {}
    for file, tensors in files.items():
        if frozen_from is None or file == TRAINED_FILE or not (frozen_from / file).exists():
            tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(tensors, folder / file, metadata={"format": "pt"})
        else:
            shutil.copyfile(frozen_from / file, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {
        "metadata": {"total_size": sum(num_bytes(tensors) for tensors in files.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_config(config, folder: Path, storage: str, dtype: str):
    """config.json with the auto classes, the pipeline and, for "int8", how to restore the weights."""
    fields = config.to_dict()
    fields.update(
        architectures=["VoxLMForSpeechSeq2Seq"], auto_map=AUTO_MAP, custom_pipelines=CUSTOM_PIPELINES, dtype=dtype
    )
    for part in ("audio_config", "text_config"):
        fields[part]["dtype"] = dtype
    fields.pop("_name_or_path", None)
    fields.pop("quantization_config", None)
    if storage == "int8":
        fields["quantization_config"] = INT8_WEIGHTS
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")


def export(
    model: VoxLMForSpeechSeq2Seq,
    folder: Path,
    mode: str = "merged",
    storage: str = "as is",
    frozen_from: Path | None = None,
    bases: tuple[str, str] | None = None,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
):
    """
    Write `model` and its processor to `folder` so that Auto classes and `pipeline` load it without the package installed.

    It is written beside `folder` and moved there when it is whole: an error leaves what was there before.

    Args:
        mode (`"merged"`, `"lora"` or `"delta"`): see the module.
        storage: see `store`.
        frozen_from (`Path`, *optional*): an earlier export (it may be `folder` itself) of a model with the same frozen
            weights in the same storage, whose shards of them are taken over byte for byte.
        bases (`tuple[str, str]`, *optional*): for "delta", folder or Hub id (`ID@REVISION` for another than its main branch) of
            audio encoder and LLM.
        force (`bool`): replace `folder` if it exists (its README.md is kept).
        shard_bytes (`int`): largest file.

    Raises:
        FileExistsError: when `folder` exists and `force` is not given.
        ValueError: for options that do not go together, or bases that are not the model's.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not force:
        raise FileExistsError(f"{folder} exists and is not empty; give --force to replace it")
    if mode not in ("merged", "lora", "delta") or (mode == "delta") != (bases is not None):
        raise ValueError(
            f"The mode is merged, lora or delta, and delta alone needs the base models; got {mode!r}, {bases}"
        )
    if mode == "delta" and (storage == "int8" or frozen_from):
        raise ValueError("A delta holds no frozen weights: they cannot be stored in 8 bits, nor taken from elsewhere")
    config, state = copy.deepcopy(model.config), model.state_dict()
    if mode == "merged" and config.lora_config is not None:
        state, config = merge_lora(model)
    elif mode == "delta":
        config.base_models = {part: base_reference(base) for part, base in zip(("audio", "text"), bases)}
        state = delta_state(model, config)
    files = split_shards(state, set(model.all_tied_weights_keys), storage, shard_bytes)
    if frozen_from is not None:
        files.update(read_frozen_shards(model, frozen_from))
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    dtype = str(dtypes.pop()) if storage == "as is" and len(dtypes) == 1 else f"torch.{storage}"
    dtype = "float32" if dtype in ("torch.as is", "torch.int8") else dtype.removeprefix("torch.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".unfinished", dir=folder.parent))
    try:
        model.get_processor().save_pretrained(unfinished)
        model.generation_config.save_pretrained(unfinished)
        write_weights(files, unfinished, frozen_from)
        copy_code(unfinished)
        write_config(config, unfinished, storage, dtype)
        for file in ("processor_config.json", "tokenizer_config.json"):
            content = json.loads((unfinished / file).read_text())
            content["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
            (unfinished / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if (folder / "README.md").exists():
            shutil.copyfile(folder / "README.md", unfinished / "README.md")
        move_into_place(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def move_into_place(new: Path, folder: Path):
    """Put the finished folder `new` in the place of `folder`, whose old content goes when that has worked."""
    new.chmod(0o755)  # mkdtemp made it private
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", suffix=".old", dir=folder.parent))
    os.rename(folder, old / "folder")
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / "folder", folder)
        raise
    finally:
        shutil.rmtree(old)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id of the model to export")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=["merged", "lora", "delta"], default="merged")
    parser.add_argument(
        "--storage", choices=["as is", "float32", "bfloat16", "float16", "int8"], default="as is", help="see `store`"
    )
    parser.add_argument("--audio-base", help="for delta: folder or Hub id of the audio encoder, ID@REVISION to pin")
    parser.add_argument("--text-base", help="for delta: folder or Hub id of the LLM")
    parser.add_argument("--shard-mb", type=int, default=SHARD_BYTES // 10**6, help="largest file in MB")
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--code", action="store_true", help="only refresh the code files of FOLDER")
    parser.add_argument("--frozen-from", type=Path, help="earlier export whose frozen shards are kept byte for byte")
    arguments = parser.parse_args(argv)
    if arguments.code:
        copy_code(arguments.folder)
        return 0
    if arguments.model is None:
        parser.error("MODEL and FOLDER are needed")
    bases = (arguments.audio_base, arguments.text_base) if arguments.mode == "delta" else None
    if bases and None in bases:
        parser.error("--mode delta needs --audio-base and --text-base")
    try:
        export(
            VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model),
            arguments.folder,
            arguments.mode,
            arguments.storage,
            arguments.frozen_from,
            bases,
            arguments.force,
            arguments.shard_mb * 10**6,
        )
    except (OSError, ValueError, SafetensorError) as error:  # the last one for a full disk
        print(f"voxlm-export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
