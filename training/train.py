"""Train LoRA and the alignment head on cached encoder states with transformers' Trainer."""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from training.features import FeatureCache
from training.text import normalise
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.alignment_voxlm import alignment_loss


class CachedFeaturesTrainer(Trainer):
    """
    [`Trainer`] on rows of a [`FeatureCache`]: states are disturbed, projected, gated and given to the model as `audio_embeds`.

    Frames that the projector's gate rejects are left out here instead of masked, which is the same to the model and a
    third of the work.

    Args:
        processor: of the model.
        noise (`float`): largest standard deviation of the noise on the encoder states (each row draws its own), so that the
            LLM sees the projector err as it does on recordings it was not trained on.
    """

    def __init__(self, *args, processor, noise: float = 1.2, **kwargs):
        super().__init__(*args, **kwargs)
        self.processor, self.noise = processor, noise
        self.logged: dict[str, list[float]] = {}

    def _get_train_sampler(self, train_dataset=None):
        lengths = [row["frames"] for cache in self.train_dataset.datasets for row in cache.rows]
        return LengthGroupedSampler(self.args.train_batch_size, lengths=lengths)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        states, mask = inputs["states"], inputs["mask"]
        if model.training:
            strength = self.noise * torch.rand(len(states), 1, 1)
            states = states + strength * torch.randn_like(states)
        audio_embeds, audio_mask, speech_logits = model.project(states, mask)
        keep = audio_mask.bool()
        if speech_logits is not None:
            keep &= model.projector.keep(speech_logits)
        token = self.processor.audio_token
        prompt = self.processor.render_prompt()
        prompts = [prompt.replace(token, token * int(count)) for count in keep.sum(1)]
        batch = self.processor.training_ids(prompts, inputs["texts"])
        num_text = int((batch["labels"] != -100).sum(1).max())
        kept = [row[flags] for row, flags in zip(audio_embeds, keep)]
        outputs = model(
            **batch,
            audio_embeds=pad_sequence(kept, batch_first=True),
            audio_embeds_mask=pad_sequence([torch.ones(len(row), dtype=torch.long) for row in kept], batch_first=True),
            logits_to_keep=num_text + 1,
            output_hidden_states=True,
            use_cache=False,
        )
        loss = outputs.loss
        self.logged.setdefault("lm_loss", []).append(float(loss.detach()))
        if "frame_words" in inputs:
            text_ids = batch["input_ids"][:, -num_text:]
            is_text = batch["labels"][:, -num_text:] != -100
            token_words = torch.full_like(text_ids, -100)
            for row, flags in enumerate(is_text):
                first = int(flags.int().argmax())
                for number, word in enumerate(self.processor.split_words(text_ids[row, first:].tolist())):
                    token_words[row, [first + position for position in word.tokens]] = number
            text_states = outputs.hidden_states[-1][:, -num_text - 1 : -1].detach()
            scores = model.alignment(text_states, model.get_input_embeddings()(text_ids), states, mask)
            times = alignment_loss(*scores, token_words, inputs["frame_words"])
            self.logged.setdefault("alignment_loss", []).append(float(times.detach()))
            loss = loss + times
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, *args, **kwargs):
        logs.update({name: round(sum(values) / len(values), 4) for name, values in self.logged.items() if values})
        self.logged = {}
        super().log(logs, *args, **kwargs)


def frame_words(row: dict, frame_s: float) -> torch.Tensor:
    """
    For each encoder frame the number of the word spoken in it, -1 in a pause; -100 everywhere without word times.

    Word times whose words differ from the transcript are not used: positions would be guesses.
    """
    target = torch.full((row["frames"],), -100)
    words = [(text, word) for word in row.get("words") or [] for text in normalise(word["word"]).split()]
    if not words or [text for text, _ in words] != row["text"].split():
        return target
    target[:] = -1
    for number, (_, word) in enumerate(words):
        target[round(word["start"] / frame_s) : round(word["end"] / frame_s)] = number
    return target


def collate(rows: list[dict], frame_s: float) -> dict:
    """Rows of a [`FeatureCache`] to padded states, their mask, texts and frame targets."""
    return {
        "states": pad_sequence([row["states"] for row in rows], batch_first=True),
        "mask": pad_sequence([torch.ones(row["frames"], dtype=torch.long) for row in rows], batch_first=True),
        "frame_words": pad_sequence([frame_words(row, frame_s) for row in rows], batch_first=True, padding_value=-100),
        "texts": [row["text"] for row in rows],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint to start from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--caches", type=Path, nargs="+", required=True, help="feature caches, without suffix")
    parser.add_argument("--max-steps", type=int, default=700)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=6e-4)
    parser.add_argument("--train-projector", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    model = VoxLMForSpeechSeq2Seq.from_pretrained(arguments.model)
    processor = model.get_processor()
    model.projector.requires_grad_(arguments.train_projector)
    encoder, model.encoder = model.encoder, torch.nn.Identity()  # the states are cached
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"trained: {trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    dataset = ConcatDataset([FeatureCache(cache, model.config.audio_hidden_size) for cache in arguments.caches])
    trainer = CachedFeaturesTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(arguments.output / "runs"),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.max_steps // 20,
            weight_decay=0.0,
            logging_steps=20,
            save_strategy="no",
            remove_unused_columns=False,
            bf16=arguments.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=arguments.seed,
            report_to=[],
        ),
        train_dataset=dataset,
        data_collator=lambda rows: collate(rows, processor.frame_s),
        processor=processor,
    )
    trainer.train()
    model.encoder = encoder
    model.save_pretrained(arguments.output)
    processor.save_pretrained(arguments.output)
    (arguments.output / "log.json").write_text(json.dumps(trainer.state.log_history, indent=1))


if __name__ == "__main__":
    main()
