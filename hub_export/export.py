"""
Write a model as a checkpoint folder that loads with transformers alone: `voxlm-export MODEL FOLDER [--mode ...]`.

    merged (default)    LoRA merged into the LLM; self-contained, loads without peft
    lora                self-contained, LoRA can be trained further
    delta               only the trained weights, with references to the base models (`--audio-base`, `--text-base`)

Frozen weights have shards of their own (`encoder-*`, `decoder-*`, `language-model-*`), trained weights are in
`trained.safetensors`. With `--frozen-from FOLDER`, a better checkpoint changes that one small file. `--code FOLDER`
only updates the code files in FOLDER.
"""

import argparse
import copy
import json
import shutil
import sys
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import voxlm_hf
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.app.files import move_into_place, tidy, unfinished_folder
from voxlm_hf.loading_voxlm import AUTO_MAP, CUSTOM_PIPELINES, base_reference, base_state


PACKAGE = Path(voxlm_hf.__file__).parent
# The flat modules of the package are the remote code; `__init__` only registers them where the package is installed.
CODE_FILES = sorted(path.name for path in PACKAGE.glob("*_voxlm.py"))
# Chosen by hand, not tuned: the shipped checkpoint is in a Git repository, and GitHub refuses files above 100 MB.
SHARD_BYTES = 90_000_000
# How far a frozen weight may be from the model's when shards are reused: float32 rounding of scale times integer.
# Chosen by hand, not tuned.
FROZEN_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}
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
    """Copy the package's flat modules to a checkpoint folder, and delete those that the package no longer has."""
    for path in folder.glob("*_voxlm.py"):
        if path.name not in CODE_FILES:
            path.unlink()
    for name in CODE_FILES:
        shutil.copyfile(PACKAGE / name, folder / name)


def refresh_code(folder: Path):
    """`copy_code` into a checkpoint that exists.

    Raises:
        ValueError: for a folder that is no VoxLM checkpoint.
    """
    config = folder / "config.json"
    if not config.is_file() or json.loads(config.read_text()).get("model_type") != "voxlm":
        raise ValueError(f"{folder} is no VoxLM checkpoint: it has no config.json whose model_type is 'voxlm'")
    copy_code(folder)


def to_int8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    A matrix as 8-bit integers with one scale per row, in the format of compressed-tensors.

    Args:
        weight (`torch.Tensor` of shape `(rows, columns)`)
    """
    scheme = QuantizationScheme.model_validate(INT8_WEIGHTS["config_groups"]["weights"])
    weight = weight.float()
    scale, _ = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
    compressor = BaseCompressor.get_value_from_registry(INT8_WEIGHTS["format"])
    packed = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    return {name.removesuffix("weight") + key: tensor for key, tensor in packed.items()}


def merged_state(model: VoxLMForSpeechSeq2Seq) -> tuple[dict[str, torch.Tensor], object]:
    """
    State and config of the same model with LoRA merged into the weights it adapts; `model` itself does not change.

    Raises:
        ValueError: when merged weights are not finite.
    """
    config, state = copy.deepcopy(model.config), model.state_dict()
    config.lora_config = None
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer = copy.deepcopy(module)  # one layer at a time: a copy of the whole model may not fit into memory
            layer.merge(safe_merge=True)
            for part, tensor in layer.get_base_layer().state_dict().items():
                state[f"{name}.base_layer.{part}"] = tensor
    return {name: tensor for name, tensor in state.items() if ".lora_" not in name}, config


def delta_state(model: VoxLMForSpeechSeq2Seq, config) -> dict[str, torch.Tensor]:
    """
    The weights that the base models of `config.base_models` lack: trained weights, and the embeddings of added tokens.

    Raises:
        ValueError: naming a frozen weight that differs from the base's.
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
    One tensor in the form in which it is stored.

    Args:
        storage: "as is", a dtype's name, or "int8": the matrices of LLM and decoder in 8 bits, the encoder in float16,
            trained weights in bfloat16. With "int8", norms and other vectors stay in float32: they are small, and not
            all of them fit float16.
    """
    if not tensor.is_floating_point() or storage == "as is":
        return {name: tensor}
    if storage != "int8":
        return {name: tensor.to(getattr(torch, storage))}
    if tensor.dim() < 2:
        return {name: tensor.float()}
    # Loading restores the matrices of Linear and Embedding modules; learned positions are in neither.
    if part_of(name) in ("language-model", "decoder") and "embed_positions" not in name:
        return to_int8(name, tensor)
    return {name: tensor.bfloat16() if part_of(name) == "trained" else tensor.half()}


def part_of(name: str) -> str:
    """The file that a tensor goes to, or the start of the file's name."""
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
    The tensors of the frozen shards of an earlier export, by file name, after a check that they are the model's own
    weights.

    Weights that were rounded to 8 bits once would round to other bytes, and add a new 90 MB file to the repository.

    Raises:
        ValueError: naming a weight that differs from the model's or that the model lacks.
    """
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in model.state_dict().items()}
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors")) if path.name != TRAINED_FILE}
    for file, tensors in files.items():
        for name, tensor in tensors.items():
            if name.endswith("weight_scale"):
                continue
            stored = tensor.float() * tensors[name + "_scale"] if tensor.dtype == torch.int8 else tensor.float()
            if name not in state or not torch.allclose(stored, state[name].float(), **FROZEN_TOLERANCE):
                raise ValueError(f"{folder / file} does not hold this model's frozen weights: {name} differs")
    return files


def write_weights(files: dict[str, dict[str, torch.Tensor]], folder: Path, frozen_from: Path | None = None):
    """Write shards and their index; frozen shards that are in `frozen_from` are copied from there."""
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
    """Write config.json with the auto classes, the pipeline and, for "int8", how to restore the weights."""
    fields = config.to_dict()
    fields.update(
        architectures=["VoxLMForSpeechSeq2Seq"], auto_map=AUTO_MAP, custom_pipelines=CUSTOM_PIPELINES, dtype=dtype
    )
    for part in ("audio_config", "text_config"):
        fields[part]["dtype"] = dtype
    for name in ("_name_or_path", "quantization_config"):
        fields.pop(name, None)
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
    Write `model` and its processor to `folder` so that Auto classes and `pipeline` load it where the package is not
    installed.

    The files are written next to `folder` and change places with it once they are complete: an error or a kill leaves the
    previous content. The next export to `folder` deletes what a killed one left.

    Args:
        mode (`"merged"`, `"lora"` or `"delta"`): see the module.
        storage: see `store`.
        frozen_from (`Path`, *optional*): an earlier export (it may be `folder` itself) of a model with the same frozen
            weights in the same storage; its frozen shards are reused byte for byte.
        bases (`tuple[str, str]`, *optional*): for "delta", folder or Hub id (`ID@REVISION` for a revision other than
            the main branch) of audio encoder and LLM.
        force (`bool`): replace `folder` if it exists (its README.md is kept).
        shard_bytes (`int`): size of the largest file.

    Raises:
        FileExistsError: when `folder` exists and `force` is not given.
        ValueError: for options that do not go together, or bases that are not the model's.
    """
    folder = Path(folder).resolve()  # what a link stands for is replaced, not the link
    tidy(folder)
    check_options(folder, mode, storage, frozen_from, bases, force)
    state, config = state_for(model, mode, bases)
    files = split_shards(state, set(model.all_tied_weights_keys), storage, shard_bytes)
    if frozen_from is not None:
        files.update(read_frozen_shards(model, frozen_from))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished_folder(folder) as unfinished:
        model.get_processor().save_pretrained(unfinished)
        model.generation_config.save_pretrained(unfinished)
        write_weights(files, unfinished, frozen_from)
        copy_code(unfinished)
        write_config(config, unfinished, storage, loading_dtype(state, storage))
        if (folder / "README.md").exists():
            shutil.copyfile(folder / "README.md", unfinished / "README.md")
        move_into_place(unfinished, folder)


def check_options(folder: Path, mode: str, storage: str, frozen_from: Path | None, bases: tuple | None, force: bool):
    """
    Raises:
        FileExistsError, ValueError: see `export`.
    """
    if folder.exists() and any(folder.iterdir()) and not force:
        raise FileExistsError(f"{folder} exists and is not empty; give --force to replace it")
    if mode not in ("merged", "lora", "delta") or (mode == "delta") != (bases is not None):
        raise ValueError(
            f"The mode is merged, lora or delta, and delta alone needs the base models; got {mode!r}, {bases}"
        )
    if mode == "delta" and (storage == "int8" or frozen_from):
        raise ValueError("A delta holds no frozen weights: they cannot be stored in 8 bits, nor taken from elsewhere")


def state_for(model: VoxLMForSpeechSeq2Seq, mode: str, bases: tuple[str, str] | None) -> tuple[dict, object]:
    """The weights to write in a mode of `export`, and the config that goes with them."""
    if mode == "merged" and model.config.lora_config is not None:
        return merged_state(model)
    config = copy.deepcopy(model.config)
    if mode != "delta":
        return model.state_dict(), config
    config.base_models = {part: base_reference(base) for part, base in zip(("audio", "text"), bases)}
    return delta_state(model, config), config


def loading_dtype(state: dict[str, torch.Tensor], storage: str) -> str:
    """
    The dtype that a checkpoint loads with by default: that of all its weights, or float32 where they are mixed or in 8
    bits.
    """
    if storage not in ("as is", "int8"):
        return storage
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    return str(dtypes.pop()).removeprefix("torch.") if storage == "as is" and len(dtypes) == 1 else "float32"


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
    parser.add_argument("--shard-mb", type=int, default=SHARD_BYTES // 10**6, help="size of the largest file in MB")
    parser.add_argument("--force", action="store_true", help="replace FOLDER if it exists")
    parser.add_argument("--code", action="store_true", help="only update the code files in FOLDER")
    parser.add_argument("--frozen-from", type=Path, help="earlier export whose frozen shards are reused byte for byte")
    arguments = parser.parse_args(argv)
    if arguments.model is None and not arguments.code:
        parser.error("MODEL and FOLDER are needed")
    bases = (arguments.audio_base, arguments.text_base) if arguments.mode == "delta" else None
    if bases and None in bases:
        parser.error("--mode delta needs --audio-base and --text-base")
    try:
        if arguments.code:
            refresh_code(arguments.folder)
            return 0
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
    except (OSError, ValueError, SafetensorError) as error:  # SafetensorError: the disk is full
        print(f"voxlm-export: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
