"""From recordings to a trained model, at toy size."""

import json
import math
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import yaml
from praatio import textgrid
from transformers import Trainer, TrainingArguments

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.subwords_voxlm import encode_subwords, subword_tokenizer, subword_vocabulary
from voxlm_hf.timing_voxlm import AlignmentScores, alignment_targets
from voxlm_training import label_words
from voxlm_training.augment import Augmentation, misheard
from voxlm_training.corpus import make_dataset
from voxlm_training.data import LengthBatchSampler, SpeechDataset, read_rows
from voxlm_training.label_words import make_source, read_ctm, read_textgrid, teacher_words
from voxlm_training.recipe import read_recipe
from voxlm_training.stages import transcription_trainer, warm_start_trainer
from voxlm_training.train import run
from voxlm_training.trainer import VoxLMTrainer, leave_out_hidden_frames, word_time_errors
from voxlm_training.warm_start import ctc_losses


TEXTS = ["the quick brown fox", "over the lazy dog", "he hoped", "stew for dinner", "turnips and carrots", "the fox"]
MIXTURE = {
    "projector_readout": "token_mixture",
    "frame_gate_threshold": 0.5,
    "projector_kind": "convnext",
    "lora_config": {"r": 2},
}


def model(**fields):
    return tiny.model(**{**MIXTURE, **fields})


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Six short recordings with word times, and a row of every kind that is no good."""
    folder = tmp_path_factory.mktemp("speech")
    rows = []
    for number, text in enumerate(TEXTS):
        waveform = tiny.noise(0.6 + 0.2 * number, number)
        soundfile.write(folder / f"{number}.wav", waveform, 16000)
        words = [
            {"word": word, "start": 0.1 * place, "end": 0.1 * place + 0.1} for place, word in enumerate(text.split())
        ]
        rows.append(
            {
                "id": f"r{number}",
                "audio": f"{number}.wav",
                "text": text.upper(),
                "words": words,
                "speaker": str(number % 2),
            }
        )
    (folder / "broken.wav").write_text("no audio")
    soundfile.write(folder / "nothing.wav", np.zeros(0), 16000)
    soundfile.write(folder / "long.wav", np.zeros(40 * 8000, np.int16), 8000)
    lines = [json.dumps(row) for row in rows]
    lines += [
        "{not json",
        '["a list"]',
        json.dumps({"audio": "0.wav"}),
        json.dumps({"audio": "missing.wav", "text": "a"}),
        json.dumps({"audio": "broken.wav", "text": "a"}),
        json.dumps({"audio": "nothing.wav", "text": "a"}),
        json.dumps({"audio": "long.wav", "text": "a"}),
        json.dumps({"audio": "0.wav", "text": "  "}),
        json.dumps({"audio": "0.wav", "text": "?!"}),
        json.dumps({"audio": "0.wav", "text": "a " * 200}),
        json.dumps({"audio": "0.wav", "text": 5}),
    ]
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "manifest.jsonl"


def test_bad_rows_are_reported_and_left_out(manifest):
    rows, report = read_rows([{"manifest": manifest}], "lower")
    assert [row.text for row in rows] == TEXTS and report.kept == 6
    assert rows[1].words[0] == {"word": "over", "start": 0.0, "end": 0.1}
    assert rows[0].duration == pytest.approx(0.6)
    assert sum(report.left_out.values()) == 11
    for reason in ("not JSON", "no 'audio'", "no 'text'", "unreadable audio", "s long", "empty text", "after normalisation",
                   "characters a second", "not a string"):  # fmt: skip
        assert reason in str(report), reason


def test_slices_and_speakers(manifest):
    rows, _ = read_rows([{"manifest": manifest, "exclude_speakers": ["1"]}], "lower")
    assert [row.id for row in rows] == ["r0", "r2", "r4"] and [row.place[1] for row in rows] == [0, 2, 4]
    rows, _ = read_rows([{"manifest": manifest, "only_speakers": ["1"], "count": 4}, {"silence": 2}], "lower")
    assert [row.id for row in rows[:2]] == ["r1", "r3"] and [row.text for row in rows[2:]] == ["", ""]
    rows, _ = read_rows([{"manifest": manifest, "first": 1, "count": 4, "every": 2}], "lower")
    assert [row.id for row in rows] == ["r1", "r3"]
    with pytest.raises(ValueError, match="exactly one of manifest"):
        read_rows([{"manifests": manifest}])


def test_a_folder_of_recordings_with_transcripts_beside_them(tmp_path):
    for name in ("b", "a", "sub/c", "lonely"):
        (tmp_path / "sub").mkdir(exist_ok=True)
        soundfile.write(tmp_path / f"{name}.flac", tiny.noise(1.0), 16000)
        if name != "lonely":
            (tmp_path / f"{name}.txt").write_text(f"Text {name[-1]}.\n")
    rows, report = read_rows([{"folder": tmp_path}], "lower")
    assert [(row.id, row.text) for row in rows] == [
        ("a.flac", "text a"),
        ("b.flac", "text b"),
        ("sub/c.flac", "text c"),
    ]
    assert "lonely.flac" in str(report)
    with pytest.raises(ValueError, match="not a folder"):
        read_rows([{"folder": tmp_path / "nowhere"}])


def test_librispeech_layout(tmp_path):
    chapter = tmp_path / "84" / "121123"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "84-121123-0000.flac", tiny.noise(1.0), 16000)
    (chapter / "84-121123.trans.txt").write_text("84-121123-0000 GO DO YOU HEAR\n84-121123-0001 NO SUCH FILE\n")
    rows, report = read_rows([{"librispeech": tmp_path}], "lower")
    assert [(row.id, row.text, row.speaker) for row in rows] == [("84-121123-0000", "go do you hear", "84")]
    assert "84-121123-0001" in str(report)
    with pytest.raises(ValueError, match="trans.txt"):
        read_rows([{"librispeech": tmp_path / "84" / "nothing"}])


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_from_parquet(tmp_path, manifest, streaming):
    from datasets import Audio, Dataset

    paths = [str(manifest.parent / f"{number}.wav") for number in range(3)]
    dataset = Dataset.from_dict({"audio": paths, "sentence": TEXTS[:3]}).cast_column("audio", Audio(decode=False))
    dataset.to_parquet(tmp_path / "speech.parquet")
    source = {
        "dataset": "parquet",
        "data_files": str(tmp_path / "speech.parquet"),
        "text_column": "sentence",
        "streaming": streaming,
        "cache_dir": str(tmp_path / "cache"),
    }
    rows, _ = read_rows([source], "lower")
    assert [row.text for row in rows] == TEXTS[:3]
    waveform = tiny.model().processor.load_audio(rows[1].audio)
    assert len(waveform) == pytest.approx(0.8 * 16000)
    with pytest.raises(ValueError, match="no column 'text'"):
        read_rows([{**source, "text_column": "text"}])


def test_augmentation_is_reproducible_and_moves_word_times_with_the_audio():
    clip = 0.001 * tiny.noise(1.0)
    clip[8000] = 1.0
    seen = set()
    for seed in range(120):
        augmentation = Augmentation.draw(np.random.default_rng(seed))
        waveform = augmentation(clip)
        assert np.array_equal(waveform, augmentation(clip)) and np.abs(waveform).max() <= 1
        assert abs(int(np.abs(waveform).argmax()) / 16000 - augmentation.move(0.5)) < 0.002, augmentation
        assert len(waveform) == pytest.approx(
            16000 * (1 / augmentation.speed + augmentation.lead_s + augmentation.tail_s), abs=2
        )
        seen.add(augmentation.codec)
    assert seen == {None, "mp3", "vorbis", "gsm", "telephone"}
    np.testing.assert_array_equal(Augmentation()(clip), clip)


def test_pauses_and_long_silences_come_where_words_are_known():
    words = [{"word": "a", "start": 0.2, "end": 0.4}, {"word": "b", "start": 0.6, "end": 0.9}]
    clip = 0.001 * tiny.noise(1.0)
    clip[8000] = 1.0  # the middle between the words
    drawn = [Augmentation.draw(np.random.default_rng(seed), words) for seed in range(60)]
    assert 5 < sum(bool(item.pauses) for item in drawn) < 50 and any(item.lead_s > 1 for item in drawn)
    for augmentation in drawn:
        assert {moment for moment, _ in augmentation.pauses} <= {0.5}
        first, second = augmentation.move_words(words)
        gap = sum(length for _, length in augmentation.pauses)
        assert second["start"] - first["end"] == pytest.approx((0.2 + gap) / augmentation.speed)
        assert abs(np.abs(augmentation(clip)).argmax() / 16000 - augmentation.move(0.5)) < 0.002


def test_misheard_words_have_the_place_of_those_that_were_said():
    words = [{"word": w, "start": n / 2, "end": n / 2 + 0.4} for n, w in enumerate("the quick brown fox".split())]
    rng = np.random.default_rng(0)
    text, changed = misheard("the quick brown fox runs", words[:3] + words[3:], ["um"], 1.0, rng)
    assert text.split()[-1] == "runs" and set(text.split()[:-1]) == {"um"}
    assert [word["word"] for word in changed] == ["um"] * len(changed) and len(changed) >= 4
    assert {word["start"] for word in words} <= {word["start"] for word in changed}
    assert {word["end"] for word in words} <= {word["end"] for word in changed}
    assert misheard("the quick", words, ["um"], 0.0, rng) == ("the quick", words)
    assert misheard("", words[:1], ["um"], 1.0, rng) == ("", words[:1])


def test_wrong_words_are_for_the_alignment_head_alone(manifest, tmp_path):
    toy = model()
    dataset = make_dataset(toy, [{"manifest": manifest}], misheard=0.5)
    with pytest.raises(ValueError, match="only the alignment head"):
        transcription_trainer(toy, dataset, None, tmp_path, 0, parts=["lora"])


def test_batches_are_capped_cover_everything_and_differ_by_epoch():
    lengths = np.random.default_rng(0).integers(10, 300, size=1000).tolist()
    sampler = LengthBatchSampler(lengths, 1000, seed=1)
    first = list(sampler)
    assert sorted(index for batch in first for index in batch) == list(range(1000))
    assert max(len(batch) * max(lengths[index] for index in batch) for batch in first) <= 1000
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in first)
    assert padded < 1.1 * sum(lengths)
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert len(LengthBatchSampler(lengths, 1000, multiple=7)) % 7 == 0


def test_a_late_epoch_costs_no_more_than_the_first(monkeypatch):
    lengths = np.random.default_rng(0).integers(10, 300, size=100).tolist()
    sampler, passes = LengthBatchSampler(lengths, 1000), []
    one_pass = sampler.one_pass
    monkeypatch.setattr(sampler, "one_pass", lambda number: passes.append(number) or one_pass(number))
    found = []
    for epoch in range(20):
        passes.clear()
        sampler.set_epoch(epoch)
        assert len(passes) <= 2
        found.append(list(sampler))
    fresh = LengthBatchSampler(lengths, 1000)
    fresh.set_epoch(19)  # as a resumed run does
    assert list(fresh) == found[19]
    whole = [batch for number in range(25) for batch in one_pass(number)]
    assert [batch for epoch in found for batch in epoch] == whole[: 20 * len(sampler)]


def test_ctm(tmp_path):
    (tmp_path / "a.ctm").write_text(";; comment\nrec1 1 0.50 0.25 hello 0.99\nrec1 1 0.80 0.20 world\n")
    assert read_ctm(tmp_path / "a.ctm") == {
        "rec1": [{"word": "hello", "start": 0.5, "end": 0.75}, {"word": "world", "start": 0.8, "end": 1.0}]
    }
    (tmp_path / "bad.ctm").write_text("rec1 1 0.5\n")
    with pytest.raises(ValueError, match="bad.ctm:1"):
        read_ctm(tmp_path / "bad.ctm")


# Both formats are described in Praat's manual, "TextGrid file formats".
INTERVALS = [(0, 0.5, ""), (0.5, 0.75, 'say ""é""'), (0.75, 1, "spn"), (1, 1.25, "<eps>"), (1.25, 1.5, "world")]
LONG_GRID = (
    'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 1.5\ntiers? <exists>\nsize = 2\nitem []:\n'
    '    item [1]:\n        class = "IntervalTier"\n        name = "words"\n        xmin = 0\n        xmax = 1.5\n'
    "        intervals: size = 5\n"
    + "".join(
        f'        intervals [{number}]:\n            xmin = {start}\n            xmax = {end}\n            text = "{word}"\n'
        for number, (start, end, word) in enumerate(INTERVALS, 1)
    )
    + '    item [2]:\n        class = "TextTier"\n        name = "clicks"\n        xmin = 0\n        xmax = 1.5\n'
    '        points: size = 1\n        points [1]:\n            number = 0.3\n            mark = "click"\n'
)
SHORT_GRID = (
    'File type = "ooTextFile short"\n"TextGrid"\n\n0\n1.5\n<exists>\n2\n"IntervalTier"\n"words"\n0\n1.5\n5\n'
    + "".join(f'{start}\n{end}\n"{word}"\n' for start, end, word in INTERVALS)
    + '"TextTier"\n"clicks"\n0\n1.5\n1\n0.3\n"click"\n'
)


@pytest.mark.parametrize("content", [LONG_GRID, SHORT_GRID], ids=["long", "short"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_textgrid(tmp_path, content, encoding):
    (tmp_path / "a.TextGrid").write_text(content, encoding=encoding)
    assert read_textgrid(tmp_path / "a.TextGrid") == [
        {"word": 'say "é"', "start": 0.5, "end": 0.75},
        {"word": "world", "start": 1.25, "end": 1.5},
    ]
    with pytest.raises(ValueError, match="no tier 'phones'; its tiers are 'words', 'clicks'"):
        read_textgrid(tmp_path / "a.TextGrid", tier="phones")


@pytest.mark.parametrize("content", ["", "no grid", LONG_GRID[:60], LONG_GRID.replace("xmax = 0.75", "")])
def test_a_file_that_is_no_textgrid_is_named(tmp_path, content):
    (tmp_path / "a.TextGrid").write_text(content)
    with pytest.raises(ValueError, match=r"a.TextGrid is not a valid TextGrid"):
        read_textgrid(tmp_path / "a.TextGrid")


def test_subwords_spell_every_text_with_the_llms_own_ids():
    tokenizer = tiny.tokenizer()
    subwords = subword_tokenizer(tokenizer, 5)
    for text in TEXTS:
        ids = encode_subwords(subwords, text)
        assert tokenizer.decode(ids) == " " + text
        assert len(ids) > len(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
    vocabulary = subword_vocabulary(subwords, TEXTS, at_least=1)
    assert (
        set(vocabulary) == {token for text in TEXTS for token in encode_subwords(subwords, text)}
        and len(vocabulary) < 60
    )
    with pytest.raises(ValueError, match="Unigram"):
        from tokenizers import Tokenizer, models

        unigram = Tokenizer(models.Unigram([("a", 0.0)]))
        subword_tokenizer(SimpleNamespace(backend_tokenizer=unigram), 5)


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
    losses = ctc_losses(embeds, mask, speech, tokens, torch.tensor(2.0), torch.tensor([[0, 1, -100], [2, 2, -100]]))
    assert losses.shape == (2,) and float(losses.sum()) == pytest.approx(float(expected), rel=1e-5)


class Rows(list):
    """A list that can have attributes."""


def tones():
    """Encoder states that tell three words apart so clearly that any learner must learn them."""
    torch.manual_seed(0)
    words, directions = ["fox", "dog", "stew"], 3 * torch.randn(3, 16)
    rows = []
    for number in range(30):
        chosen = np.random.default_rng(number).permutation(3)
        states = torch.cat([directions[word].repeat(32, 1) for word in chosen] + [torch.zeros(12, 16)])
        rows.append(
            {"states": states + 0.1 * torch.randn_like(states), "text": " ".join(words[word] for word in chosen)}
        )
    dataset = Rows(rows)
    dataset.lengths, dataset.spoken_texts = [len(row["states"]) for row in rows], [row["text"] for row in rows]
    return rows, dataset


def test_the_warm_start_learns(tmp_path):
    rows, dataset = tones()
    toy = model(projector_hidden_size=64)
    options = {"merges": 5, "max_steps": 400, "learning_rate": 5e-3, "noise": 0.1, "frames_per_batch": 600}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}
    made = warm_start_trainer(toy, dataset, dataset, tmp_path, 0, **options, **quiet)
    before = made.evaluate()["eval_wer"]
    made.resume()
    assert before > 0.9 and made.evaluate()["eval_wer"] < 0.3
    assert toy.config.projector_vocab_size == len(toy.projector.token_ids) < 60
    with pytest.raises(ValueError, match="frame_gate_threshold"):
        warm_start_trainer(tiny.model(), dataset, None, tmp_path, 0)


def cached(toy, manifest, folder):
    return make_dataset(toy, [{"manifest": manifest}], normaliser="lower", cache=folder)


def test_leaving_out_hidden_frames_changes_no_loss(tmp_path, manifest):
    toy, kept = model(), None
    kept = cached(toy, manifest, tmp_path)
    batch = toy.processor.collate([kept[index] for index in range(6)])
    short = leave_out_hidden_frames(toy, batch)
    assert short["input_ids"].shape[1] < batch["input_ids"].shape[1]
    with torch.no_grad():
        whole, packed = toy(**batch), toy(**short)
    assert float(whole.loss) == pytest.approx(float(packed.loss), abs=1e-5)
    assert float(whole.alignment_loss) == pytest.approx(float(packed.alignment_loss), abs=1e-5)


def test_evaluation_generates_from_the_prompts_of_inference(tmp_path, manifest):
    toy = model()
    rows, _ = read_rows([{"manifest": manifest}], "lower")
    dataset = SpeechDataset(rows, toy.processor)
    made = trainer(toy, dataset, tmp_path)
    _, (ids, _), _ = made.prediction_step(toy, toy.processor.collate([dataset[0], dataset[5]]), False)
    inputs = toy.processor.apply_transcription_request([rows[0].audio, rows[5].audio])
    alone = toy.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(ids, alone[:, inputs["input_ids"].shape[1] :])


def test_word_times_of_a_source_can_be_shifted(manifest):
    (row, *_), _ = read_rows([{"manifest": manifest, "shift_s": -0.05}], "lower")
    times = [(word["start"], word["end"]) for word in row.words]
    assert np.array(times) == pytest.approx(np.array([(0.0, 0.05), (0.05, 0.15), (0.15, 0.25), (0.25, 0.35)]))
    for value in ("x", None, float("nan")):
        with pytest.raises(ValueError, match="`shift_s` of the source .* must be a finite number"):
            read_rows([{"manifest": manifest, "shift_s": value}])


def test_rows_with_word_times_by_themselves(manifest):
    rows, _ = read_rows([{"manifest": manifest, "count": 3}, {"silence": 1}], "lower")
    rows[1].words = None
    dataset = SpeechDataset(rows, model().processor, keys=["k0", "k1", "k2", "k3"])
    timed = dataset.timed(0.5)
    assert ([row.id for row in timed.rows], timed.keys, timed.misheard) == (["r0", "r2"], ["k0", "k2"], 0.5)
    assert timed.skipped is dataset.skipped and dataset.misheard == 0


def test_word_time_errors_of_a_head_that_knows(tmp_path, manifest, monkeypatch):
    """Scores made from the targets give no error; moved by three frames, 60 ms."""
    toy = model()
    dataset = cached(toy, manifest, tmp_path)
    batch = toy.processor.collate([dataset[index] for index in range(6)])

    def known(states, token_ids, audio, shift=0):
        words, frames = batch["token_words"][:, -token_ids.shape[1] :], audio.frame_mask.shape[1]
        middles = (torch.arange(frames) + 0.5 - shift) * 0.02
        shares, onsets = alignment_targets(batch["word_times"], middles.expand(len(words), -1))
        words = words.clamp(min=0).unsqueeze(-1).expand(-1, -1, frames)
        of_words = shares.gather(1, words).clamp(min=1e-9).log()
        return AlignmentScores(of_words, (1 - shares.sum(1)).clamp(min=1e-9).log(), 20 * onsets - 10)

    monkeypatch.setattr(toy, "align_scores", known)
    assert word_time_errors(toy, batch, 0.02).abs().max() < 0.006
    monkeypatch.setattr(toy, "align_scores", lambda *args: known(*args, shift=3))
    errors = word_time_errors(toy, batch, 0.02)
    assert errors[0].tolist() == pytest.approx([0.06, 0.06], abs=0.02)
    del batch["word_times"]
    assert word_time_errors(toy, batch, 0.02).isnan().all()


def test_a_teacher_is_believed_where_it_agrees(tmp_path):
    def teacher(audio, return_timestamps):
        chunks = [(" The", 0.0, 0.2), (" Fox.", 0.2, 0.5), (" jumps", 0.5, None)]
        return {"text": " The Fox. jumps", "chunks": [{"text": t, "timestamp": (a, b)} for t, a, b in chunks]}

    words = teacher_words(teacher, "a.wav", "THE FOX JUMPS")
    assert words == [{"word": "The", "start": 0.0, "end": 0.2}, {"word": "Fox.", "start": 0.2, "end": 0.5}]
    assert teacher_words(teacher, "a.wav", "THE OX JUMPS") is None
    assert teacher_words(teacher, "a.wav", "THE OX JUMPS", max_wer=0.4) == words
    assert teacher_words(teacher, "a.wav", "?") is None


def source(**options):
    """The command line's options, of which one names a source."""
    names = ("agree", "teacher", "textgrid", "ctm", "original")
    return make_source(SimpleNamespace(**{**dict.fromkeys(names), "max_wer": 0.1, **options}))


def test_word_times_from_textgrids_and_ctm(tmp_path):
    (tmp_path / "r1.TextGrid").write_text(SHORT_GRID)
    (tmp_path / "a.ctm").write_text("7 1 0.50 0.25 hello\n")
    from_grids, from_ctm = source(textgrid=tmp_path), source(ctm=tmp_path / "a.ctm")
    assert [word["word"] for word in from_grids({"id": "r1"})] == ['say "é"', "world"]
    assert from_ctm({"id": 7}) == [{"word": "hello", "start": 0.5, "end": 0.75}]
    assert from_grids({"id": "r2"}) is None and from_ctm({"id": "r2"}) is None


def test_word_times_are_added_to_a_manifest(tmp_path, manifest):
    original = [
        {"id": "r0", "timestamps": [{"word": "The", "start": 0.1, "end": 0.2}, {"word": "x", "start": 0.0, "end": 0.0}]}
    ]
    (tmp_path / "timestamps_manifest.json").write_text(json.dumps(original))
    command = [
        sys.executable,
        "-m",
        "voxlm_training.label_words",
        str(manifest),
        str(manifest.parent / "labelled.jsonl"),
    ]
    command += ["--original", str(tmp_path / "timestamps_manifest.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *others = [json.loads(line) for line in (manifest.parent / "labelled.jsonl").read_text().splitlines()]
    assert first["words"] == [{"word": "The", "start": 0.1, "end": 0.2}] and first["audio"] == "0.wav"
    assert len(others) >= 5 and "no word times" in done.stdout


def test_labelling_a_part_elsewhere_resumes_after_any_byte(tmp_path, manifest, monkeypatch):
    (tmp_path / "a.ctm").write_text("r1 1 0.50 0.25 over\nr5 1 0.1 0.2 the\n")
    output = tmp_path / "elsewhere" / "labelled.jsonl"
    output.parent.mkdir()
    options = ["--ctm", str(tmp_path / "a.ctm"), "--exclude-speakers", "0"]
    monkeypatch.setattr(sys, "argv", ["label_words", str(manifest), str(output), *options])
    label_words.main()
    whole = output.read_text()
    rows = [json.loads(line) for line in whole.splitlines() if json.loads(line).get("speaker")]
    assert [row["id"] for row in rows] == ["r1", "r3", "r5"]  # of speaker 1
    assert [[word["word"] for word in row["words"]] for row in rows[::2]] == [["over"], ["the"]]
    assert all((output.parent / row["audio"]).exists() for row in rows)
    for cut in (0, 10, len(whole) // 2):
        output.write_text(whole[:cut])
        label_words.main()
        assert output.read_text() == whole
    monkeypatch.setattr(sys, "argv", ["label_words", str(manifest), str(output), "--every", "2", *options])
    output.unlink()
    label_words.main()
    assert "r1" not in output.read_text()  # the second row of the manifest


def trainer(toy, dataset, folder, **arguments):
    own = {
        "seconds_per_batch": arguments.pop("seconds_per_batch", 2.5),
        "state_noise": arguments.pop("state_noise", 0.5),
    }
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    settings = {**defaults, **arguments}
    return VoxLMTrainer(
        model=toy,
        args=TrainingArguments(
            output_dir=str(folder), remove_unused_columns=False, use_cpu=True, disable_tqdm=True, **settings
        ),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=toy.processor.collate,
        processor=toy.processor,
        max_new_tokens=5,
        **own,
    )


def losses_of(made):
    return [log["loss"] for log in made.state.log_history if "loss" in log]


def test_training_moves_what_should_move_and_evaluates(tmp_path, manifest):
    toy = model()
    dataset = cached(toy, manifest, tmp_path / "cache")
    before = {name: tensor.clone() for name, tensor in toy.state_dict().items()}
    made = trainer(toy, dataset, tmp_path, eval_strategy="steps", eval_steps=4)
    made.train()
    assert not toy.projector._forward_pre_hooks, "the noise of one stage must not reach the next"
    moved = {name for name, tensor in toy.state_dict().items() if not torch.equal(tensor, before[name])}
    assert any(".lora_B." in name for name in moved) and any(name.startswith("alignment.") for name in moved)
    assert not any(".base_layer." in name or name.startswith("encoder.") for name in moved)
    logs = [log for log in made.state.log_history if "loss" in log]
    assert all(math.isfinite(log["loss"]) and 0 < log["alignment_loss"] < log["loss"] for log in logs)
    (scores,) = [log for log in made.state.log_history if "eval_wer" in log]
    assert 0 < scores["eval_word_start_error_ms"] < 1500 and 0 < scores["eval_word_end_error_ms"] < 1500
    assert scores["eval_wer"] > 0.5 and scores["eval_cer"] > 0.3 and 0 <= scores["eval_end_of_speech_rate"] <= 1


def test_a_killed_run_resumes_to_the_same_losses(tmp_path, manifest):
    """Six steps in one go against three, a new process's worth of objects, and the last three; only trained weights are kept."""
    state = model().state_dict()

    def fresh():
        toy = model()
        toy.load_state_dict(state)
        return toy, cached(toy, manifest, tmp_path / "cache")

    straight = trainer(*fresh(), tmp_path / "straight", max_steps=6, seed=3)
    straight.train()
    first = trainer(*fresh(), tmp_path / "killed", max_steps=6, seed=3, save_strategy="steps", save_steps=2)
    first.add_callback(type("Kill", (type(first.callback_handler.callbacks[0]),), {"on_step_end": _kill_after_three})())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    toy, dataset = fresh()
    second = trainer(toy, dataset, tmp_path / "killed", max_steps=6, seed=3)
    second.train(resume_from_checkpoint=str(tmp_path / "killed" / "checkpoint-2"))
    assert losses_of(second) == losses_of(straight)
    stored = {name for file in (tmp_path / "killed" / "checkpoint-2").glob("*.safetensors") for name in _names(file)}
    assert stored and all(".lora_" in name or name.startswith(("projector.", "alignment.")) for name in stored)


def _kill_after_three(self, arguments, state, control, **kwargs):
    if state.global_step == 3:
        raise KeyboardInterrupt


def _names(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as tensors:
        return list(tensors.keys())


def test_gradient_accumulation_gives_the_same_loss_and_step(tmp_path, manifest):
    """The whole data in one batch against batches of one row, accumulated."""
    state = model().state_dict()
    found = []
    for seconds, steps in ((1000, 1), (0.5, 6)):
        toy = model()
        toy.load_state_dict(state)
        dataset = cached(toy, manifest, tmp_path / "cache")
        made = trainer(
            toy,
            dataset,
            tmp_path,
            seconds_per_batch=seconds,
            gradient_accumulation_steps=steps,
            max_steps=1,
            state_noise=0,
            eval_on_start=True,  # what it finds is no part of the training's log
            eval_strategy="steps",
        )
        made.train()
        (share,) = [log["alignment_loss"] for log in made.state.log_history if "loss" in log]
        found.append((losses_of(made)[0], toy.alignment.state_proj.weight.detach().clone(), share))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-4)
    assert found[0][2] == pytest.approx(found[1][2], abs=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-6, rtol=0)
    assert not torch.allclose(found[0][1], state["alignment.state_proj.weight"], atol=1e-3), "no step was taken"


def test_a_users_own_script_with_plain_trainer(tmp_path, manifest):
    """No class of ours but the model and the collator; audio straight from the files."""
    toy = tiny.model(lora_config={"r": 2})
    rows = [json.loads(line) for line in manifest.read_text().splitlines()[:6]]
    data = [{"audio": str(manifest.parent / row["audio"]), "text": row["text"].lower()} for row in rows]
    plain = Trainer(
        model=toy,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            remove_unused_columns=False,
            per_device_train_batch_size=2,
            max_steps=8,
            learning_rate=1e-2,
            logging_steps=1,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=data,
        data_collator=toy.processor.collate,
    )
    plain.train()
    losses = losses_of(plain)
    assert losses[-1] < losses[0]


def test_a_recipe_runs_all_stages_resumes_and_its_model_loads(tmp_path, manifest, capsys):
    toy = model()
    toy.save_pretrained(tmp_path / "base")
    toy.processor.save_pretrained(tmp_path / "base")
    recipe = {
        "model": str(tmp_path / "base"),
        "output": str(tmp_path / "out"),
        "data": {"normaliser": "lower", "augment": True, "copies": 2, "cache": str(tmp_path / "features"),
                 "train": [{"manifest": str(manifest)}, {"silence": 1}], "dev": [{"manifest": str(manifest), "count": 2}]},
        "stages": [
            {"kind": "warm_start", "merges": 5, "steps": 2, "eval_steps": 1},
            {"kind": "transcription", "parts": ["lora"], "seconds_per_batch": 4, "max_steps": 2, "max_new_tokens": 3, "eval_steps": 2},
            {"kind": "alignment", "parts": ["alignment"], "seconds_per_batch": 4, "max_steps": 9, "bf16": True,
             "head": "spelling", "state_noise": 0.2, "misheard": 0.2, "eval_steps": 2},
        ],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    recipe = read_recipe(tmp_path / "recipe.yaml", ["stages.2.max_steps=2", "seed=5"])
    assert recipe["stages"][2]["max_steps"] == 2 and recipe["seed"] == 5
    final = run(recipe)
    shown = capsys.readouterr().out
    assert "left out" in shown and "trained:" in shown
    trained = VoxLMForSpeechSeq2Seq.from_pretrained(final)
    assert trained.config.projector_vocab_size == len(trained.projector.token_ids)
    assert trained.config.alignment_kind == "spelling"
    logs = json.loads((tmp_path / "out" / "3-alignment" / "log.json").read_text())
    assert any(log.get("eval_word_start_error_ms", 0) > 0 for log in logs)
    shutil.rmtree(tmp_path / "out" / "3-alignment")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(run(recipe))
    assert capsys.readouterr().out.count("finished before") == 2
    # Also the last stage, in whose process the others, in another precision, did not run.
    for (name, one), other in zip(trained.state_dict().items(), again.state_dict().values()):
        assert torch.equal(one, other), name


RECIPE = """
model: a
output: b
data: {train: &sources [{folder: x}, {silence: 2}], dev: *sources}
stages: [{kind: alignment, parts: [alignment], max_steps: 9}]
"""


def test_a_recipe_is_plain_data_with_its_defaults(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    sources = [{"folder": "x"}, {"silence": 2}]
    recipe = read_recipe(tmp_path / "recipe.yaml", [])
    assert recipe == {
        "model": "a",
        "output": "b",
        "data": {"train": sources, "dev": sources},
        "stages": [{"kind": "alignment", "parts": ["alignment"], "max_steps": 9}],
        "seed": 0,
    }
    assert type(recipe["data"]["train"]) is list and type(recipe["stages"][0]) is dict


@pytest.mark.parametrize(
    "override, place, expected",
    [
        ("stages.0.max_steps=4", ("stages", 0, "max_steps"), 4),
        ("stages.0.learning_rate=1e-3", ("stages", 0, "learning_rate"), 0.001),
        ("stages.0.parts=[lora]", ("stages", 0, "parts"), ["lora"]),
        ("stages.0.settings={a: 1}", ("stages", 0, "settings"), {"a": 1}),
        ("data.train.0.folder=x=y", ("data", "train", 0, "folder"), "x=y"),
        ("data.cache=runs/f", ("data", "cache"), "runs/f"),
        ("data.augment=true", ("data", "augment"), True),
        ("data.cache=null", ("data", "cache"), None),
        ("seed=5", ("seed",), 5),
    ],
)
def test_overrides(tmp_path, override, place, expected):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    found = read_recipe(tmp_path / "recipe.yaml", [override])
    for part in place:
        found = found[part]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages.7.steps=1", "no place"),
        ("stages.7=1", "no place"),
        ("stages.first.steps=1", "no place"),
        ("model.text=c", "no place"),
        ("dta.cache=c", "no place 'dta.cache'"),
        ("no_equals", "form key"),
        ("extra=1", "Unknown keys in the recipe: extra; known are model, output, data, stages, seed"),
        ("seed=five", "not a valid recipe: .*seed"),
        ("stages={kind: reader}", "not a valid recipe"),
    ],
)
def test_bad_overrides(tmp_path, override, message):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(ValueError, match="(?s)" + message):
        read_recipe(tmp_path / "recipe.yaml", [override])


def test_a_key_that_a_recipe_lacks_is_named(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("output: b\n", ""))
    with pytest.raises(ValueError, match="not a valid recipe: .*output"):
        read_recipe(tmp_path / "recipe.yaml", [])


def test_unknown_stages_are_refused():
    with pytest.raises(ValueError, match="'dance'"):
        run({"model": "a", "output": "b", "data": {"train": [{"dataset": "c"}]}, "stages": [{"kind": "dance"}]})


def test_a_recipe_reads_nothing_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    text = "model: a\noutput: '${oc.env:SECRET}'\ndata: {train: []}\nstages: []\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = read_recipe(tmp_path / "recipe.yaml", ["data.prompt=${what}"])
    assert recipe["output"] == "${oc.env:SECRET}" and recipe["data"]["prompt"] == "${what}"
    with pytest.raises(ValueError, match="recipe"):
        read_recipe(tmp_path / "recipe.yaml", ["model=???"])


def test_a_textgrid_of_points_is_refused(tmp_path):
    grid = textgrid.Textgrid()
    grid.addTier(textgrid.PointTier("words", [(0.5, "a")], 0, 1))
    grid.save(str(tmp_path / "a.TextGrid"), "long_textgrid", True)
    (tmp_path / "b.TextGrid").write_text("{}")
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"{name}.TextGrid"):
            read_textgrid(tmp_path / f"{name}.TextGrid")
