"""Packed weights and 8 bits: the same model, or nearly, in less time."""

import pytest
import torch

from tests import tiny
from tests.tiny import READER_START, encoder_states, with_reader
from voxlm_hf.cpu_voxlm import PackedLinear
from voxlm_hf.decoding_voxlm import DecodedText
from voxlm_hf.rescoring_voxlm import Hypothesis, score_hypotheses


ARITHMETICS = ["pack_weights", "quantize_dynamic"]


def models(arithmetic: str, **config):
    """A tiny model in another arithmetic, and one as it was."""
    model, exact = tiny.model(llm="qwen3", lora_config={}, **config), tiny.model(llm="qwen3", lora_config={}, **config)
    for each in (model, exact):
        torch.manual_seed(3)
        for name, parameter in each.named_parameters():
            if "lora_B" in name:  # zero at first: folding it would change nothing
                torch.nn.init.normal_(parameter, std=0.05)
    return getattr(model, arithmetic)(), exact


@torch.no_grad()
@pytest.mark.parametrize("arithmetic, least, most", [("pack_weights", 0, 1e-5), ("quantize_dynamic", 1e-9, 0.02)])
def test_logits_are_the_same_or_close(arithmetic, least, most):
    model, exact = models(arithmetic)
    inputs = exact.processor.apply_transcription_request([tiny.noise(1.0), tiny.noise(0.6)])
    one, other = (each(**inputs).logits.softmax(-1) for each in (model, exact))
    assert least <= float((one - other).abs().max()) < most
    assert model.transcribe(tiny.noise(1.0), max_new_tokens=4).words


@torch.no_grad()
@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (8, 7), (9, 7), (2, 64, 7), (3, 43, 7), (5, 100, 7), (0, 7)])
def test_any_number_of_rows(shape):
    torch.manual_seed(0)
    linear, inputs = torch.nn.Linear(7, 11), torch.randn(shape)
    torch.testing.assert_close(PackedLinear(linear)(inputs), linear(inputs))
    if len(shape) == 1:
        return
    transposed = inputs.transpose(0, -2)  # as attention hands them over
    torch.testing.assert_close(PackedLinear(linear)(transposed), linear(transposed))


@torch.no_grad()
@pytest.mark.parametrize("arithmetic, least, most", [("pack_weights", 0, 1e-5), ("quantize_dynamic", 1e-9, 0.05)])
def test_the_readers_scores_are_the_same_or_close(arithmetic, least, most):
    exact, model = with_reader(), getattr(with_reader(), arithmetic)()
    (states, mask), ids = encoder_states(9, 5), torch.tensor([[READER_START, 4, 9, 7], [READER_START, 5, 5, 6]])
    one, other = (each.reader.teacher_force(states, mask, ids).softmax(-1) for each in (model, exact))
    assert least <= float((one - other).abs().max()) < most
    assert model.transcribe(tiny.noise(1.0)).duration == 1.0
    if arithmetic == "quantize_dynamic":
        assert model.reader.head.weight().dtype == torch.qint8


@torch.no_grad()
@pytest.mark.parametrize("arithmetic, most", [("pack_weights", 1e-4), ("quantize_dynamic", 0.1)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_lora_stays_beside_a_base_that_judges_without_it(arithmetic, most, use_dora):
    """The LLM alone has LoRA, the judge of the reader's texts has not, in every arithmetic."""
    exact, model = (
        tiny.randomise_lora(with_reader(lora_config={"use_dora": use_dora}, llm_prompt="none")) for _ in range(2)
    )
    getattr(model, arithmetic)()
    inputs = exact.processor.apply_transcription_request([tiny.noise(1.0)])
    alone, judged = [], []
    for each in (exact, model):
        text = Hypothesis(DecodedText([5, 9, 11], True), torch.ones(3, dtype=torch.bool), [], 0.0)
        score_hypotheses(each, None, [[text]])
        judged.append(text.decoded.logprobs)
        alone.append(each(**inputs).logits.log_softmax(-1))
    torch.testing.assert_close(*judged, atol=most, rtol=0)
    torch.testing.assert_close(*alone, atol=most, rtol=0)


def test_packed_transcriptions_are_the_same():
    model, exact = models("pack_weights")
    clips = [tiny.noise(seconds, 4) for seconds in (0.7, 1.5)]
    one, other = (each.transcribe(clips, max_new_tokens=6) for each in (model, exact))
    assert [result.text for result in one] == [result.text for result in other]
    words = [result.words for result in one]
    assert any(words)
    for ours, theirs in zip(words, (result.words for result in other)):
        assert [word["confidence"] for word in ours] == pytest.approx([word["confidence"] for word in theirs], abs=1e-3)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_such_models_are_neither_saved_nor_changed_again(arithmetic, tmp_path):
    model = getattr(tiny.model(llm="qwen3", lora_config={}), arithmetic)()
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    for another in ARITHMETICS:
        with pytest.raises(ValueError, match="already"):
            getattr(model, another)()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_only_float32_on_the_cpu(arithmetic):
    with pytest.raises(ValueError, match="float32 models on the CPU"):
        getattr(tiny.model().to(torch.bfloat16), arithmetic)()


def test_torch_without_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no oneDNN"):
        tiny.model().pack_weights()
    assert tiny.model().quantize_dynamic().transcribe(tiny.noise(1.0), max_new_tokens=2).duration == 1.0
