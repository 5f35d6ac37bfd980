"""The gates against nonsense, on texts written by hand."""

import pytest

from voxlm_hf.configuration_voxlm import DEFAULT_GATES
from voxlm_hf.quality_voxlm import fired_gates, loops


def fired(text, mean_logprob=-0.2, active_s=10.0, heard=30, num_tokens=40, out_of_tokens=False, gates=DEFAULT_GATES):
    return fired_gates(text, mean_logprob, active_s, heard, num_tokens, out_of_tokens, gates)


def test_ordinary_speech_passes():
    assert fired("mister quilter is the apostle of the middle classes and we are glad to welcome his gospel") == []
    assert fired("no, no, no, no", active_s=1.5, heard=8) == []
    assert fired("yes", active_s=0.3, heard=1) == []
    assert fired("", mean_logprob=None, active_s=0.0, heard=0, num_tokens=0) == []


def test_each_sign_of_nonsense_has_its_gate():
    assert "loop" in fired("five " * 60, out_of_tokens=True)
    assert "compression_ratio" in fired("thank you very much " * 20, active_s=60)
    assert fired("a fluent guess", mean_logprob=-2.5) == ["mean_logprob"]
    assert fired("one two three four five six seven eight nine ten", active_s=0.2) == ["words_per_second"]
    assert fired("let it be", heard=3, active_s=15.0) == ["no_speech"]
    assert fired("up", mean_logprob=-3.0, heard=1, active_s=2.0) == ["mean_logprob", "no_speech"]
    assert fired("up", mean_logprob=-0.3, heard=1, active_s=2.0) == []
    assert fired("cut off", out_of_tokens=True) == ["token_budget"]
    assert fired("flour, fat and sauce", heard=28, num_tokens=6) == ["left_out"]
    assert fired("", heard=28, num_tokens=0, mean_logprob=None) == ["left_out"]
    assert fired("yes", active_s=1.5, heard=5, num_tokens=1) == []


def test_a_gate_without_a_threshold_never_fires():
    assert (
        fired("five " * 200, mean_logprob=-9.0, active_s=0.0, heard=50, num_tokens=0, out_of_tokens=True, gates={})
        == []
    )


@pytest.mark.parametrize(
    "text, times", [("a", 1), ("a b c", 1), ("a a a", 3), ("so it so it so it is", 3), ("x a b c a b c y", 2)]
)
def test_loops_are_counted(text, times):
    assert loops(text.split()) == times
