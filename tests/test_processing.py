"""The processor: audio and prompts to model inputs, ids to text."""

import json

import pytest
import torch

from tests import tiny
from voxlm_hf import VoxLMProcessor
from voxlm_hf.forced_alignment_voxlm import known_text
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


@pytest.mark.parametrize(
    "text", [["no placeholder"], ["<|audio|>", "<|audio|>"], ["<|audio|><|audio|>"], "<|audio|> <|audio|>"]
)
def test_each_audio_has_one_placeholder_in_the_texts(processor, text):
    with pytest.raises(ValueError, match=r"Each audio needs one <\|audio\|> in the texts.* and 1 audios"):
        processor(text=text, audio=[tiny.noise(0.5)])


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_may_have_several_audios(processor, nested):
    clips = [tiny.noise(0.5), tiny.noise(0.8), tiny.noise(0.3)]
    batch = processor(text=["<|audio|> and <|audio|>", "<|audio|>"], audio=[clips[:2], clips[2:]] if nested else clips)
    counts = [processor.num_audio_tokens(length) for length in batch["input_features_mask"].sum(-1).tolist()]
    assert len(batch["input_features"]) == 3
    assert (batch["input_ids"] == processor.audio_token_id).sum(-1).tolist() == [counts[0] + counts[1], counts[2]]


HALF = "na\u00efve \ud800"


@pytest.mark.parametrize(
    "call",
    [
        lambda processor, clip: processor.render_prompt(HALF),
        lambda processor, clip: processor.apply_transcription_request(clip, prompt=HALF),
        lambda processor, clip: processor.apply_transcription_request(clip, text=HALF),
        lambda processor, clip: processor.collate([{"audio": clip, "text": HALF}]),
        lambda processor, clip: processor(text="<|audio|>" + HALF, audio=clip),
        lambda processor, clip: known_text(processor, HALF),
    ],
)
def test_half_a_character_is_refused(processor, call):
    with pytest.raises(ValueError, match=r"a lone surrogate \('\\ud800' at position \d+\)"):
        call(processor, tiny.noise(0.5))


PLAIN = "{% for message in messages %}<{{ message['role'] + '> ' + message['content'] + '\n' }}{% endfor %}"
TEMPLATES = {
    "strings": (
        PLAIN + "{% if add_generation_prompt %}<assistant>{% endif %}",
        "<user> <|audio|>\nSay it.\n<assistant>",
    ),
    "lists": (
        "{% for message in messages %}<{{ message.role }}>{% for item in message.content %}"
        "{{ '<|audio|>' if item.type == 'audio' else item.text }}{% endfor %}{% endfor %}",
        "<user><|audio|>Say it.",
    ),
}


@pytest.mark.parametrize("template, expected", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("holder", ["processor", "tokenizer", "argument"])
def test_chats_of_any_template(template, expected, holder, monkeypatch):
    processor = tiny.model().processor
    content = [{"type": "audio"}, {"type": "text", "text": "Say it."}]
    options = {"chat_template": template} if holder == "argument" else {}
    if not options:
        monkeypatch.setattr(processor if holder == "processor" else processor.tokenizer, "chat_template", template)
    chat = [{"role": "user", "content": content}]
    assert processor.apply_chat_template(chat, add_generation_prompt=True, **options) == expected
    assert chat == [{"role": "user", "content": content}], "the caller's is left as it is"
    string = [{"role": "user", "content": "<|audio|>\nSay it."}]
    if template.startswith(PLAIN):
        assert processor.apply_chat_template(string, add_generation_prompt=True, **options) == expected


@pytest.mark.parametrize("kind", ["array", "path", "dict", "tensor"])
def test_a_chat_with_audio_makes_the_inputs_of_its_text(kind, monkeypatch):
    processor = tiny.model().processor
    monkeypatch.setattr(processor, "chat_template", TEMPLATES["strings"][0])
    clip, file = tiny.noise(0.7), "tests/data/austen-0880.flac"
    audio = {
        "array": clip,
        "path": file,
        "dict": {"array": clip, "sampling_rate": 16000},
        "tensor": torch.from_numpy(clip),
    }[kind]
    item = {"type": "audio", "path" if kind == "path" else "audio": audio}
    chat = [{"role": "user", "content": [item, {"type": "text", "text": "Say it."}, {"type": "audio", "audio": clip}]}]
    made = processor.apply_chat_template([chat, chat], tokenize=True, return_dict=True)
    text = "<user> <|audio|>\nSay it.\n<|audio|>\n"
    expected = processor(text=[text, text], audio=[audio, clip] * 2)
    assert set(made) == set(expected)
    for name in expected:
        assert torch.equal(made[name], expected[name]), name


def test_saving_leaves_the_processor_as_it_was(processor, tmp_path):
    before = processor.to_json_string()
    processor.save_pretrained(tmp_path)
    assert processor.to_json_string() == before


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
