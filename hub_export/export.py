"""
Write a model as a self-contained checkpoint folder with remote code.

    python -m hub_export.export MODEL FOLDER        write the folder
    python -m hub_export.export --code FOLDER       refresh only the code files in it

Frozen weights lie in shards of their own (`encoder`, `language-model-*`), what is trained in `trained.safetensors`, so that a
better checkpoint changes one small file (with `--frozen-from FOLDER`).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import voxlm_hf
from voxlm_hf import VoxLMForSpeechSeq2Seq


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


def split_shards(model: VoxLMForSpeechSeq2Seq, int8: bool) -> dict[str, dict[str, torch.Tensor]]:
    """
    The model's tensors by file name: encoder in float16, LLM in 8 bits or float16, what is trained in bfloat16.

    Norms and other vectors of the frozen parts stay in float32: they are small, and not all of them fit float16.
    """
    files: dict[str, dict[str, torch.Tensor]] = {"encoder.safetensors": {}, TRAINED_FILE: {}}
    tied = set(model.all_tied_weights_keys)
    shard, size = {}, 0
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        key, tensor = name.replace(".base_layer.", "."), tensor.detach().cpu()
        is_matrix = tensor.dim() > 1
        if not tensor.is_floating_point():
            files[TRAINED_FILE][key] = tensor
        elif name.startswith("encoder."):
            files["encoder.safetensors"][key] = tensor.half() if is_matrix else tensor.float()
        elif not name.startswith("language_model.") or ".lora_" in name:
            files[TRAINED_FILE][key] = tensor.bfloat16() if is_matrix else tensor.float()
        else:
            if is_matrix:
                stored = to_int8(key, tensor) if int8 else {key: tensor.half()}
            else:
                stored = {key: tensor.float()}
            added = sum(item.numel() * item.element_size() for item in stored.values())
            if shard and size + added > SHARD_BYTES:
                files[f"language-model-{len(files) - 1}.safetensors"] = shard
                shard, size = {}, 0
            shard.update(stored)
            size += added
    files[f"language-model-{len(files) - 1}.safetensors"] = shard
    return files


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


def write_weights(model: VoxLMForSpeechSeq2Seq, folder: Path, int8: bool, frozen_from: Path | None = None):
    """Write the shards and their index; the frozen ones as they are in an earlier export, where one is given."""
    weight_map, total = {}, 0
    files = split_shards(model, int8)
    if frozen_from is not None:
        files = {TRAINED_FILE: files[TRAINED_FILE], **read_frozen_shards(model, frozen_from)}
    for file, tensors in files.items():
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        if frozen_from is None or file == TRAINED_FILE:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        elif frozen_from.resolve() != folder.resolve():
            shutil.copyfile(frozen_from / file, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def export(model: VoxLMForSpeechSeq2Seq, folder: Path, int8: bool = True, frozen_from: Path | None = None):
    """
    Write `model` and its processor to `folder` so that Auto classes and `pipeline` load it without the package installed.

    Args:
        int8 (`bool`): store the LLM's matrices in 8 bits (restored to floating point when loaded) instead of 16.
        frozen_from (`Path`, *optional*): an earlier export (it may be `folder` itself) of a model with the same frozen
            weights in the same storage, whose shards of them are taken over byte for byte.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.get_processor().save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    write_weights(model, folder, int8, frozen_from)
    copy_code(folder)
    config = model.config.to_dict()
    config.update(
        architectures=[type(model).__name__], auto_map=AUTO_MAP, custom_pipelines=CUSTOM_PIPELINES, dtype="float32"
    )
    for part in ("audio_config", "text_config"):
        config[part]["dtype"] = "float32"
    config.pop("_name_or_path", None)
    if int8:
        config["quantization_config"] = INT8_WEIGHTS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in ("processor_config.json", "tokenizer_config.json"):
        path = folder / file
        content = json.loads(path.read_text())
        content["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder or Hub id of the model to export")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--code", action="store_true", help="only refresh the code files of FOLDER")
    parser.add_argument("--float16", action="store_true", help="store the LLM in 16 bits instead of 8")
    parser.add_argument("--frozen-from", type=Path, help="earlier export whose frozen shards are kept byte for byte")
    arguments = parser.parse_args()
    if arguments.code:
        copy_code(arguments.folder)
    else:
        model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
        export(model, arguments.folder, not arguments.float16, arguments.frozen_from)


if __name__ == "__main__":
    main()
