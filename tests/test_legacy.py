"""Checkpoints of the original VoxLM: converted they give what the original gave; anything else in a pickle is refused."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import HANGS_AFTER_S
from voxlm_hf import VoxLMForSpeechSeq2Seq
from voxlm_hf.legacy_voxlm import dtw_frames
from voxlm_hub_export.export import export
from voxlm_hub_export.legacy import ORIGINAL_DECODING, ORIGINAL_DECODING_FILE, convert, main, read_checkpoint


LEGACY = Path(__file__).parent / "data" / "legacy"
BASES = {
    "a_qwen2": {"audio_base": str(LEGACY / "bases/whisper_a"), "text_base": str(LEGACY / "bases/qwen2_a")},
    "b_qwen25_bf16": {"audio_base": str(LEGACY / "bases/whisper_b"), "text_base": str(LEGACY / "bases/qwen25_b")},
}
CLIP = str(LEGACY / "utt0.wav")


def expected(variant):
    return load_file(LEGACY / variant / "expected.safetensors"), json.loads(
        (LEGACY / variant / "expected.json").read_text()
    )


def close(found, wanted):
    torch.testing.assert_close(found.float(), wanted.float(), atol=1e-4, rtol=0)


def outputs(model):
    """Logits of the transcription request."""
    with torch.no_grad():
        return model(**model.get_processor().apply_transcription_request(CLIP)).logits


@pytest.mark.parametrize("variant", list(BASES))
def test_every_stage_is_the_originals(variant, tmp_path):
    tensors, facts = expected(variant)
    converted = convert(LEGACY / variant / "model.pt", **BASES[variant])
    export(converted, tmp_path / "model", "lora")
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model", dtype=torch.float32)
    processor = model.get_processor()
    inputs = processor.apply_transcription_request(CLIP)
    with torch.no_grad():
        audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
        embeds = model.merge_audio(inputs["input_ids"], None, audio.pooler_output, audio.audio_embeds_mask)
        close(audio.last_hidden_state[:, ::15], tensors["encoder_output_stride15"])
        close(audio.pooler_output[:, 1:-1], tensors["audio_embeds"])
        close(embeds[:, : tensors["prompt_prefix_embeds"].shape[1]], tensors["prompt_prefix_embeds"])
        close(embeds[:, -2:], tensors["prompt_suffix_embeds"])
        close(model(**inputs).logits[:, -1], tensors["prompt_last_logits"])
        forced = processor.apply_transcription_request(CLIP, text=facts["text_ref"])
        count = len(facts["labels"])
        assert forced["labels"][0, -count:].tolist() == facts["labels"]
        output = model(**forced, output_hidden_states=True)
        close(output.logits[:, -count:], tensors["text_logits"])
        states = output.hidden_states[-1]
        scores = model.align_scores(
            model.text_states(states, states.shape[1] - count), forced["input_ids"][:, -count:], output.audio
        )
        close(scores.tokens.exp(), tensors["alignment"])


@pytest.mark.parametrize("variant", list(BASES))
def test_the_originals_decoding_is_a_config_to_choose(variant, tmp_path):
    _, facts = expected(variant)
    arguments = [str(LEGACY / variant / "model.pt"), str(tmp_path / "model")]
    bases = BASES[variant]
    assert main([*arguments, "--audio-base", bases["audio_base"], "--text-base", bases["text_base"]]) == 0
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model", dtype=torch.float32)
    options = json.loads((tmp_path / "model" / ORIGINAL_DECODING_FILE).read_text())
    assert {name: options[name] for name in ORIGINAL_DECODING if name != "do_sample"} == {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 4,
    }
    result = model.transcribe(CLIP, max_new_tokens=facts["max_new_tokens"], **ORIGINAL_DECODING)
    ids = [token for token in facts["generated_ids"] if token != model.config.eos_token_id]
    assert result.text == model.get_processor().decode_text(ids).strip()
    edges = [edge for word in result.words for edge in (word["start"], word["end"])]
    assert edges == sorted(edges) and 0 <= edges[0] and edges[-1] <= 2.0


@pytest.mark.parametrize("variant, width", [("a_qwen2", 7), ("b_qwen25_bf16", 5)])
def test_the_originals_time_warping_is_a_config_to_choose(variant, width):
    tensors, _ = expected(variant)
    frames = dtw_frames(tensors["attention"].numpy(), width)
    tokens, places = tensors["dtw_text_indices"], tensors["dtw_time_indices"]
    wanted = [[int(places[tokens == token].min()), int(places[tokens == token].max())] for token in tokens.unique()]
    assert frames.tolist() == wanted

    model = convert(LEGACY / variant / "model.pt", **BASES[variant])
    frame_s = model.processor.frame_s * model.config.projector_stride
    corrected = model.align(CLIP, "the red boat").words
    model.config.alignment_median_width = width
    words = model.align(CLIP, "the red boat").words
    edges = [edge for word in words for edge in (word["start"], word["end"])]
    assert edges[0] == 0 and edges == sorted(edges) and words != corrected
    assert all(abs(edge / frame_s - round(edge / frame_s)) < 1e-6 for edge in edges)


def saved(tmp_path, change, config=None):
    """Fixture a with its content changed, saved as torch does."""
    fields, state = read_checkpoint(LEGACY / "a_qwen2" / "model.pt")
    state = {name: tensor.clone() for name, tensor in state.items()}
    state = change(state) or state
    path = tmp_path / "changed.pt"
    torch.save({"config": {**fields, **(config or {})}, "model_state_dict": state}, path)
    return path


def without(*prefixes):
    return lambda state: {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def test_layouts_without_decoder_or_alias(tmp_path):
    whole = outputs(convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"]))
    for prefixes in (("audio_encoder.whisper.decoder.",), ("audio_encoder.encoder.",), ("audio_encoder.whisper.",)):
        path = saved(tmp_path, without(*prefixes))
        torch.testing.assert_close(outputs(convert(path, **BASES["a_qwen2"])), whole, atol=0, rtol=0)


def test_build_hfs_safetensors(tmp_path):
    fields, state = read_checkpoint(LEGACY / "a_qwen2" / "model.pt")
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="config.json"):
        convert(tmp_path / "model.safetensors", **BASES["a_qwen2"])
    fields["whisper_model"] = fields.pop("audio_encoder")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    whole = convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"])
    torch.testing.assert_close(outputs(convert(tmp_path / "model.safetensors", **BASES["a_qwen2"])), outputs(whole))


def test_without_lora(tmp_path):
    """LoRA folded in by hand, as a checkpoint that was trained without it looks."""

    def fold(state):
        plain = {}
        for name, tensor in state.items():
            if ".lora_" in name:
                continue
            if ".base_layer.weight" in name:
                lora = name.replace("base_layer.weight", "lora_{}.default.weight")
                tensor = tensor + 8 / 4 * state[lora.format("B")] @ state[lora.format("A")]
            plain[name.replace("llm.base_model.model.", "llm.").replace(".base_layer.", ".")] = tensor
        return plain

    converted = convert(saved(tmp_path, fold, {"use_lora": False}), **BASES["a_qwen2"])
    assert converted.config.lora_config is None
    whole = convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"])
    close(outputs(converted), outputs(whole))


def test_no_downsampling(tmp_path):
    """A stride of 1 has no convolution; the frames are then the Linear layers' own."""
    path = saved(tmp_path, without("audio_projection.downsample."), {"downsample_factor": 1})
    model = convert(path, **BASES["a_qwen2"])
    inputs = model.processor.apply_transcription_request(CLIP)
    with torch.no_grad():
        audio = model.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
        projector = model.projector
        frames = projector.linear_out(torch.nn.functional.gelu(projector.linear_in(audio.last_hidden_state)))
    assert audio.pooler_output.shape[1] == 1502
    torch.testing.assert_close(audio.pooler_output[:, 1:-1], frames)
    assert model.transcribe(CLIP, max_new_tokens=4).duration == 2.0


def untied(state):
    state["llm.base_model.model.lm_head.weight"] = state["llm.base_model.model.lm_head.weight"] + 1


def test_an_untied_head_stays_untied(tmp_path):
    model = convert(saved(tmp_path, untied), **BASES["a_qwen2"])
    assert not model.config.tie_word_embeddings
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    torch.testing.assert_close(head, embeddings + 1)


CONVERT_AND_WATCH = """
import sys, threading, time
from pathlib import Path
from voxlm_hub_export.legacy import main

def held_kb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        most.append(held_kb())
        time.sleep(0.01)

small, large, audio, narrow, wide, output = sys.argv[1:]
bases = ["--audio-base", audio, "--text-base"]
assert main([small, output + "/small", *bases, narrow]) == 0
before, most = held_kb(), []
threading.Thread(target=watch, daemon=True).start()
assert main([large, output + "/large", *bases, wide]) == 0
print(max(most) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_the_file_until_they_are_written(tmp_path):
    """Memory that is no mapped file, while a checkpoint with a wide LLM is converted: far less than the checkpoint."""
    shutil.copytree(LEGACY / "bases/qwen2_a", tmp_path / "text")
    file, width = tmp_path / "text" / "config.json", 100_000
    file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": width}))

    def wide(state):
        for name in [name for name in state if ".mlp." in name]:
            rows, columns = state[name].shape
            shape = (rows, width) if "down_proj" in name else (width, columns)
            state[name] = torch.full(shape, 0.01)

    path = saved(tmp_path, wide)
    audio, narrow = BASES["a_qwen2"].values()
    arguments = [LEGACY / "a_qwen2" / "model.pt", path, audio, narrow, tmp_path / "text", tmp_path]
    run = subprocess.run(
        [sys.executable, "-c", CONVERT_AND_WATCH, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER_S,
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    assert path.stat().st_size > 150e6
    assert int(run.stdout.split()[-1]) * 1024 < path.stat().st_size / 2
    assert sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors")) > 150e6


def test_parts_keep_their_own_dtype(tmp_path):
    """As CUDA training wrote it: the LLM in bfloat16, the rest in float32; all of it is loaded in float32, and exact."""

    def mixed(state):
        return {k: t.bfloat16() if k.startswith("llm.") and ".lora_" not in k else t for k, t in state.items()}

    model = convert(saved(tmp_path, mixed), **BASES["a_qwen2"])
    assert model.projector.start.dtype == torch.float32 and model.get_input_embeddings().weight.dtype == torch.bfloat16
    export(model, tmp_path / "model", "lora")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.float()), name


def test_a_tokenizer_without_pad_gets_one_that_is_no_new_row(tmp_path):
    """As Llama 3's; the checkpoint then has three added rows."""
    shutil.copytree(LEGACY / "bases/qwen2_a", tmp_path / "text")
    file = tmp_path / "text" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))

    def three_rows(state):
        rows = [row for row in range(407) if row != 403]  # without <|pad|>
        for name in ("embed_tokens", "lm_head"):
            key = next(key for key in state if name in key and key.startswith("llm."))
            state[key] = state[key][rows]

    bases = {**BASES["a_qwen2"], "text_base": str(tmp_path / "text")}
    model = convert(saved(tmp_path, three_rows), **bases)
    tokenizer = model.processor.tokenizer
    assert len(tokenizer) == 406 == model.get_input_embeddings().num_embeddings
    assert tokenizer.pad_token == "<|/audio|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    whole = outputs(convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"]))
    kept = [row for row in range(407) if row != 403]
    close(outputs(model), whole[..., kept])
    assert len(model.transcribe([CLIP, CLIP], max_new_tokens=3)) == 2


def test_a_tokenizer_that_begins_texts_with_bos(tmp_path):
    """As Llama 3's: bos opens the prompt, as in the original, and nothing else; expected logits are put together by hand."""
    shutil.copytree(LEGACY / "bases/qwen2_a", tmp_path / "text")
    for name, change in {
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>"},
        "tokenizer.json": {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [401], "tokens": ["<|im_start|>"]}},
            }
        },
    }.items():
        file = tmp_path / "text" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    path = LEGACY / "a_qwen2" / "model.pt"
    model = convert(path, **{**BASES["a_qwen2"], "text_base": str(tmp_path / "text")})
    inputs = model.processor.apply_transcription_request(CLIP)
    plain = convert(path, **BASES["a_qwen2"])
    without_bos = plain.processor.apply_transcription_request(CLIP)
    assert inputs["input_ids"].tolist() == [[401, *without_bos["input_ids"][0].tolist()]]
    with torch.no_grad():
        audio = plain.get_audio_features(inputs["input_features"], inputs["input_features_mask"])
        embeds = plain.merge_audio(without_bos["input_ids"], None, audio.pooler_output, audio.audio_embeds_mask)
        bos = plain.get_input_embeddings()(torch.tensor([[401]]))
        wanted = plain.language_model(inputs_embeds=torch.cat([bos, embeds], dim=1)).logits
    close(outputs(model), wanted)

    facts = expected("a_qwen2")[1]
    forced = model.processor.apply_transcription_request(CLIP, text=facts["text_ref"])
    assert [label for label in forced["labels"][0].tolist() if label != -100] == facts["labels"]
    assert [word["word"] for word in model.align(CLIP, "the red boat").words] == ["the", "red", "boat"]
    export(model, tmp_path / "model")
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    assert again.transcribe(CLIP, max_new_tokens=5) == model.transcribe(CLIP, max_new_tokens=5)


def with_tokens(state_rows=None, **names):
    """A change of fixture a's config and of the rows of its embeddings."""

    def change(state):
        if state_rows is not None:
            for name in ("embed_tokens", "lm_head"):
                key = next(key for key in state if name in key and key.startswith("llm."))
                state[key] = state[key][state_rows]

    return change, names


@pytest.mark.parametrize(
    "token",
    [
        "<|aud|>",
        "<|声音|>",
        "<audio here>",
        "[AUDIO]",
        "plain",
        "a.*b",
        "{prompt}x",
        "{audio}",
    ],
)
def test_another_audio_token_is_the_processors(token, tmp_path):
    """Converted, exported and loaded again, the model says what it says with the usual token."""
    path = saved(tmp_path, lambda state: None, {"audio_start_token": token})
    usual = convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"])
    vocabulary = usual.processor.tokenizer.get_vocab()
    if token in vocabulary:  # then the original added one row less
        keep = [row for row in range(407) if row != vocabulary["<|audio|>"]]
        path = saved(tmp_path, with_tokens(keep)[0], {"audio_start_token": token})
    export(convert(path, **BASES["a_qwen2"]), tmp_path / "model", "lora")
    saved_config = json.loads((tmp_path / "model" / "processor_config.json").read_text())
    assert saved_config["audio_token"] == token
    model = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "model")
    processor = model.get_processor()
    assert processor.audio_token == token and token in processor.tokenizer.all_special_tokens
    inputs, wanted = (made.get_processor().apply_transcription_request(CLIP) for made in (model, usual))
    ids, usual_ids = inputs["input_ids"], wanted["input_ids"]
    assert (ids == model.config.audio_token_id).sum() == (usual_ids == usual.config.audio_token_id).sum() == 377
    if token not in vocabulary:  # no id has moved
        close(outputs(model), outputs(usual))
    assert len(processor(text=processor.render_prompt(), audio=CLIP)["input_ids"][0]) == ids.shape[1]
    assert model.transcribe(CLIP, max_new_tokens=5).text == usual.transcribe(CLIP, max_new_tokens=5).text
    assert processor.collate([{"audio": CLIP, "text": "the red boat"}])["input_ids"].shape[1] > ids.shape[1]


@pytest.mark.parametrize(
    "names, message",
    [
        ({"audio_start_token": ""}, "audio_start_token of its config is ''"),
        ({"audio_start_token": 3}, "audio_start_token of its config is 3"),
        ({"audio_start_token": ["<|audio|>"]}, "audio_start_token of its config is"),
        ({"audio_start_token": "<|/audio|>"}, "of its config must differ"),
        ({"audio_start_token": " the"}, "the token ' the' of its config is a part of the prompt"),
        ({"transcribe_token": "<|audio|>"}, "of its config must differ"),
        ({"audio_start_token": "<|pad|>"}, "another base|is the tokenizer's pad_token too|tokens after adding"),
        ({"audio_start_token": "<|endoftext|>"}, "another base|is the tokenizer's eos_token too"),
    ],
)
def test_tokens_that_cannot_be_placeholders_are_refused(names, message, tmp_path):
    refused(saved(tmp_path, lambda state: None, names), message)


def test_the_eos_token_is_no_placeholder_however_many_rows_there_are(tmp_path):
    eos = convert(LEGACY / "a_qwen2" / "model.pt", **BASES["a_qwen2"]).processor.tokenizer.eos_token
    change, names = with_tokens(list(range(406)), audio_start_token=eos)
    refused(saved(tmp_path, change, names), "is the tokenizer's eos_token too")


HUGE = 2**40
GROWN = {
    "stride 0": lambda weight: weight[:1, :1].expand(HUGE, weight.shape[1]),
    "one row": lambda weight: weight[:1].expand(HUGE, -1),
    "one number": lambda weight: weight.flatten()[:1].expand(HUGE),
    "overlapping": lambda weight: weight.flatten().unfold(0, weight.numel() - 50, 1),
    "as_strided": lambda weight: weight.as_strided((10**6, 10**6), (0, 0), 3),
}


@pytest.mark.parametrize("change", GROWN.values(), ids=GROWN)
def test_views_that_grow_when_they_are_written_are_refused(change, tmp_path):
    name = "audio_projection.projection.0.weight"
    path = saved(tmp_path, lambda state: state.update({name: change(state[name])}))
    assert path.stat().st_size < 10**7
    refused(path, f"{name} claims .* bytes, the file holds")


def test_layers_that_are_not_there_are_refused(tmp_path):
    layers = {"alignment_num_layers": 9_999}
    refused(saved(tmp_path, without("alignment_module.layers."), layers), "alignment_num_layers of its config is 9999")


class Evil:
    def __reduce__(self):
        return (exec, ("open('/tmp/voxlm-was-here', 'w').close()",))


def refused(path, message):
    with pytest.raises(ValueError, match=message):
        convert(path, **BASES["a_qwen2"])


def test_code_in_a_pickle_is_not_run(tmp_path):
    marker = Path("/tmp/voxlm-was-here")
    marker.unlink(missing_ok=True)
    torch.save({"config": Evil(), "model_state_dict": {}}, tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt", "refused, and nothing of it was run")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    refused(tmp_path / "plain.pt", "no whole file of torch.save")
    assert not marker.exists()


def test_broken_and_foreign_files(tmp_path):
    whole = (LEGACY / "a_qwen2" / "model.pt").read_bytes()
    for name, content in {"cut.pt": whole[: len(whole) // 2], "empty.pt": b"", "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "no whole file of torch.save")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    refused(tmp_path / "bomb.pt", "does not compress")
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "no 'config' and 'model_state_dict'")
    torch.save({"config": {}, "model_state_dict": {"a": 3}}, tmp_path / "number.pt")
    refused(tmp_path / "number.pt", "a is no tensor but int")


def test_checkpoints_that_do_not_fit(tmp_path):
    refused(saved(tmp_path, lambda state: {**state, "timestamp_head.weight": torch.zeros(1)}), "version 1")
    refused(saved(tmp_path, without("audio_start_embed")), "1 tensors are missing .projector.start")
    refused(
        saved(tmp_path, lambda state: {**state, "llm.extra": torch.zeros(1)}), "1 are left over .language_model.extra"
    )

    def other(state):
        state["audio_encoder.encoder.conv1.bias"] += 1

    refused(saved(tmp_path, other), "should be one tensor, but differ")
    with pytest.raises(ValueError, match="another base|the bases give|does not fit its bases"):
        convert(LEGACY / "a_qwen2" / "model.pt", **BASES["b_qwen25_bf16"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"downsample_factor": "4"}, "downsample_factor of its config is '4'"),
        ({"lora_r": -1}, "lora_r of its config is -1"),
        ({"max_audio_length": float("nan")}, "max_audio_length of its config is nan"),
        ({"audio_start_token": None}, "audio_start_token of its config is None"),
        ({"alignment_num_heads": 7}, "must divide the LLM's width"),
        (lambda weight: weight * float("nan"), "projection.0.weight has values that are not finite"),
        (lambda weight: weight.index_fill(0, torch.tensor([3]), float("inf")), "has values that are not finite"),
        (lambda weight: weight.int(), "projection.0.weight is a torch.int32 tensor"),
        (lambda weight: weight.to_sparse(), "projection.0.weight is a torch.float32 tensor on cpu, torch.sparse_coo"),
        (lambda weight: weight.to("meta"), "projection.0.weight is a torch.float32 tensor on meta"),
        (lambda weight: weight.to(torch.complex64), "projection.0.weight is a torch.complex64 tensor"),
        (lambda weight: [1.0], "projection.0.weight is no tensor but list"),
    ],
)
def test_fields_and_weights_that_mean_nothing(tmp_path, capsys, change, message):
    def changed(state):
        name = "audio_projection.projection.0.weight"
        return {**state, name: change(state[name])} if callable(change) else state

    path = saved(tmp_path, changed, None if callable(change) else change)
    bases = BASES["a_qwen2"]
    arguments = [
        str(path),
        str(tmp_path / "out"),
        "--audio-base",
        bases["audio_base"],
        "--text-base",
        bases["text_base"],
    ]
    assert main(arguments) == 1 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [{"config": None}, {"config": 3}, {"model_state_dict": [1]}, {"model_state_dict": {5: 1}}]
)
def test_values_without_names(tmp_path, content):
    torch.save({"config": {}, "model_state_dict": {}, **content}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="where values under their names belong"):
        read_checkpoint(tmp_path / "odd.pt")


def test_a_command_says_what_is_wrong(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    command = [sys.executable, "-m", "voxlm_hub_export.legacy", str(tmp_path / "text.pt"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("voxlm-convert-legacy: ")
    assert not (tmp_path / "out").exists()
