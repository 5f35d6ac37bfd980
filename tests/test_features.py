"""The cache of encoder states."""

import json
import os
import socket

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from voxlm_training.augment import Augmentation
from voxlm_training.corpus import make_dataset
from voxlm_training.data import read_rows
from voxlm_training.features import FeatureCache, audio_key, encode_missing, weights_key


MIXTURE = {"projector_readout": "token_mixture", "frame_gate_threshold": 0.5, "lora_config": {"r": 2}}


@pytest.fixture(scope="module")
def model():
    return tiny.model(**MIXTURE)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Three recordings, the last of which is none."""
    folder = tmp_path_factory.mktemp("speech")
    for number in range(2):
        soundfile.write(folder / f"{number}.wav", tiny.noise(0.6 + 0.2 * number, number), tiny.RATE)
    (folder / "2.wav").write_text("no audio")
    lines = [json.dumps({"audio": f"{number}.wav", "text": "the fox", "duration": 0.8}) for number in range(3)]
    (folder / "manifest.jsonl").write_text("\n".join(lines))
    return folder / "manifest.jsonl"


def encoded(model, manifest, folder, augmentation=None):
    """The rows' keys, the cache and the report."""
    rows, report = read_rows([{"manifest": manifest}])
    cache = FeatureCache(folder, weights_key(model.encoder), 16)
    changes = [augmentation or Augmentation()] * len(rows)
    return encode_missing(model, model.processor, rows, changes, cache, report), cache, report


def test_it_holds_the_encoders_states(model, manifest, tmp_path):
    keys, cache, _ = encoded(model, manifest, tmp_path)
    features = model.processor.extract_features([model.processor.load_audio(str(manifest.parent / "1.wav"))])
    assert cache[keys[1]].shape == (40, 16) and cache.frames(keys[1]) == 40  # 0.8 s at 50 Hz
    expected = model.encode_audio(**features).last_hidden_state[0]
    torch.testing.assert_close(cache[keys[1]], expected, atol=2e-3, rtol=2e-3)


def test_what_cannot_be_read_is_reported(model, manifest, tmp_path):
    keys, _, report = encoded(model, manifest, tmp_path)
    assert keys[2] is None and "2.wav" in str(report) and None not in keys[:2]


def test_nothing_is_encoded_twice_nor_projected(model, manifest, tmp_path):
    keys, *_ = encoded(model, manifest, tmp_path)
    calls = []
    hooks = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in (("layer", model.encoder.layers[0]), ("projector", model.projector))
    ]
    assert encoded(model, manifest, tmp_path)[0] == keys and calls == []
    encoded(model, manifest, tmp_path / "other")
    assert set(calls) == {"layer"}
    for hook in hooks:
        hook.remove()


def test_another_augmentation_or_encoder_has_keys_of_its_own(model, manifest, tmp_path):
    keys, *_ = encoded(model, manifest, tmp_path)
    louder, *_ = encoded(model, manifest, tmp_path, Augmentation(gain_db=-6.0))
    other = tiny.model()
    torch.nn.init.normal_(other.encoder.conv1.weight)
    assert not {*keys[:2]} & {*louder[:2]} and not {*keys[:2]} & {*encoded(other, manifest, tmp_path)[0][:2]}


def test_cached_and_fresh_features_give_the_same_loss(model, manifest, tmp_path):
    sources = [{"manifest": manifest, "count": 2}]
    cached = make_dataset(model, sources, cache=str(tmp_path), normaliser="lower")
    fresh = make_dataset(model, sources, normaliser="lower")
    losses = [float(model(**model.processor.collate(list(data))).loss.detach()) for data in (cached, fresh)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_a_path_in_a_dict_is_named_without_decoding(tmp_path):
    """As `datasets` gives it with `Audio(decode=False)`."""
    (tmp_path / "a.wav").write_text("never decoded")
    path = str(tmp_path / "a.wav")
    assert audio_key({"bytes": None, "path": path}) == audio_key({"path": path}) == audio_key(path)
    assert audio_key({"bytes": b"content", "path": path}) != audio_key(path)


def contents(how: str, states: torch.Tensor) -> torch.Tensor:
    """What a shard has in the place of states `(frames, 16)`, in float16."""
    changed = states.clone()
    if how == "zeros":
        changed[-3:] = 0
    elif how == "nan":
        changed[1, 1] = float("nan")
    wrong = {"wide": states.repeat(1, 2), "flat": states.flatten(), "type": states.float(), "deep": states[None]}
    return wrong.get(how, changed)


@pytest.mark.parametrize("how", ["zeros", "nan", "wide", "flat", "type", "deep"])
def test_a_shard_with_wrong_contents_is_made_again(model, manifest, tmp_path, how, capsys):
    keys, *_ = encoded(model, manifest, tmp_path)
    (path,) = tmp_path.iterdir()
    whole = load_file(path)
    save_file({key: contents(how, states) if key == keys[1] else states for key, states in whole.items()}, path)
    for expected in (f"{path} is skipped, what it held is made again: {keys[1]} has", ""):
        capsys.readouterr()
        again, *_ = encoded(model, manifest, tmp_path)
        shown = capsys.readouterr().out
        assert again == keys and (expected.removesuffix(" has") in shown if expected else "skipped" not in shown)
        assert all(torch.equal(load_file(path)[key], states) for key, states in whole.items())


def test_only_unfinished_shards_of_processes_are_removed(tmp_path):
    here = socket.gethostname()
    kept = [f"{'a' * 20}.{here}.{name}.unfinished" for name in ("abc", "0", "-5", "", "²", 2**31, 10**30, os.getpid())]
    kept += [f"{'a' * 20}.elsewhere.{2**22 + 1}.unfinished", "abc.unfinished", f"{here}.unfinished"]
    for name in (*kept, f"{'b' * 20}.{here}.{2**22 + 1}.unfinished"):
        (tmp_path / name).write_bytes(b"")
    FeatureCache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
