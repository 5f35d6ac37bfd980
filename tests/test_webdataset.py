"""Rows of tar archives."""

import io
import json
import tarfile

import pytest
import soundfile

from tests import tiny
from voxlm_training.data import Limits, Report, read_rows, usable_rows


def add(archive, name: str, content: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(folder, audio: str, text: str):
    """Samples a to c and d to e in two shards; b has no text, and the second shard is cut off within the audio of e."""
    for number, keys in enumerate(("abc", "de")):
        with tarfile.open(folder / f"{number}.tar", "w") as archive:
            for key in keys:
                sound = io.BytesIO()
                soundfile.write(sound, tiny.noise(0.5), tiny.RATE, format=audio.upper())
                add(archive, f"x/{key}.{audio}", sound.getvalue())
                # "more" has values of several types, as JSON may.
                values = {"text": f"Fox {key}", "more": 5 if key == "a" else "five", "speaker": key}
                content = f"Fox {key}\n" if text == "txt" else json.dumps(values)
                if key != "b":
                    add(archive, f"x/{key}.{text}", content.encode())
    content = (folder / "1.tar").read_bytes()
    (folder / "1.tar").write_bytes(content[: content.rindex(f"x/e.{audio}".encode()) + 600])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("audio, text, column", [("flac", "txt", "txt"), ("wav", "json", "json.text")])
def test_rows_of_shards_are_read_and_dealt_out(tmp_path, audio, text, column, streaming):
    write_shards(tmp_path, audio, text)
    columns = {"audio_column": audio, "text_column": column, "streaming": streaming}
    source = {"dataset": "webdataset", "data_files": str(tmp_path / "*.tar"), **columns, "cache_dir": str(tmp_path)}
    rows, report = read_rows([source], "lower")
    assert [row.text for row in rows] == ["fox a", "fox c", "fox d"] and [row.duration for row in rows] == [0.5] * 3
    assert [row.speaker for row in rows] == (["a", "c", "d"] if text == "json" else [None] * 3)
    assert len(tiny.model().processor.load_audio(rows[2].audio)) == 8000
    assert f"1 x no '{text}': {tmp_path}/0.tar: x/b" in str(report) and f"archive: {tmp_path}/1.tar" in str(report)
    for processes, shares in ((2, [["fox a", "fox c"], ["fox d"]]), (3, [["fox a", "fox d"], [], ["fox c"]])):
        dealt = [list(usable_rows(source, 0, Limits("lower"), Report(), (n, processes))) for n in range(processes)]
        assert [[row.text for row in rows] for rows in dealt] == shares
        assert len({row.place for rows in dealt for row in rows}) == 3
    with pytest.raises(ValueError, match="no column 'mp3'; they have"):
        read_rows([{**source, "audio_column": "mp3"}])
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        read_rows([{**source, "split": "test"}])


def test_a_dataset_that_cannot_be_made_is_a_value_error(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"audio": "a.wav"}\n{"audio": ')
    with pytest.raises(ValueError, match="The dataset json cannot be read"):
        read_rows([{"dataset": "json", "data_files": str(tmp_path / "bad.jsonl"), "cache_dir": str(tmp_path)}])
