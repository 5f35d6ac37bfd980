"""References to base models, for checkpoints that hold only what was trained."""

import hashlib
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM


# The only files of a base that are read: no code, no pickles.
BASE_FILES = ["*.safetensors", "*.json"]


def base_folder(name: str, revision: str | None, **hub_options) -> Path:
    """
    The local folder of a base model, downloaded when it is a Hub id.

    Raises:
        ValueError: when it is not to be had, saying so.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=BASE_FILES, **hub_options))
    except Exception as error:  # whatever the Hub's client raises: the checkpoint is no use without its base
        raise ValueError(
            f"This checkpoint needs the base model {name} at revision {revision}, which cannot be had: {error}"
        ) from error


def weights_digest(folder: Path) -> str:
    """SHA-256 of all safetensors files of a folder, in the order of their names."""
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
    `{"name", "revision", "sha256"}` of a base model given as a folder or as a Hub id, `ID@REVISION` for another revision than
    its main branch. The revision is pinned to the commit it is at now.
    """
    name, _, revision = base.partition("@") if not Path(base).is_dir() else (base, "", "")
    folder = base_folder(name, revision or None)
    # Snapshots of the Hub's cache are named by their commit.
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
            model = AutoModel.from_pretrained(folder, dtype=torch.float32)
            if config.reader_config is not None:
                decoder = model.get_decoder().state_dict()
                state.update({f"reader.decoder.{name}": tensor for name, tensor in decoder.items()})
            model = model.get_encoder() if model.config.is_encoder_decoder else model
            prefix = "encoder."
        else:
            model, prefix = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "language_model."
        state.update({prefix + name: tensor for name, tensor in model.state_dict().items()})
    return state


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files of a folder."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


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
