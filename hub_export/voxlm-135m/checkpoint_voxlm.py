"""What a checkpoint must be before it is loaded: safetensors inside its folder, with finite weights of the right types."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


CONFIG_FILE, INDEX_ENDING, ADAPTER_FILE = "config.json", ".safetensors.index.json", "adapter_config.json"
# What the library reads beside config.json and tokenizer.json. It takes a broken generation config for none.
SIDE_FILES = ("generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
SIDE_FILES += ("special_tokens_map.json", "added_tokens.json")
TOKENIZER_FILE = "tokenizer.json"
# Fields of a feature extractor that divide, and those that count.
POSITIVE_FIELDS = ("hop_length", "n_fft", "sampling_rate", "feature_size", "chunk_length", "num_mel_bins")
# Files of weights in pickles, by their endings, and what torch's distributed checkpoints begin with.
PICKLED_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".distcp")
DISTRIBUTED_FILE = ".metadata"
HOW_TO_CONVERT = (
    "Only safetensors are loaded, since pickles can run code. Convert a checkpoint of the original VoxLM with "
    "voxlm-convert-legacy; load any other one where you trust it, and write it anew with `save_pretrained`"
)
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
# Tensors of tokens of the LLM.
TOKEN_TABLES = ("projector.token_ids", "reader.spelling")
# Parameters that a config may ask for beyond those that its checkpoint holds, as new LoRA or a new head does, however small the
# checkpoint is. Chosen by hand: half a gigabyte.
MOST_NEW_PARAMETERS = 2**27


def check_folder(folder: Path, config_needed: bool = True):
    """
    Check a local folder before anything of it is loaded.

    Args:
        config_needed (`bool`): false where the caller has a config.

    Raises:
        ValueError: naming what is missing, JSON that is damaged, weights that are pickles, and files outside the folder.
    """
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(
            f"{folder} holds a peft adapter ({ADAPTER_FILE}): load the model that it was trained on, then "
            f"`PeftModel.from_pretrained(model, folder)`"
        )
    if config_needed:
        read_object(folder / CONFIG_FILE)
    check_side_files(folder)
    files = [path for path in folder.iterdir() if not path.is_dir()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    for path in files:
        if path.name.endswith(INDEX_ENDING):
            weights += shards_of(path)
    if not weights or (folder / DISTRIBUTED_FILE).exists():
        pickled = sorted(path.name for path in files if path.suffix in PICKLED_WEIGHTS or path.name == DISTRIBUTED_FILE)
        found = f"its weights are pickles: {', '.join(pickled[:3])}" if pickled else "no model.safetensors and no index"
        raise ValueError(f"{folder} has no weights that can be loaded ({found}). {HOW_TO_CONVERT}")
    for path in weights:
        check_inside(path, folder)


def check_side_files(folder: Path):
    """
    Check what a folder has beside its config and weights.

    Raises:
        ValueError: naming a file that is no JSON object, and a field of a feature extractor that must be above 0.
    """
    for name in SIDE_FILES:
        if not (folder / name).is_file():
            continue
        content = read_object(folder / name)
        extractor = content.get("feature_extractor", content)
        for field in POSITIVE_FIELDS if isinstance(extractor, dict) and name.endswith("processor_config.json") else ():
            value = extractor.get(field)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ValueError(f"{folder / name}: {field} must be a number above 0, got {value!r}")
    if (folder / TOKENIZER_FILE).is_file():
        # Megabytes, which the library parses in any case: here only its two ends, which tell whether it was cut.
        with (folder / TOKENIZER_FILE).open("rb") as file:
            first = file.read(64).lstrip()[:1]
            file.seek(max(0, file.seek(0, 2) - 64))
            last = file.read().rstrip()[-1:]
        if (first, last) != (b"{", b"}"):
            raise ValueError(f"{folder / TOKENIZER_FILE} is not a JSON object (truncated?); copy or download it again")


def read_object(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: for a file that is missing or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}, so it is not a checkpoint")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON (truncated?): {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply to be read") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def shards_of(index: Path) -> list[Path]:
    """The files that an index of weights names, in the index's folder.

    Raises:
        ValueError: for a malformed index, and for files that are missing or no safetensors.
    """
    content = read_object(index)
    weight_map = content.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index} must map names of weights to files in its `weight_map`")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{index} has no `metadata`, which the library needs")
    shards = []
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if path.suffix != ".safetensors":
            raise ValueError(f"{index} names {name!r}. {HOW_TO_CONVERT}")
        check_inside(path, index.parent)
        if not path.is_file():
            raise ValueError(f"{index.parent} lacks {name}, which {index.name} names; copy or download it again")
        shards.append(path)
    return shards


def check_inside(path: Path, folder: Path):
    """Raise a `ValueError` for a file that is, or is a link to one, outside its checkpoint's folder."""
    homes = [folder.resolve()]
    # In the Hub's cache the files of a snapshot are links to its blobs.
    homes += [parent.parent / "blobs" for parent in folder.resolve().parents if parent.name == "snapshots"]
    target = path.resolve()
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is {target}, outside the checkpoint's folder; weights are loaded from inside it only")


@contextmanager
def opened(path: Path):
    """A safetensors file, opened.

    Raises:
        ValueError: naming a file that is truncated or of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file; copy or download it again ({error})") from error


def tensors_of(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors file, read when they are used; errors as in `opened`."""
    with opened(path) as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def check_weights(model, files: list[Path], quantized: bool, any_size: bool = False):
    """
    Check the weights of a checkpoint against the model that they are for, which may still be on the meta device. They are read
    one after another, so that a large checkpoint takes no memory.

    Args:
        files (`list[Path]`): safetensors.
        quantized (`bool`): whether the checkpoint stores weights as integers with a scale.
        any_size (`bool`): whether the caller ignores sizes that do not match.

    Raises:
        ValueError: naming a tensor of another shape or type than the model's, one that is not finite, a matrix of zeros,
            and tokens that the LLM does not have.
    """
    own = {_plain(name): tensor for name, tensor in model.state_dict().items()}
    names, held = set(), 0
    for path in files:
        with opened(path) as file:
            names.update(file.keys())
    for path in files:
        for name, tensor in tensors_of(path):
            wanted = own.get(_plain(name))
            if wanted is not None:
                packed = quantized and tensor.dtype in INTEGERS
                _check_type(path, name, tensor, wanted, packed and f"{name}_scale" in names, quantized)
                if tensor.shape != wanted.shape and not (any_size or packed):
                    raise ValueError(
                        f"{path}: {name} has the shape {tuple(tensor.shape)}, the config asks for {tuple(wanted.shape)}; use "
                        "the config.json and the weights of one and the same checkpoint"
                    )
            check_values(path, name, tensor, model.config.text_config.vocab_size)
            held += tensor.numel()
    there = {_plain(name) for name in [*names, *model.all_tied_weights_keys]}
    missing = {name: tensor.numel() for name, tensor in own.items() if name not in there}
    if sum(missing.values()) > held + MOST_NEW_PARAMETERS:
        largest = max(missing, key=missing.get)
        raise ValueError(
            f"The config asks for {sum(missing.values()):,} parameters that the checkpoint, with {held:,}, does not hold: "
            f"most of them in {largest}, of shape {tuple(own[largest].shape)}"
        )


def _plain(name: str) -> str:
    """The name of a weight without LoRA."""
    return name.replace(".base_layer.", ".")


def _check_type(path, name: str, tensor: torch.Tensor, wanted: torch.Tensor, in_8_bits: bool, quantized: bool):
    """Raise a `ValueError` for a tensor that is not of the model's kind, and not stored in 8 bits instead."""
    kinds = FLOATS if wanted.is_floating_point() else INTEGERS
    if not in_8_bits and tensor.dtype not in kinds and not (quantized and wanted.dtype == tensor.dtype):
        raise ValueError(f"{path}: {name} is {tensor.dtype}, where the model has {wanted.dtype}")


def check_values(source, name: str, tensor: torch.Tensor, vocab_size: int):
    """
    Raises:
        ValueError: for values that no weight can have. A sum finds them first, which costs less than a test of each value.
    """
    if tensor.dtype in FLOATS:
        total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
        # The sum of finite values may overflow.
        if not total.isfinite() and not tensor.isfinite().all():
            raise ValueError(
                f"{source}: {name} has values that are not finite; training must have failed, or the file is broken"
            )
        # New LoRA and a new reader are zero; so are biases, and a zero is nothing unusual among few numbers.
        zero_is_fine = ".lora_" in name or name == "reader.end" or tensor.dim() < 2
        if not zero_is_fine and tensor.numel() and total == 0 and not tensor.any():
            raise ValueError(f"{source}: {name} is all zeros, so the file is broken or was never written")
    elif tensor.dtype in INTEGERS and name in TOKEN_TABLES and tensor.numel():
        least, most = (int(edge) for edge in tensor.aminmax())
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{source}: {name} names tokens {least} to {most}, the LLM has {vocab_size}")
    elif tensor.dtype == torch.int8 and tensor.numel() and not tensor.flatten()[:4096].any() and not tensor.any():
        raise ValueError(f"{source}: {name} is all zeros, so the file is broken or was never written")
