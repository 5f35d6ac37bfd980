"""The network over many encoders and LLMs: forward, loss, batches, padding, the frame gate, precision."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.encoders_voxlm import encoder_output_lengths, run_last_layers


PAIRS = [(encoder, "qwen2") for encoder in tiny.ENCODERS] + [("whisper", llm) for llm in tiny.LLMS if llm != "qwen2"]
TEXTS = ["the quick brown fox", "he hoped"]


def inputs_of(model, seconds=(1.0, 0.6), texts=None):
    audio = [tiny.noise(length, seed) for seed, length in enumerate(seconds)]
    return model.processor.apply_transcription_request(audio, text=texts)


def features_of(inputs):
    """The encoder's inputs among the model's."""
    return {name: value for name, value in inputs.items() if name.startswith("input_") and name != "input_ids"}


# Every pair of encoder and LLM


@pytest.mark.parametrize("encoder, llm", PAIRS)
def test_a_forward_has_logits_for_the_whole_vocabulary(encoder, llm):
    model = tiny.model(encoder, llm)
    inputs = inputs_of(model)
    assert model(**inputs).logits.shape == (*inputs["input_ids"].shape, tiny.VOCAB_SIZE)


@pytest.mark.parametrize("encoder, llm", PAIRS)
def test_projector_and_lora_learn_and_the_bases_do_not(encoder, llm):
    model = tiny.randomise_lora(tiny.model(encoder, llm, lora_config={"r": 2}))
    model(**inputs_of(model, texts=TEXTS)).loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in trained) and any(name.startswith("projector") for name in trained)
    assert not any(name.startswith("encoder") or ".base_layer." in name for name in trained)


@pytest.mark.parametrize("encoder, llm", PAIRS)
def test_saved_in_shards_and_loaded_it_has_the_same_logits(encoder, llm, tmp_path):
    model = tiny.randomise_lora(tiny.model(encoder, llm, lora_config={"r": 2}))
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    inputs = inputs_of(model, texts=TEXTS)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("encoder, llm", PAIRS)
@torch.no_grad()
def test_logits_are_those_of_the_llm_on_merged_embeddings(encoder, llm):
    model = tiny.model(encoder, llm)
    inputs = inputs_of(model, seconds=(0.8,))
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    audio = model.get_audio_features(**features_of(inputs))
    embeddings[inputs["input_ids"] == model.config.audio_token_id] = audio.pooler_output[0]
    expected = model.language_model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


# Every encoder


@pytest.fixture(scope="module", params=[("mlp", "linear"), ("convnext", "token_mixture")], ids="-".join)
def head(request):
    kind, readout = request.param
    return {"projector_kind": kind, "projector_readout": readout, "frame_gate_threshold": 0.5}


CLIPS = [tiny.noise(seconds, seed) for seed, seconds in enumerate((0.53, 1.217, 0.9))]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("encoder", tiny.ENCODERS)
@torch.no_grad()
def test_logits_of_a_batch_are_those_of_its_rows(encoder, head, side):
    model = tiny.model(encoder, "qwen3", **head)
    processor, prompt = model.processor, model.processor.render_prompt()
    batch = processor(text=[prompt] * 3, audio=CLIPS, padding_side=side)
    logits = model(**batch).logits
    for row, clip in enumerate(CLIPS):
        single = model(**processor(text=prompt, audio=clip)).logits[0]
        torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], single, atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoder", tiny.ENCODERS)
def test_transcripts_of_a_batch_are_those_of_its_rows(encoder, head):
    model = tiny.model(encoder, "qwen3", **head)
    together = model.transcribe(CLIPS, max_new_tokens=6)
    assert any(result.text for result in together)
    assert [model.transcribe(clip, max_new_tokens=6).text for clip in CLIPS] == [result.text for result in together]


@pytest.mark.parametrize("encoder", tiny.ENCODERS)
@torch.no_grad()
def test_lengths_agree_with_what_the_encoder_really_makes(encoder):
    model = tiny.model(encoder)
    for samples in (1600, 4801, 7999, 16000):
        features, _ = model.processor._process_audio([tiny.noise(1)[:samples]])
        audio = model.get_audio_features(**features)
        length = features[f"{model.processor.feature_name}_mask"].sum(-1)
        assert audio.last_hidden_state.shape[1] == int(encoder_output_lengths(model.encoder, length))
        assert audio.pooler_output.shape[1] == model.processor.num_audio_tokens(int(length))


@torch.no_grad()
def test_on_the_full_window_whispers_states_are_the_librarys():
    """Where transformers' own forward runs: on 30 s."""
    model = tiny.model("whisper")
    features = torch.randn(1, 80, 3000)
    audio = model.encode_audio(features)
    torch.testing.assert_close(audio.last_hidden_state, model.encoder(features).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_encoding_and_projecting_one_after_the_other_is_both_at_once():
    model = tiny.model()
    features = features_of(inputs_of(model))
    encoded = model.encode_audio(**features)
    assert encoded.pooler_output is None
    apart, together = model.project(encoded.last_hidden_state, encoded.frame_mask), model.get_audio_features(**features)
    for name, value in together.items():
        torch.testing.assert_close(getattr(apart, name), value)


def test_full_window_is_used_when_the_config_asks_for_it():
    model = tiny.model("whisper", pad_audio_to_window=True)
    inputs = inputs_of(model, seconds=(0.5,))
    assert inputs["input_features"].shape[-1] == 3000 and inputs["input_features_mask"].all()
    assert int((inputs["input_ids"] == model.config.audio_token_id).sum()) == 375


def test_too_long_audio_for_the_encoder():
    with pytest.raises(ValueError, match="1550 encoder frames.*1500 positions"):
        tiny.model().get_audio_features(torch.zeros(1, 80, 3100))


def test_audio_of_no_frame_is_too_short():
    with pytest.raises(ValueError, match="of 0 input frames is too short: the encoder makes no frame"):
        tiny.model().get_audio_features(torch.zeros(1, 80, 10), torch.zeros(1, 10))


def test_without_audio_there_is_nothing_to_encode():
    with pytest.raises(ValueError, match="Audio is missing"):
        tiny.model().get_audio_features()


@pytest.mark.parametrize("encoder", ["whisper", "wav2vec2"])
@torch.no_grad()
def test_eager_equals_sdpa(encoder, tmp_path):
    tiny.model(encoder).save_pretrained(tmp_path)
    inputs = inputs_of(tiny.model(encoder))
    eager, sdpa = (
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, attn_implementation=name)(**inputs).logits
        for name in ("eager", "sdpa")
    )
    visible = inputs["attention_mask"].bool()
    torch.testing.assert_close(eager[visible], sdpa[visible], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "encoder, dtype, distance",
    [
        ("whisper", torch.bfloat16, 0.02),
        ("whisper", torch.float16, 0.003),
        ("wav2vec2", torch.bfloat16, 0.05),
        ("wav2vec2", torch.float16, 0.02),
        ("parakeet_encoder", torch.bfloat16, 0.05),  # in float16 the library's own Parakeet gives other states
    ],
)
@torch.no_grad()
def test_logits_in_16_bits_are_near_those_in_32(encoder, dtype, distance, tmp_path):
    exact = tiny.randomise_lora(tiny.model(encoder, lora_config={"r": 2}))
    exact.save_pretrained(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    assert model.dtype == dtype
    inputs = inputs_of(exact)
    expected, found = exact(**inputs).logits, model(**inputs).logits
    assert found.dtype == dtype
    visible = inputs["attention_mask"].bool()
    difference, size = (tensor[visible].pow(2).mean().sqrt() for tensor in (found.float() - expected, expected))
    assert 0 < float(difference / size) < distance


def test_a_model_in_16_bits_transcribes(tmp_path):
    exact = tiny.model(llm="qwen3")
    exact.save_pretrained(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model.processor = exact.processor
    result = model.transcribe(tiny.noise(1), max_new_tokens=6)
    assert result.words and all(0 <= word["start"] < word["end"] <= 1 for word in result.words)


# The frame gate


@pytest.fixture
def gated():
    """A model whose gate hides some of the frames of a clip; its inputs and its encoded audio."""
    model = tiny.model(frame_gate_threshold=0.5)
    with torch.no_grad():
        model.projector.gate.weight.copy_(10 * torch.randn(model.projector.gate.weight.shape))
        inputs = inputs_of(model, seconds=(2.0,))
        audio = model.get_audio_features(**features_of(inputs))
    return model, inputs, audio


def test_the_attention_mask_hides_the_placeholders_of_hidden_frames(gated):
    model, inputs, audio = gated
    visible = model.visible_positions(inputs["input_ids"], inputs["attention_mask"], audio)
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    assert visible[is_audio].tolist() == (audio.gate_logits[0] > 0).long().tolist()
    assert visible[~is_audio].all() and 0 < int(visible[is_audio].sum()) < int(is_audio.sum())


def test_without_a_gate_the_attention_mask_is_left_alone():
    model = tiny.model()
    inputs = inputs_of(model)
    audio = model.get_audio_features(**features_of(inputs))
    assert model.visible_positions(inputs["input_ids"], inputs["attention_mask"], audio) is inputs["attention_mask"]


@torch.no_grad()
def test_hiding_frames_equals_leaving_them_out(gated):
    model, inputs, audio = gated
    keep = audio.gate_logits[0] > 0
    is_audio = inputs["input_ids"][0] == model.config.audio_token_id
    stays = torch.ones_like(is_audio)
    stays[is_audio] = keep
    short = model(
        input_ids=inputs["input_ids"][:, stays],
        audio_embeds=audio.pooler_output[:, keep],
        audio_embeds_mask=audio.audio_embeds_mask[:, keep],
    )
    torch.testing.assert_close(model(**inputs).logits[0, stays], short.logits[0], atol=1e-5, rtol=0)


def test_placeholders_must_match_the_audio():
    model = tiny.model()
    inputs = inputs_of(model, seconds=(1.0,))
    for forward in (model, model.generate):
        with pytest.raises(ValueError, match=r"hold \[12\] audio placeholders.*gives \[13\]"):
            forward(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": None})


# Loss and training


@pytest.fixture(scope="module")
def learning():
    """A model, inputs with labels, and the sum and number of the cross-entropies of its text tokens, one by one."""
    model = tiny.model()
    inputs = inputs_of(model, texts=TEXTS)
    with torch.no_grad():
        logits, labels = model(**inputs).logits.double(), inputs["labels"]
    total, count = 0.0, 0
    for row in range(2):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                total -= float(torch.log_softmax(logits[row, position - 1], -1)[labels[row, position]])
                count += 1
    return model, inputs, total, count


def test_labels_are_the_text_from_its_first_token_to_eos(learning):
    model, inputs, _, _ = learning
    for row, text in enumerate(TEXTS):
        ids = model.processor.tokenizer(text)["input_ids"]
        assert inputs["labels"][row][inputs["labels"][row] != -100].tolist() == [*ids, model.config.eos_token_id]


def test_loss_is_the_mean_cross_entropy_of_the_labels(learning):
    model, inputs, total, count = learning
    assert float(model(**inputs).loss) == pytest.approx(total / count, abs=1e-5)


def test_loss_over_accumulated_batches_is_divided_by_all_their_tokens(learning):
    model, inputs, total, _ = learning
    assert float(model(**inputs, num_items_in_batch=50).loss) == pytest.approx(total / 50, abs=1e-5)


def test_loss_of_the_last_positions_alone_is_the_same(learning):
    model, inputs, total, count = learning
    longest = int((inputs["labels"] != -100).sum(-1).max())
    output = model(**inputs, logits_to_keep=longest + 1)
    assert output.logits.shape[1] == longest + 1
    assert float(output.loss) == pytest.approx(total / count, abs=1e-5)


def timed_batch(model):
    """A batch with word times for the alignment head."""
    words = [{"word": word, "start": 0.2 * n, "end": 0.2 * n + 0.2} for n, word in enumerate(TEXTS[0].split())]
    rows = [{"audio": tiny.noise(1.0, 0), "text": TEXTS[0], "words": words}]
    return model.processor.collate([*rows, {"audio": tiny.noise(0.6, 1), "text": TEXTS[1]}])


def test_word_times_add_the_loss_of_the_alignment_head(learning):
    model, _, total, count = learning
    output = model(**timed_batch(model))
    assert float(output.alignment_loss.detach()) > 0
    assert float(output.loss) == pytest.approx(total / count + float(output.alignment_loss.detach()), abs=1e-5)


@pytest.mark.parametrize("lora_config", [{"r": 2}, None], ids=["LoRA", "whole LLM"])
def test_only_the_alignment_head_learns_from_word_times(lora_config):
    model = tiny.model(lora_config=lora_config)
    model(**timed_batch(model)).alignment_loss.backward()
    trained = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {"alignment"}


def test_a_few_steps_teach_the_alignment_head_where_words_are():
    model = tiny.model(alignment_hidden_size=32)
    batch = timed_batch(model)
    optimizer = torch.optim.Adam(model.alignment.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(**batch).alignment_loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_gradient_checkpointing_gives_the_same_gradients():
    model = tiny.randomise_lora(tiny.model(lora_config={"r": 2})).train()
    inputs = inputs_of(model, texts=TEXTS)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append(model.projector.linear_in.weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=0)


def test_a_frozen_encoder_stays_in_evaluation_mode():
    model = tiny.model("wav2vec2").train()
    assert model.projector.training and not model.encoder.training
    assert not any(parameter.requires_grad for parameter in model.encoder.parameters())


def test_an_encoder_that_is_not_frozen_trains():
    model = tiny.model("wav2vec2", freeze_audio_encoder=False).train()
    assert model.encoder.training
    model(**inputs_of(model, texts=TEXTS)).loss.backward()
    assert model.encoder.feature_projection.projection.weight.grad.abs().sum() > 0


def test_encoder_states_may_be_given_instead_of_features():
    model = tiny.model()
    inputs = inputs_of(model, texts=TEXTS)
    encoded = model.encode_audio(**features_of(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**text, audio_states=encoded.last_hidden_state, audio_states_mask=encoded.frame_mask)
    assert float(output.loss) == pytest.approx(float(model(**inputs).loss), abs=1e-6)


# A projector with copies of the encoder's last layers

COPIES = {"projector_encoder_layers": 1, "projector_readout": "token_mixture", "frame_gate_threshold": 0.3}


@torch.no_grad()
def test_copied_layers_start_as_the_encoders_and_leave_it_alone():
    model, plain = tiny.model(**COPIES), tiny.model()
    plain.encoder.load_state_dict(model.encoder.state_dict())
    model.projector.start_from(model.encoder)
    encoded = model.encode_audio(**features_of(inputs_of(model)))
    reference = plain.encode_audio(**features_of(inputs_of(model)))
    real = encoded.frame_mask.bool()
    torch.testing.assert_close(encoded.last_hidden_state, reference.last_hidden_state)
    assert not torch.allclose(encoded.projector_states[real], encoded.last_hidden_state[real], atol=0.1)
    projector = model.projector
    copied = run_last_layers(
        projector.encoder_layers,
        projector.encoder_norm,
        projector.encoder_config,
        encoded.projector_states,
        encoded.frame_mask,
    )
    torch.testing.assert_close(copied[real], encoded.last_hidden_state[real])
    finished = model.finish_encoding(encoded.projector_states, encoded.frame_mask)
    torch.testing.assert_close(finished[real], encoded.last_hidden_state[real])


def test_copied_layers_are_trained_and_the_encoders_are_not():
    model = tiny.model(**COPIES)
    inputs = inputs_of(model, texts=TEXTS)
    model(**inputs).loss.backward()
    assert model.projector.encoder_layers[0].fc1.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.encoder.parameters())


@torch.no_grad()
def test_a_projector_with_copied_layers_takes_states_computed_before(tmp_path):
    model = tiny.model(**COPIES)
    inputs = inputs_of(model, texts=TEXTS)
    encoded = model.encode_audio(**features_of(inputs))
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    output = model(**text, audio_states=encoded.projector_states, audio_states_mask=encoded.frame_mask)
    assert float(output.loss) == pytest.approx(float(model(**inputs).loss), abs=1e-6)
    model.save_pretrained(tmp_path)
    loaded = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)
    assert float(loaded(**inputs).loss) == pytest.approx(float(output.loss), abs=1e-5)


@pytest.mark.parametrize(
    "encoder, fields, found",
    [("whisper", {"projector_encoder_layers": 3}, "3, but .*whisper. has 2"), ("wav2vec2", COPIES, "1, but .* has 0")],
)
def test_only_layers_that_the_encoder_has_can_be_copied(encoder, fields, found):
    with pytest.raises(ValueError, match=found):
        tiny.config(encoder, **fields)


# Convenience


def test_a_waveform_as_first_argument_is_transcribed():
    model = tiny.model()
    result = model.generate(tiny.noise(1), max_new_tokens=4)
    assert result["text"] == model.transcribe(tiny.noise(1), max_new_tokens=4).text and "words" in result
    assert model.generate(torch.from_numpy(tiny.noise(1)), max_new_tokens=4)["text"] == result["text"]


def test_stereo_is_heard_like_mono():
    model = tiny.model()
    mono = tiny.noise(1.0)
    stereo = np.stack([mono, mono])
    assert model.transcribe(stereo, max_new_tokens=4).text == model.transcribe(mono, max_new_tokens=4).text


# What the library and torch put around a model

GATED = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.3}


@pytest.mark.parametrize("fields", [{}, {**GATED, "projector_kind": "convnext"}], ids=["plain", "gated"])
def test_forward_and_loss_compile_to_one_graph(fields):
    """With the backend that runs the captured graph as it is: whether there is one is the question."""
    model = tiny.model(llm="qwen3", **fields)
    inputs = inputs_of(model, texts=TEXTS)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    expected, found = model(**inputs), compiled(**inputs)
    torch.testing.assert_close(found.logits, expected.logits)
    found.loss.backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    expected.loss.backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, atol=1e-5, rtol=1e-4)
    assert any(name.startswith("projector") for name in gradients)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [{}, GATED], ids=["plain", "gated"])
def test_attentions_and_hidden_states_are_returned_when_asked_for(fields, implementation):
    model = tiny.model(llm="qwen3", **fields)
    model.set_attn_implementation(implementation)
    inputs = inputs_of(model)
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    length, config = inputs["input_ids"].shape[1], model.config.text_config
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    if implementation == "eager":  # the other computes none
        assert output.attentions[-1].shape == (2, config.num_attention_heads, length, length)


@pytest.mark.parametrize("lora_config", [None, {"r": 2}], ids=["plain", "LoRA of its own"])
def test_peft_on_top_trains_and_generates(lora_config):
    model = tiny.model(llm="qwen3", lora_config=lora_config, **GATED)
    inputs, prompts = inputs_of(model, texts=TEXTS), inputs_of(model)
    before = model(**inputs).loss.item()
    expected = model.generate(**prompts, max_new_tokens=4, do_sample=False)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"] if lora_config is None else "all-linear")
    )
    assert adapted(**inputs).loss.item() == pytest.approx(before, abs=1e-5)
    assert torch.equal(adapted.generate(**prompts, max_new_tokens=4, do_sample=False), expected)
    adapted(**inputs).loss.backward()
    assert any(
        "lora_B.default" in name and parameter.grad is not None for name, parameter in adapted.named_parameters()
    )
