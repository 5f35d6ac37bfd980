"""The stages that made the shipped checkpoint, at toy size."""

import json

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import ConcatDataset
from transformers import TrainingArguments

from tests import tiny
from training.augment import augment
from training.evaluate import word_errors
from training.features import FeatureCache, write_cache
from training.text import normalise, strip_punctuation
from training.train import CachedFeaturesTrainer, collate, frame_words
from training.warm_start import ctc_loss


@pytest.fixture(scope="module")
def model():
    return tiny.model(
        projector_readout="token_mixture", frame_gate_threshold=0.5, projector_kind="convnext", lora_config={"r": 2}
    )


@pytest.fixture
def cache(model, tmp_path):
    rows = []
    for number, seconds in enumerate((1.0, 0.5, 0.8)):
        soundfile.write(tmp_path / f"{number}.wav", tiny.noise(seconds, number), 16000)
        words = [{"word": "The", "start": 0.1, "end": 0.2}, {"word": "fox.", "start": 0.24, "end": 0.4}]
        rows.append({"audio": f"{number}.wav", "text": "The fox.", "words": words})
    (tmp_path / "broken.wav").write_text("no audio")
    rows.insert(1, {"audio": "broken.wav", "text": "never"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_cache(model, tmp_path / "manifest.jsonl", tmp_path / "cache", seed=None)
    return FeatureCache(tmp_path / "cache", model.config.audio_hidden_size)


def test_the_cache_holds_what_the_encoder_gives(model, cache):
    assert [row["audio"] for row in cache.rows] == ["0.wav", "1.wav", "2.wav"], "the broken file is left out"
    inputs = model.processor.apply_transcription_request(tiny.noise(0.5, 1))
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    torch.testing.assert_close(cache[1]["states"], audio.last_hidden_state[0], atol=2e-3, rtol=2e-3)
    assert cache[1]["text"] == "the fox"


def test_frame_targets_follow_the_word_times(cache):
    target = frame_words(cache[0], 0.02)
    expected = [-1] * 5 + [0] * 5 + [-1] * 2 + [1] * 8 + [-1] * 30
    assert target.tolist() == expected
    assert set(frame_words({**cache[0], "text": "another text"}, 0.02).tolist()) == {-100}


def test_training_moves_what_should_move(model, cache, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.projector.gate.bias.fill_(5.0)
    trainer = CachedFeaturesTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path / "runs"),
            max_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        ),
        train_dataset=ConcatDataset([cache]),
        data_collator=lambda rows: collate(rows, model.processor.frame_s),
        processor=model.processor,
    )
    trainer.train()
    logs = trainer.state.log_history
    assert all(np.isfinite(log["lm_loss"]) and np.isfinite(log["alignment_loss"]) for log in logs if "lm_loss" in log)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".lora_B." in name for name in moved) and any(name.startswith("alignment.") for name in moved)
    assert not any(".base_layer." in name or name.startswith("encoder.") for name in moved)


def test_ctc_loss_against_the_library_on_the_same_distribution():
    """Blank 0 and three tokens: the factorised form must equal plain CTC on the products of its factors."""
    torch.manual_seed(0)
    embeds, tokens, speech = torch.randn(2, 6, 4), torch.randn(3, 4), torch.randn(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    probabilities = torch.cat(
        [1 - speech.sigmoid().unsqueeze(-1), speech.sigmoid().unsqueeze(-1) * (embeds @ tokens.T * 2).softmax(-1)],
        dim=-1,
    )
    expected = torch.nn.functional.ctc_loss(
        probabilities.log().transpose(0, 1),
        torch.tensor([1, 2, 3, 3]),
        torch.tensor([6, 4]),
        torch.tensor([2, 2]),
        reduction="sum",
    )
    loss = ctc_loss(embeds, mask, speech, tokens, torch.tensor(2.0), [[0, 1], [2, 2]])
    assert float(loss) == pytest.approx(float(expected) / 8, rel=1e-5)


def test_augmentation_is_reproducible_and_says_how_far_it_shifts():
    clip = np.zeros(16000, np.float32)
    clip[8000] = 1.0
    leads = []
    for seed in range(20):
        waveform, lead_s = augment(clip, np.random.default_rng(seed))
        again, _ = augment(clip, np.random.default_rng(seed))
        assert np.array_equal(waveform, again) and np.abs(waveform).max() <= 1
        assert abs(int(np.abs(waveform).argmax()) - 8000 - round(lead_s * 16000)) <= 1
        leads.append(lead_s)
    assert min(leads) == 0 and max(leads) > 0.1


def test_normalisation():
    assert normalise("Mr. Brown’s well-known “hat”—lost!") == "mister brown's well known hat lost"
    assert normalise("'Tis Dr. O'Neill's") == "tis doctor o'neill's"
    assert strip_punctuation("Hello, World! It's 5.") == "hello world it's 5"


def test_word_errors_are_pooled():
    result = word_errors(["a b c", "d"], ["a x c", ""])
    assert (result.substitutions, result.deletions, result.insertions) == (1, 1, 0)
    assert result.wer == pytest.approx(2 / 4)
