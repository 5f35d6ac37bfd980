"""The stages of a recipe: what makes the trainer of each kind, running one, and what it leaves behind."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset
from transformers import AutoTokenizer, TrainingArguments, set_seed

from voxlm_hf.app.files import UNFINISHED, write_atomically

from . import confidence, reader, reader_tuning, rescoring, warm_start
from .alignment import AlignmentTrainer
from .checkpoints import check_shapes, written_whole
from .data import SpeechDataset, error_line
from .recipe import RecipeError
from .streaming import SpeechStream
from .trainer import StageTrainer, VoxLMTrainer, trained_share


# Rows of the dev set that a warm start reports its error rate on, so that an evaluation is quick. Chosen by hand,
# not tuned.
WARM_START_DEV_ROWS = 100
# Parts of the model that a stage can train, and what tells their parameters' names from all others.
PARTS = {"projector": "projector.", "alignment": "alignment.", "lora": ".lora_"}
# Kinds of alignment heads that can be trained.
HEADS = ("spelling", "frames")
# Options of `VoxLMTrainer` that a stage may set; all others are for `TrainingArguments`.
TRAINER_OPTIONS = ("seconds_per_batch", "state_noise", "max_new_tokens")


def trained_state(model, kind: str) -> dict[str, torch.Tensor]:
    """
    Every weight that a stage of some kind may change: of "reader_tuning" the reader's without the decoder's embeddings, of
    all others projector, alignment head, LoRA, and the reader's without its decoder.
    """
    tunes = kind == "reader_tuning"
    parts = ("reader.",) if tunes else ("projector.", "alignment.", "reader.")
    frozen = ("reader.decoder.embed_",) if tunes else ("reader.decoder.",)
    return {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.startswith(parts) and not name.startswith(frozen) or ".lora_" in name and not tunes
    }


def warm_start_trainer(
    model, train, dev, folder: Path, seed: int, merges=800, noise=1.0, frames_per_batch=8000, **options
):
    """
    The trainer of a stage of kind "warm_start".

    Args:
        merges, noise, frames_per_batch: of [`WarmStartTrainer`]; the defaults were chosen by hand, not tuned.
        options: of [`TrainingArguments`].
    """
    arguments = training_arguments(folder, seed, bool(dev), **{**warm_start.ARGUMENTS, **options})
    return warm_start.WarmStartTrainer(
        voxlm=model.to(arguments.device),
        args=arguments,
        merges=merges,
        noise=noise,
        frames_per_batch=frames_per_batch,
        train_dataset=train,
        eval_dataset=Subset(dev, range(min(WARM_START_DEV_ROWS, len(dev)))) if dev else None,
    )


def reader_trainer(model, train, dev, folder: Path, seed: int, recordings=300, frames_per_batch=6000, **options):
    """
    The trainer of a stage of kind "reader".

    Args:
        recordings (`int`): how many recordings to draw from those that leave room in the window for the end that the
            reader learns.
        frames_per_batch: of [`ReaderTrainer`]; the default was chosen by hand, not tuned.
        options: of [`TrainingArguments`].
    """
    options = {**reader.ARGUMENTS, **options}
    decay = {"lr_end": reader.FINAL_SHARE * options["learning_rate"], "power": 1.0}
    schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": decay}
    arguments = training_arguments(folder, seed, False, **{**schedule, **options})
    longest_s = model.config.audio_window_s - model.processor.frame_s * len(model.reader.end)
    rows = train.draw(recordings, seed, longest_s)
    examples = reader.make_examples(model.to(arguments.device), rows, folder / "examples")
    return reader.ReaderTrainer(
        reader=model.reader,
        fresh=model.config.reader_config["in_window"],
        args=arguments,
        frames_per_batch=frames_per_batch,
        train_dataset=examples,
    )


def reader_tuning_trainer(
    model, train, dev, folder: Path, seed: int, base: str, noise=0.5, keep=0.0, frames_per_batch=6000, **options
):
    """
    The trainer of a stage of kind "reader_tuning".

    Args:
        base (`str`): Hub id or folder of the audio model, whose tokenizer is needed.
        noise, keep, frames_per_batch: of [`ReaderTuner`]; the defaults were chosen by hand, not tuned.
        options: of [`TrainingArguments`].
    """
    arguments = training_arguments(folder, seed, False, **{**reader_tuning.ARGUMENTS, **options})
    return reader_tuning.ReaderTuner(
        voxlm=model.to(arguments.device),
        tokenizer=AutoTokenizer.from_pretrained(base),
        args=arguments,
        noise=noise,
        keep=keep,
        frames_per_batch=frames_per_batch,
        train_dataset=train,
    )


def transcription_trainer(model, train, dev, folder: Path, seed: int, parts: list[str], **options):
    """
    The trainer of a stage of kind "transcription".

    Args:
        parts: of the `PARTS`, those to train; options: `TRAINER_OPTIONS` of [`VoxLMTrainer`] and, all others, of
            [`TrainingArguments`].

    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    check_parts(parts, train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(PARTS[part] in name for part in parts))
    own = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    return VoxLMTrainer(
        model=model,
        args=training_arguments(folder, seed, bool(dev), **options),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=model.processor.collate,
        processor=model.processor,
        **own,
    )


def alignment_trainer(model, train, dev, folder: Path, seed: int, parts: list[str], misheard: float = 0.0, **options):
    """
    The trainer of a stage of kind "alignment": of the head alone where it reads the spelling, else that of
    `transcription_trainer`; arguments and errors as there.

    Args:
        misheard (`float`): for a head that reads the spelling, as `data.misheard`, but for this stage alone.
    """
    if not model.alignment.from_spelling or set(parts) != {"alignment"}:
        if misheard:
            raise ValueError("`misheard` is for a head that reads the spelling; here `data.misheard` does the same")
        return transcription_trainer(model, train, dev, folder, seed, parts, **options)
    check_parts(parts, train)
    if train.rows is not None:  # what a stream holds is not known beforehand
        train = train.timed(misheard or train.misheard)
    elif misheard:
        raise ValueError("`misheard` is for data in memory; for streamed data `data.misheard` does the same")
    own = {name: options.pop(name) for name in TRAINER_OPTIONS if name in options}
    own.pop("max_new_tokens", None)  # no text is generated
    arguments = training_arguments(folder, seed, bool(dev), **options)
    return AlignmentTrainer(
        voxlm=model.to(arguments.device), args=arguments, train_dataset=train, eval_dataset=dev, **own
    )


def check_parts(parts: list[str], train: SpeechDataset | SpeechStream):
    """
    Raises:
        ValueError: for parts that do not exist, or that the data cannot train.
    """
    unknown = set(parts) - set(PARTS)
    if unknown:
        raise ValueError(f"Unknown parts {sorted(unknown)}; known are {sorted(PARTS)}")
    # What a stream holds is not known beforehand.
    if "alignment" in parts and train.rows is not None and not any(row.words for row in train.rows):
        raise ValueError(
            "This stage trains the alignment head, but no recording has word times; add them with "
            "python -m voxlm_training.label_words"
        )
    if train.misheard and set(parts) != {"alignment"}:
        raise ValueError(
            f"`data.misheard` puts wrong words into the texts, which only the alignment head may learn from; got parts "
            f"{parts}"
        )


def training_arguments(folder: Path, seed: int, evaluates: bool, **options) -> TrainingArguments:
    """[`TrainingArguments`] with the defaults of our recipes, chosen by hand and not tuned; `options` override them."""
    has_accelerator = torch.accelerator.is_available()
    defaults = {
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.0,
        "logging_steps": 20,
        "save_steps": 200,
        "save_total_limit": 2,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": 200,
        "per_device_eval_batch_size": 8,
        "dataloader_pin_memory": has_accelerator,
        "report_to": ["tensorboard"],
        "use_cpu": not has_accelerator,
        # Every parameter that a stage trains has a gradient in every step.
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(output_dir=str(folder), remove_unused_columns=False, seed=seed, **{**defaults, **options})


# What makes the trainer of each kind of stage; those of `WITHOUT_TRAINER` have none.
STAGES: dict[str, Callable[..., StageTrainer | None]] = {
    "warm_start": warm_start_trainer,
    "transcription": transcription_trainer,
    "alignment": alignment_trainer,
    "reader": reader_trainer,
    "reader_tuning": reader_tuning_trainer,
    "rescoring": rescoring.tune_stage,
    "calibration": confidence.calibrate_stage,
}
# Kinds of stages that train nothing.
WITHOUT_TRAINER = ("rescoring", "calibration")


def run_stage(model, train, dev, folder: Path, seed: int, kind: str, **options):
    """
    Run one stage and save what it trained in `folder`; if it is there from an earlier run, load it instead.

    Args:
        kind (`str`): a key of `STAGES`; options: of that kind; for "reader" and "reader_tuning" also the "settings" of
            `add_reader`, and for "alignment" the "head" to train, a `VoxLMConfig.alignment_kind`. Stages of
            `WITHOUT_TRAINER` train nothing and return at once what they found.

    Raises:
        RecipeError: when the stage cannot begin or go on.
    """
    number, processes, result = folder.name.partition("-")[0], PartialState(), folder / "trained.safetensors"
    if "steps" in options:
        options["max_steps"] = options.pop("steps")
    try:
        if kind in WITHOUT_TRAINER:
            return STAGES[kind](model, dev, folder, seed, **options)
        if kind in ("reader", "reader_tuning"):
            base, settings = options["base"], options.pop("settings", {})
            if kind == "reader":
                del options["base"]
            if model.reader is None:
                model.add_reader(base, **settings)
        if kind == "alignment" and "head" in options:
            set_seed(seed)  # the new head is the same whether the stages before it ran or were finished
            model.set_alignment_head(options.pop("head"))
        finished = load_trained(model, result, kind)
        processes.wait_for_everyone()  # nobody may see a result that this run is about to write
        if processes.is_main_process:
            print(f"stage {number}, {kind}" + (": finished before" if finished else ""))
        parts = {"warm_start": {"projector"}, "reader": {"reader"}, "reader_tuning": {"reader"}}.get(kind) or set(
            options.get("parts", [])
        )
        if finished:
            mark_trained(model, parts)
            return
        folder.mkdir(parents=True, exist_ok=True)
        if processes.is_main_process:
            for path in folder.glob(f".*{UNFINISHED}"):
                path.unlink()  # of a run that was killed while it wrote
        set_seed(seed)
        trainer = STAGES[kind](model.eval(), train, dev, folder, seed, **options)
    except (ValueError, TypeError, OSError) as error:
        raise RecipeError(f"stage {number}, {kind}: {error_line(error)}") from error
    if processes.is_main_process:
        state = trainer.accelerator.state
        print(trained_share(trainer.model), f"{state.num_processes} process(es), {state.distributed_type}", sep="\n")
    try:
        trainer.resume()
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: memory or a disk that is full
        raise RecipeError(f"stage {number}, {kind}: {error_line(error)}") from error
    mark_trained(model, parts)
    skipped = sum(gather_object([train.skipped.take()]))
    if processes.is_main_process:
        if skipped:
            print(
                f"stage {number}, {kind}: left out {skipped} times a recording that could not be read; see the lines above"
            )
        write_atomically(folder / "log.json", json.dumps(trainer.state.log_history, indent=1).encode())
        with written_whole(result) as unfinished:
            merges = {"projector_merges": json.dumps(model.config.projector_merges)}
            save_file(trained_state(model, kind), unfinished, metadata=merges)
    model.eval()
    processes.wait_for_everyone()


def mark_trained(model, parts: set[str]):
    """Note in a model's config which parts that composing made anew, or the reader's end frames, have been trained."""
    for part in parts & {"projector", "alignment"}:
        setattr(model.config, f"{part}_trained", True)
    if "reader" in parts:
        model.config.reader_config["in_window"] = False


def load_trained(model, path: Path, kind: str) -> bool:
    """
    Load what `trained_state` saved after a stage of some kind, with the projector's vocabulary of then. Whether it is there
    and whole; a line says when it is damaged.

    Raises:
        ValueError: where the model trains other weights, as after a change of the recipe.
    """
    if not path.exists():
        return False
    try:
        state = load_file(path)
        with safe_open(path, "pt") as file:
            merges = json.loads((file.metadata() or {}).get("projector_merges", "null"))
    except SafetensorError as error:
        print(f"{path} is damaged, the stage runs again: {error_line(error)}")
        return False
    if "projector.token_ids" in state and model.config.projector_readout == "token_mixture":
        model.set_projector_vocabulary(state["projector.token_ids"].tolist(), merges)
    shapes = (
        {name: tuple(tensor.shape) for name, tensor in weights.items()}
        for weights in (state, trained_state(model, kind))
    )
    check_shapes(path, *shapes)
    model.load_state_dict(state, strict=False)
    return True
