"""The export script, on tiny models."""

import pytest
import torch

from hub_export.export import export
from tests import tiny
from voxlm_hf import VoxLMForSpeechSeq2Seq


DRAFTING = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.5, "projector_vocab_size": 40}


@pytest.mark.parametrize("int8", [False, True])
def test_a_better_checkpoint_changes_one_file(tmp_path, int8):
    model = tiny.model(lora_config={"r": 2}, **DRAFTING)
    export(model, tmp_path / "first", int8)
    better = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        better.projector.linear_in.weight += 1
    better.set_projector_vocabulary(range(5, 60))
    export(better, tmp_path / "second", int8, frozen_from=tmp_path / "first")
    export(better, tmp_path / "first", int8, frozen_from=tmp_path / "first")
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    again = VoxLMForSpeechSeq2Seq.from_pretrained(tmp_path / "second")
    assert again.projector.token_ids.tolist() == list(range(5, 60)) and again.config.projector_vocab_size == 55
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, better.state_dict()[name], rtol=1e-2, atol=1e-2)
        if ".base_layer." in name or name.startswith("encoder."):
            torch.testing.assert_close(tensor, better.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_shards_of_another_model_are_not_taken(tmp_path):
    export(tiny.model(), tmp_path / "first", int8=False)
    other = tiny.model()
    with torch.no_grad():
        other.encoder.conv1.weight += 1
    with pytest.raises(ValueError, match="encoder.conv1.weight differs"):
        export(other, tmp_path / "second", int8=False, frozen_from=tmp_path / "first")
