"""The processor: audio and prompts to model inputs, ids to text."""

import json

import pytest
import torch

from tests import tiny
from voxlm_hf import VoxLMProcessor
from voxlm_hf.processing_voxlm import affine_lengths


@pytest.fixture(scope="module")
def processor():
    return tiny.model().processor


def test_features_do_not_depend_on_the_batch(processor):
    clips = [tiny.noise(0.5137), tiny.noise(1.2)]
    batch = processor.apply_transcription_request(clips)
    alone = processor.apply_transcription_request(clips[0])
    length = alone["input_features"].shape[-1]
    assert torch.equal(batch["input_features"][0, :, :length], alone["input_features"][0])
    assert batch["input_features_mask"].sum(-1).tolist() == [length, 120]
    assert batch["input_features"].shape[-1] == 120, "only the real audio, padded to the longest"


def test_a_prompt_for_each_recording_or_the_trained_one(processor):
    audio = tiny.noise(0.5)
    ids = processor.apply_transcription_request([audio, audio], prompt=["Names: Ada", None])["input_ids"]
    decoded = processor.tokenizer.batch_decode(ids)
    assert "Names: Ada" in decoded[0] and processor.prompt in decoded[1]


@pytest.mark.parametrize("prompt, message", [("a <|audio|> b", "special token"), (3, "must be a string")])
def test_prompts_that_cannot_be_rendered(processor, prompt, message):
    with pytest.raises(ValueError, match=message):
        processor.render_prompt(prompt)


@pytest.mark.parametrize(
    "options, message",
    [({"prompt": ["a", "b", "c"]}, "3 prompts for 2 recordings"), ({"text": ["a"]}, "1 texts for 2 recordings")],
)
def test_as_many_prompts_and_texts_as_recordings(processor, options, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_transcription_request([tiny.noise(0.5)] * 2, **options)


@pytest.mark.parametrize("text", [["no placeholder"], ["<|audio|>", "<|audio|>"]])
def test_each_text_has_one_placeholder_and_one_audio(processor, text):
    with pytest.raises(ValueError, match="exactly one"):
        processor(text=text, audio=[tiny.noise(0.5)])


@pytest.mark.parametrize("options, padded", [({}, 0), ({"padding_side": "right"}, -1)], ids=["left", "right"])
def test_padding_is_on_the_left_unless_asked_for(processor, options, padded):
    text = [processor.render_prompt()] * 2
    batch = processor(text=text, audio=[tiny.noise(0.5), tiny.noise(1.0)], **options)
    mask = batch["attention_mask"][0].tolist()
    assert mask[padded] == 0 and mask[-1 - padded] == 1


def test_saved_and_loaded_it_makes_the_same_inputs(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = VoxLMProcessor.from_pretrained(tmp_path)
    first, second = (item.apply_transcription_request(tiny.noise(0.7)) for item in (processor, loaded))
    for name in first:
        assert torch.equal(first[name], second[name])
    for name in ("prompt", "prompt_template", "audio_window_s", "samples_per_frame", "audio_token_stride"):
        assert getattr(loaded, name) == getattr(processor, name)


def test_a_saved_processor_says_where_its_code_is(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["auto_map"] == {"AutoProcessor": "processing_voxlm.VoxLMProcessor"}
    assert (tmp_path / "processing_voxlm.py").exists()


def test_special_tokens_are_no_text(processor):
    tokenizer = processor.tokenizer
    ids = [0, *tokenizer(" the fox")["input_ids"], tokenizer.convert_tokens_to_ids("<|audio|>"), 2, 1]
    assert processor.decode_text(ids) == " the fox"
    assert [word.text for word in processor.split_words(ids)] == ["the", "fox"]


def test_words_are_encoded_behind_the_text_prefix():
    processor = tiny.model().processor
    processor.text_prefix = " "
    ids, token_words = processor.encode_words("the fox", ["the", "fox"], ["the", "fox"])
    assert ids == processor.tokenizer(" the fox")["input_ids"] and sorted(set(token_words)) == [0, 1]


def test_training_ids_are_prompt_text_and_eos(processor):
    batch = processor.training_ids(["<|audio|> say", "<|audio|>"], [3, 1], ["the fox", "a"])
    tokenizer = processor.tokenizer
    prompt, text = tokenizer("<|audio|>" * 3 + " say")["input_ids"], tokenizer("the fox")["input_ids"]
    assert batch["input_ids"][0].tolist() == [*prompt, *text, tokenizer.eos_token_id]
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + [*text, tokenizer.eos_token_id]
    padding = batch["attention_mask"][1] == 0
    assert padding.any() and (batch["input_ids"][1][padding] == tokenizer.pad_token_id).all()
    assert (batch["labels"][1][padding] == -100).all() and batch["labels"][1, -1] == tokenizer.eos_token_id


def test_affine_lengths_of_known_convolutions():
    def length_of(n):
        return (((n + 2 - 3) // 2 + 1) - 2) // 3 + 1  # kernel 3 stride 2 padding 1, then kernel 2 stride 3

    stride, offset = affine_lengths(length_of, 200)
    assert stride == 6
    for n in range(1, 200):
        assert max(0, (n + offset) // stride) == max(0, int(length_of(torch.tensor(n))))
    with pytest.raises(ValueError, match="affine"):
        affine_lengths(lambda n: n**2, 100)
