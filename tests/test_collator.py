"""Training batches: what the model's `forward` takes, and the word times that the alignment head learns from."""

import functools
import math

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from tests import tiny
from voxlm_hf.collator_voxlm import word_targets


@pytest.fixture(scope="module")
def processor():
    return tiny.model().processor


def word(text, start, end):
    return {"word": text, "start": start, "end": end}


def row(text="the fox", seconds=1.0, **fields):
    return {"audio": tiny.noise(seconds), "text": text, **fields}


# Batches


def test_a_batch_is_what_apply_transcription_request_makes(processor):
    rows = [row("the fox", 1.0), row("over the lazy dog", 0.6)]
    batch = processor.collate(rows)
    expected = processor.apply_transcription_request(
        [item["audio"] for item in rows], text=[item["text"] for item in rows]
    )
    assert set(batch) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_rows_may_hold_encoder_states(processor):
    states = [torch.randn(50, 16), torch.randn(23, 16)]
    batch = processor.collate([{"states": item, "text": "the fox"} for item in states])
    assert batch["audio_states"].shape == (2, 50, 16)
    assert batch["audio_states_mask"].sum(-1).tolist() == [50, 23]
    for number, item in enumerate(states):
        assert torch.equal(batch["audio_states"][number, : len(item)], item)
    placeholders = (batch["input_ids"] == processor.audio_token_id).sum(-1)
    assert placeholders.tolist() == [13, 6]  # one for four states


def test_states_give_the_loss_of_the_audio_they_come_from():
    model = tiny.model()
    rows = [row("the fox", 1.0), row("dog", 0.6)]
    batch = model.processor.collate(rows)
    with torch.no_grad():
        encoded = model.encode_audio(batch["input_features"], batch["input_features_mask"])
        stored = [states[mask.bool()] for states, mask in zip(encoded.last_hidden_state, encoded.frame_mask)]
        again = model.processor.collate([{"states": s, "text": r["text"]} for s, r in zip(stored, rows)])
        assert float(model(**again).loss) == pytest.approx(float(model(**batch).loss), abs=1e-5)


GATED = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}


@pytest.mark.parametrize("fields", [{}, GATED], ids=["plain", "gated"])
def test_the_form_for_generation_is_the_prompt_with_the_answer_beside(fields):
    model = tiny.model(llm="qwen3", **fields)
    rows = [row("the fox", 1.0), row("over the lazy dog", 0.6)]
    processor, training = model.processor, model.processor.collate(rows)
    batch = processor.collate(rows, for_generation=True)
    prompts = processor.apply_transcription_request([item["audio"] for item in rows])
    assert set(batch) == {*prompts, "labels"} and all(torch.equal(batch[name], prompts[name]) for name in prompts)
    for answer, labels in zip(batch["labels"], training["labels"]):
        assert answer[answer != -100].tolist() == labels[labels != -100].tolist()
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(float(model(**training).loss), abs=1e-4)


def test_labels_beside_never_have_the_length_of_the_prompt(processor):
    """Their length tells the two forms apart."""
    clip = tiny.noise(0.6)
    length = processor.collate([row("a", audio=clip)], for_generation=True)["input_ids"].shape[1]
    letters = [token for token in range(4, 260) if len(processor.decode_text([token])) == 1]
    text = processor.decode_text(([letters[70], letters[80]] * length)[: length - 1])
    batch = processor.collate([row(text, audio=clip)], for_generation=True)
    assert (batch["labels"] != -100).sum() == length and batch["labels"].shape[1] == length + 1


@pytest.mark.parametrize("for_generation", [False, True], ids=["form for training", "form for generation"])
@pytest.mark.parametrize("fields", [{}, GATED], ids=["plain", "gated"])
def test_seq2seq_trainer_scores_what_the_model_writes(fields, for_generation, tmp_path):
    """The references must not be what an untrained model is asked to continue."""
    model = tiny.model(llm="qwen3", **fields)
    processor, decoded = model.processor, []
    rows = [row("the quick brown fox", 0.5), row("he hoped", 0.9), row("over the lazy dog", 0.7)]

    def compute_metrics(prediction):
        for ids in (prediction.predictions, prediction.label_ids):
            ids = np.where(ids == -100, processor.tokenizer.pad_token_id, ids)
            decoded.append([text.strip() for text in processor.tokenizer.batch_decode(ids, skip_special_tokens=True)])
        return {"right": np.mean([text == reference for text, reference in zip(*decoded)])}

    options = {"use_cpu": True, "remove_unused_columns": False, "report_to": [], "disable_tqdm": True}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(tmp_path, per_device_eval_batch_size=2, predict_with_generate=True, **options),
        eval_dataset=rows,
        data_collator=functools.partial(processor.collate, for_generation=for_generation),
        processing_class=processor.tokenizer,
        compute_metrics=compute_metrics,
    )
    trainer.evaluate()  # two batches, of which the library remembers a `max_length` of 20
    decoded.clear()
    metrics = trainer.evaluate(**({"max_length": 6} if for_generation else {"max_new_tokens": 6}))
    texts, references = decoded
    assert references == [item["text"] for item in rows] and metrics["eval_right"] == 0.0
    expected = model.transcribe([item["audio"] for item in rows], max_new_tokens=6)
    assert texts == [result.text for result in expected]
    with torch.no_grad():
        losses = [float(model(**processor.collate(rows[part])).loss) for part in (slice(0, 2), slice(2, 3))]
    assert min(losses) - 1e-3 <= metrics["eval_loss"] <= max(losses) + 1e-3


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([row(), {"audio": tiny.noise(0.5)}], "Row 1 .* no 'text', only \\['audio'\\]"),
        ([{"text": "a"}], "Row 0 .* no 'audio', only \\['text'\\]"),
        ([row(), {"states": torch.zeros(20, 16), "text": "a"}], "Row 1 .* no 'audio'"),
        ([{"states": torch.zeros(20, 16), "text": "a"}, row()], "Row 1 .* no 'states'"),
        ([row(text=5)], "A transcript must be a string, got int"),
    ],
    ids=["none", "no text", "no audio", "states among audio", "audio among states", "a number"],
)
def test_rows_that_cannot_be_collated(processor, rows, message):
    with pytest.raises(ValueError, match=message):
        processor.collate(rows)


def test_word_times_need_the_encoders_frames():
    model = tiny.model()
    words = [word("the", 0.2, 0.4), word("fox", 0.4, 0.9)]
    batch = model.processor.collate([row("the fox", words=words)])
    audio = model.get_audio_features(batch.pop("input_features"), batch.pop("input_features_mask"))
    embeds = {"audio_embeds": audio.pooler_output, "audio_embeds_mask": audio.audio_embeds_mask}
    with pytest.raises(ValueError, match="alignment head's loss also needs .*audio_states"):
        model(**batch, **embeds)
    assert model(**batch, **embeds, audio_states=audio.last_hidden_state, audio_states_mask=audio.frame_mask).loss > 0


def test_without_word_times_there_are_no_targets(processor):
    assert not {"token_words", "word_times", "frame_times"} & set(processor.collate([row(), row(words=[])]))


@pytest.fixture(scope="module")
def timed(processor):
    """A row with word times and one without."""
    words = [word("the", 0.2, 0.4), word("fox", 0.4, 0.9)]
    return processor.collate([row("the fox", words=words), row("dog")])


def test_each_text_token_has_its_word(processor, timed):
    labels, words = timed["labels"][0], timed["token_words"][0]
    for number, text in enumerate(("the", "fox")):
        assert processor.tokenizer.decode(labels[words == number]).strip() == text
    assert (words[labels == -100] == -100).all() and words[-1] == -100  # neither prompt nor eos is a word


def test_each_letter_has_its_word_and_neither_spaces_nor_padding_has_one(timed):
    assert [bytes(row.tolist()) for row in timed["spelling"]] == [b"the fox", b"dog\0\0\0\0"]
    assert timed["spelling_words"].tolist() == [[0, 0, 0, -100, 1, 1, 1], [0, 0, 0] + [-100] * 4]


def test_words_have_their_times_and_padding_has_none(timed):
    torch.testing.assert_close(timed["word_times"][0], torch.tensor([[0.2, 0.4], [0.4, 0.9]]))
    assert timed["word_times"][1].isnan().all() and timed["frame_times"][1].isnan().all()


def test_frame_times_are_the_centres_of_the_encoders_frames(timed):
    times = timed["frame_times"][0]
    assert len(times) == 95  # until a second after the last word, at 20 ms
    torch.testing.assert_close(times[:3], torch.tensor([0.01, 0.03, 0.05]))


# Word targets, with frames of 0.1 s: their centres are 0.05, 0.15, ...


def targets(timed, words):
    times, frames = word_targets(timed, words.split(), 0.1)
    known = [number for number, time in enumerate(frames.tolist()) if not math.isnan(time)]
    return times.tolist(), known


def test_a_word_for_each_word():
    times, known = targets([word("a", 0.2, 0.5), word("b", 0.8, 1.0)], "a b")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.8, 1.0]], atol=1e-6)
    assert known == list(range(20))  # to 1.0 s and a second of pause


def test_short_gaps_are_closed_as_in_results():
    times, _ = targets([word("a", 0.2, 0.5), word("b", 0.56, 1.0)], "a b")
    np.testing.assert_allclose(times, [[0.2, 0.53], [0.53, 1.0]], atol=1e-6)


def test_words_are_matched_by_their_spelling():
    times, _ = targets([word("mister", 0.2, 0.5), word("fox", 0.5, 1.0)], "Mister, fox")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.5, 1.0]], atol=1e-6)


def test_around_a_word_without_a_time_nothing_is_known():
    times, known = targets([word("quick", 0.2, 0.5), word("jumps", 0.9, 1.2)], "quick fox jumps")
    assert math.isnan(times[1][0])
    assert known == [*range(5), *range(9, 22)]  # unknown from 0.5 to 0.9 s


def test_before_a_first_word_without_a_time_nothing_is_known():
    _, known = targets([word("jumps", 0.9, 1.2)], "fox jumps")
    assert known == list(range(9, 22))


def test_behind_a_last_word_without_a_time_nothing_is_known():
    _, known = targets([word("quick", 0.2, 0.5)], "quick fox")
    assert known == list(range(5))


def test_where_a_word_is_said_that_the_transcript_lacks_nothing_is_known():
    times, known = targets([word("quick", 0.2, 0.5), word("um", 0.5, 0.7), word("fox", 0.7, 1.0)], "quick fox")
    np.testing.assert_allclose(times, [[0.2, 0.5], [0.7, 1.0]], atol=1e-6)
    assert known == [*range(5), *range(7, 20)]


def test_no_word_is_shorter_than_half_a_frame():
    times, _ = targets([word("a", 0.5, 0.5)], "a")
    np.testing.assert_allclose(times, [[0.5, 0.55]], atol=1e-6)


@pytest.mark.parametrize("timed", [None, []])
def test_without_times_nothing_is_known(timed):
    times, known = targets(timed, "a b")
    assert np.isnan(times).all() and known == []
