"""The model over many encoders and LLMs: forward, loss, generate, save and load, batches, padding, LoRA."""

import numpy as np
import pytest
import torch

from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.modeling_voxlm import encoder_output_lengths


PAIRS = [(encoder, "qwen2") for encoder in tiny.ENCODERS] + [("whisper", llm) for llm in tiny.LLMS if llm != "qwen2"]
TEXTS = ["the quick brown fox", "he hoped"]


def randomise_lora(model):
    """LoRA starts as the identity; give it weights that matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def inputs_of(model, seconds=(1.0, 0.6), texts=None):
    audio = [tiny.noise(length, seed) for seed, length in enumerate(seconds)]
    return model.processor.apply_transcription_request(audio, text=texts)


@pytest.mark.parametrize("encoder, llm", PAIRS)
def test_forward_backward_generate_save_load(encoder, llm, tmp_path):
    model = randomise_lora(tiny.model(encoder, llm, lora_config={"r": 2}))
    inputs = inputs_of(model, texts=TEXTS)
    output = model(**inputs)
    assert output.logits.shape == (*inputs["input_ids"].shape, tiny.VOCAB_SIZE)
    output.loss.backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert any("lora_A" in name for name in trained) and any(name.startswith("projector") for name in trained)
    assert not any(name.startswith("encoder") or ".base_layer." in name for name in trained)

    prompt = inputs_of(model)
    ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert ids.shape[1] <= prompt["input_ids"].shape[1] + 4
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert not loaded.language_model.get_input_embeddings().weight.requires_grad
    loaded.save_pretrained(tmp_path / "again")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "again")
    assert all(
        torch.equal(first, second) for first, second in zip(again.state_dict().values(), model.state_dict().values())
    )


@pytest.mark.parametrize("encoder, llm", PAIRS)
@torch.no_grad()
def test_logits_are_those_of_the_llm_on_merged_embeddings(encoder, llm):
    model = tiny.model(encoder, llm)
    inputs = inputs_of(model, seconds=(0.8,))
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    features = {name: value for name, value in inputs.items() if name.startswith("input_") and name != "input_ids"}
    audio = model.get_audio_features(**features)
    embeddings[inputs["input_ids"] == model.config.audio_token_id] = audio.pooler_output[0]
    expected = model.language_model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", tiny.ENCODERS)
@pytest.mark.parametrize("kind, readout", [("mlp", "linear"), ("convnext", "token_mixture")])
@torch.no_grad()
def test_batch_equals_single_with_padding_on_either_side(encoder, kind, readout):
    model = tiny.model(encoder, "qwen3", projector_kind=kind, projector_readout=readout, frame_gate_threshold=0.5)
    processor = model.processor
    audio = [tiny.noise(seconds, seed) for seed, seconds in enumerate((0.53, 1.217, 0.9))]
    prompt = processor.render_prompt()
    for side in ("left", "right"):
        batch = processor(text=[prompt] * 3, audio=audio, padding_side=side)
        logits = model(**batch).logits
        for row, clip in enumerate(audio):
            single = model(**processor(text=prompt, audio=clip)).logits[0]
            torch.testing.assert_close(logits[row][batch["attention_mask"][row].bool()], single, atol=1e-4, rtol=0)
    together = model.transcribe(audio, max_new_tokens=6)
    alone = [model.transcribe(clip, max_new_tokens=6) for clip in audio]
    assert [result.text for result in together] == [result.text for result in alone]
    assert any(result.text for result in together)


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


def test_bare_audio_gives_what_the_library_encoder_gives_on_the_full_window():
    """The own drive through Whisper's layers against transformers' forward, where that one runs: on 30 s."""
    model = tiny.model("whisper")
    features = torch.randn(1, 80, 3000)
    audio = model.get_audio_features(features)
    torch.testing.assert_close(audio.last_hidden_state, model.encoder(features).last_hidden_state, atol=1e-5, rtol=0)


def test_full_window_is_used_when_the_config_asks_for_it():
    model = tiny.model("whisper", pad_audio_to_window=True)
    inputs = inputs_of(model, seconds=(0.5,))
    assert inputs["input_features"].shape[-1] == 3000 and inputs["input_features_mask"].all()
    assert int((inputs["input_ids"] == model.config.audio_token_id).sum()) == 375


def test_gated_frames_do_not_exist_for_the_llm():
    """Hiding frames by the mask equals leaving their placeholders and embeddings out."""
    model = tiny.model(frame_gate_threshold=0.5)
    with torch.no_grad():
        model.projector.gate.weight.copy_(10 * torch.randn(model.projector.gate.weight.shape))
    inputs = inputs_of(model, seconds=(2.0,))
    audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
    keep = audio.speech_logits[0] > 0
    assert 0 < int(keep.sum()) < len(keep)
    is_audio = inputs["input_ids"][0] == model.config.audio_token_id
    stays = torch.ones_like(is_audio)
    stays[is_audio] = keep
    with torch.no_grad():
        short = model(
            input_ids=inputs["input_ids"][:, stays],
            audio_embeds=audio.pooler_output[:, keep],
            audio_embeds_mask=audio.audio_embeds_mask[:, keep],
        )
        torch.testing.assert_close(model(**inputs).logits[0, stays], short.logits[0], atol=1e-5, rtol=0)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, cache_implementation="static")
        same = model.generate(**inputs, max_new_tokens=5, do_sample=False, use_cache=False)
    assert ids.tolist() == same.tolist()


def test_token_mixture_of_hand_made_frames():
    """Three tokens with orthogonal embeddings: a sure frame gives its token, a torn one the mean, a repeat is hidden."""
    projector = tiny.model(projector_readout="token_mixture", frame_gate_threshold=0.5).projector
    tokens = torch.eye(3)
    frames = torch.tensor([[[100.0, 0, 0], [100.0, 0, 0], [0, 100.0, 0], [0, 50.0, 50.0], [0, 100.0, 0]]])
    speech = torch.tensor([[1.0, 1.0, -1.0, 1.0, 1.0]])
    mixtures, logits, read = projector.mix_tokens(frames, speech, tokens)
    expected = torch.tensor([[[1.0, 0, 0], [1.0, 0, 0], [0, 0, 0], [0, 0.5, 0.5], [0, 1.0, 0]]])
    torch.testing.assert_close(mixtures, expected)
    assert projector.keep(logits)[0, :4].tolist() == [True, False, False, True]
    assert read[0, :4].tolist() == [0, -1, -1, 1]


def test_loss_is_cross_entropy_of_the_text_from_its_first_token_to_eos():
    model = tiny.model()
    inputs = inputs_of(model, texts=TEXTS)
    logits, labels = model(**inputs).logits.double(), inputs["labels"]
    expected, count = 0.0, 0
    for row in range(2):
        for position in range(1, labels.shape[1]):
            if labels[row, position] != -100:
                expected -= torch.log_softmax(logits[row, position - 1], -1)[labels[row, position]]
                count += 1
    assert float(model(**inputs).loss) == pytest.approx(float(expected / count), abs=1e-5)
    assert float(model(**inputs, num_items_in_batch=50).loss) == pytest.approx(float(expected / 50), abs=1e-5)
    texts = [model.processor.tokenizer(text)["input_ids"] for text in TEXTS]
    for row, ids in enumerate(texts):
        assert labels[row][labels[row] != -100].tolist() == [*ids, model.config.eos_token_id]
    short = model(**inputs, logits_to_keep=max(map(len, texts)) + 2)
    assert float(short.loss) == pytest.approx(float(expected / count), abs=1e-5)


def test_generation_strategies_and_outputs():
    model = tiny.model()
    inputs = inputs_of(model)
    length = inputs["input_ids"].shape[1]
    greedy = model.generate(
        **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert torch.equal(greedy.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(greedy.sequences[:, length], greedy.logits[0].argmax(-1))
    torch.manual_seed(0)
    assert model.generate(**inputs, max_new_tokens=5, do_sample=True).shape[0] == 2
    beams = model.generate(**inputs, max_new_tokens=5, num_beams=3, num_return_sequences=2, do_sample=False)
    assert beams.shape[0] == 4
    single = [model.generate(**inputs_of(model, (s,)), max_new_tokens=5, do_sample=False) for s in (1.0,)]
    assert greedy.sequences[0].tolist()[: single[0].shape[1]] == single[0][0].tolist()


def test_the_placeholder_is_never_generated():
    model = tiny.model(llm="llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().weight[model.config.audio_token_id] = model.language_model.model.norm.weight
    inputs = inputs_of(model)
    for use_cache in (True, False):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        assert not (ids[:, inputs["input_ids"].shape[1] :] == model.config.audio_token_id).any()


def test_a_waveform_as_first_argument_is_transcribed():
    model = tiny.model()
    result = model.generate(tiny.noise(1), max_new_tokens=4)
    assert result["text"] == model.transcribe(tiny.noise(1), max_new_tokens=4).text and "words" in result
    assert model.generate(torch.from_numpy(tiny.noise(1)), max_new_tokens=4)["text"] == result["text"]


@pytest.mark.parametrize("llm", ["qwen2", "llama"])
def test_plain_base_weights_load_into_a_lora_model(llm, tmp_path):
    plain = tiny.model(llm=llm)
    plain.save_pretrained(tmp_path)
    lora_config = tiny.model(llm=llm, lora_config={"r": 2}).config
    model, info = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, config=lora_config, output_loading_info=True)
    assert info["missing_keys"] and all(".lora_" in key for key in info["missing_keys"])
    inputs = inputs_of(plain)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=1e-6, rtol=0)


def test_lora_can_be_asked_for_when_loading(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    model, info = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, lora_config={"r": 2}, output_loading_info=True)
    assert model.config.lora_config["r"] == 2
    assert info["missing_keys"] and all(".lora_" in key for key in info["missing_keys"])


def test_missing_weights_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["projector.linear_in.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="projector.linear_in.weight"):
        VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("encoder", ["whisper", "wav2vec2", "parakeet_encoder"])
def test_half_precision(encoder, dtype, tmp_path):
    tiny.model(encoder, lora_config={"r": 2}).save_pretrained(tmp_path)
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, dtype=dtype, device_map="auto")
    model.processor = tiny.model(encoder).processor
    assert model.dtype == dtype
    inputs = inputs_of(model)
    assert model(**inputs).logits.dtype == dtype
    assert isinstance(model.transcribe(tiny.noise(1), max_new_tokens=3).text, str)


def test_dtype_can_be_given_as_text_too(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    for options in ({"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": "float32"}):
        assert VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, **options).dtype == torch.float32


@pytest.mark.parametrize("encoder", ["whisper", "wav2vec2"])
def test_eager_equals_sdpa(encoder, tmp_path):
    tiny.model(encoder).save_pretrained(tmp_path)
    inputs = inputs_of(tiny.model(encoder))
    with torch.no_grad():
        logits = [
            VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path, attn_implementation=name)(**inputs).logits[
                inputs["attention_mask"].bool()
            ]
            for name in ("eager", "sdpa")
        ]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = randomise_lora(tiny.model(lora_config={"r": 2})).train()
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
    unfrozen = tiny.model("wav2vec2", freeze_audio_encoder=False).train()
    assert unfrozen.encoder.training


def test_placeholders_must_match_the_audio():
    model = tiny.model()
    inputs = inputs_of(model, seconds=(1.0,))
    for forward in (model, model.generate):
        with pytest.raises(ValueError, match=r"hold \[12\] audio placeholders.*gives \[13\]"):
            forward(**{**inputs, "input_ids": inputs["input_ids"][:, 1:], "attention_mask": None})


def test_too_long_audio_for_the_encoder():
    with pytest.raises(ValueError, match="1550 encoder frames.*1500 positions"):
        tiny.model().get_audio_features(torch.zeros(1, 80, 3100))


def test_peft_is_asked_for_by_name(monkeypatch):
    from voxlm_hf import modeling_voxlm

    monkeypatch.setattr(modeling_voxlm, "is_peft_available", lambda: False)
    with pytest.raises(ImportError, match="pip install peft"):
        tiny.model(lora_config={})


def test_from_base_models(tmp_path):
    base = tiny.save_bases(tmp_path, "llama")
    model = VoxLMForSpeechSeq2Seq.from_base_models(
        audio=str(tmp_path / "audio"), text=str(tmp_path / "text"), prompt="Write down what you hear:"
    )
    tokenizer = model.processor.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id == model.generation_config.pad_token_id
    assert model.get_input_embeddings().num_embeddings == max(300, len(tokenizer))
    assert model.config.audio_token_id == tokenizer.convert_tokens_to_ids("<|audio|>")
    assert "Write down what you hear:" in model.processor.render_prompt()
    weights = {name.replace(".base_layer.", "."): value for name, value in model.language_model.state_dict().items()}
    for name, value in base.state_dict().items():
        assert torch.equal(weights[name][: len(value)], value), name
    result = model.transcribe(tiny.noise(1.0), max_new_tokens=3)
    model.save_pretrained(tmp_path / "made")
    model.processor.save_pretrained(tmp_path / "made")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "made")
    assert again.transcribe(tiny.noise(1.0), max_new_tokens=3).text == result.text


def test_from_base_models_needs_both_and_knows_its_presets():
    with pytest.raises(ValueError, match="Both base models"):
        VoxLMForSpeechSeq2Seq.from_base_models(audio="x")
    with pytest.raises(ValueError, match="voxlm-2b"):
        VoxLMForSpeechSeq2Seq.from_base_models(preset="voxlm-3b")


def test_stereo_and_rates_reach_the_model_alike():
    model = tiny.model()
    mono = tiny.noise(1.0)
    stereo = np.stack([mono, mono])
    assert model.transcribe(stereo, max_new_tokens=4).text == model.transcribe(mono, max_new_tokens=4).text
