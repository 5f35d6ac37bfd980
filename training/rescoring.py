"""
Tune how much reader, LLM and frames count in rescoring (`voxlm_hf.rescoring_voxlm`), on speech kept out of training: a stage
of kind "rescoring".

All hypotheses of some recordings are scored once. The weights that choose the texts with the fewest word errors are then
searched for among these numbers, without the model.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from scipy.ndimage import uniform_filter
from tqdm import tqdm

from voxlm_hf.app.files import write_atomically
from voxlm_hf.decoding_voxlm import encode, pack_prompt, token_budgets
from voxlm_hf.processing_voxlm import context_length
from voxlm_hf.request_voxlm import make_requests
from voxlm_hf.rescoring_voxlm import judge, propose, weights_of
from voxlm_hf.segmentation_voxlm import AudioSegment

from .data import READ_ERRORS, Row, SpeechDataset, print_skipped
from .evaluate import score_texts
from .features import audio_key, weights_key


# What is tried, in all combinations. Chosen by hand, with the best of the shipped model far from the ends.
GRID = {
    "llm_weight": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0),
    "ctc_weight": (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0),
    # No more, or texts that say something twice would win.
    "word_bonus": (-0.5, 0.0, 0.25, 0.5, 0.75, 1.0),
}
# The other settings that may change without training the reader again.
CHANGEABLE = {*GRID, "num_beams", "distinct_words", "llm_prompt", "plain_text"}
# A few errors more or less say little, so each combination counts with its neighbours: so many values of each weight.
NEIGHBOURS = 3
# Recordings that are scored together, whose scores an interrupted run loses at most. Chosen by hand, not tuned.
RECORDINGS_AT_ONCE = 8


@dataclass
class ScoredList:
    """
    The hypotheses of one recording.

    Args:
        errors (`np.ndarray` of shape `(texts,)`): word errors of each text.
        evidence (`np.ndarray` of shape `(texts, 5)`): of `rescoring_voxlm.evidence`.
    """

    errors: np.ndarray
    evidence: np.ndarray


def tune_stage(
    model,
    dev: SpeechDataset | None,
    folder: Path,
    seed: int,
    recordings: int = 300,
    settings: dict | None = None,
    use_cpu: bool = False,
):
    """
    Set the weights in `config.reader_config` to those with the fewest word errors on recordings of `data.dev`; if `folder` has
    them from an earlier run, to those.

    Args:
        recordings (`int`): how many to draw.
        settings (`dict`, *optional*): of `config.reader_config`, to be set before.
        use_cpu (`bool`): leave an accelerator alone, as in [`TrainingArguments`].

    Raises:
        ValueError: for a model without a reader, settings that mean nothing, and without recordings to tune on.
    """
    if model.reader is None:
        raise ValueError("there is no reader whose texts could be rescored; a stage of kind reader adds one")
    if dev is None:
        raise ValueError("the weights are tuned on `data.dev`: add recordings of speakers that are not in `data.train`")
    change_settings(model, settings or {})
    result = folder / "reader_config.json"
    if result.exists():
        change_settings(model, json.loads(result.read_text()))
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = dev.draw(recordings, seed, model.config.chunk_length_s or model.config.audio_window_s)
    lists, words = score_lists(model.to("cpu" if use_cpu else PartialState().device).eval(), rows, folder)
    found, report = search(lists, words, model.config.reader_config, scores_all_tokens(model.config))
    PartialState().wait_for_everyone()  # nobody may find a result before all have looked
    if PartialState().is_main_process:
        print(report)
        write_atomically(folder / "rescoring.md", report.encode())
        write_atomically(result, json.dumps({**(settings or {}), **found}, indent=1).encode())
    change_settings(model, found)
    PartialState().wait_for_everyone()


def change_settings(model, settings: dict):
    """Set fields of `config.reader_config` and of the reader; a `ValueError` names one that means nothing."""
    before = model.config.reader_config
    model.config.reader_config = {**before, **settings}
    try:
        model.config.validate()
        fixed = [name for name in settings if name not in CHANGEABLE and settings[name] != before.get(name)]
        if fixed:
            raise ValueError(f"settings: {fixed[0]} is part of the trained reader; {sorted(CHANGEABLE)} can be changed")
    except ValueError:
        model.config.reader_config = before
        raise
    model.reader.num_beams = model.config.reader_config["num_beams"]


def scores_all_tokens(config) -> bool:
    """Whether the projector's frames can score any of the LLM's tokens."""
    scores_all = not config.projector_vocab_size or config.projector_merges is not None
    return config.projector_readout == "token_mixture" and scores_all


@torch.no_grad()
def score_rows(model, rows: list[Row]) -> list[tuple[list[str], np.ndarray]]:
    """The texts and the evidence for them of recordings of at most the model's window, as `transcribe` would have them."""
    processor = model.processor
    segments = [AudioSegment(processor.load_audio(row.audio), processor.sampling_rate) for row in rows]
    batch = encode(model, processor, segments, make_requests(model, processor, len(rows)))
    budgets = token_budgets(batch, None, context_length(model.config))
    hypotheses = propose(model, processor, budgets, batch, look_twice=True, in_window=False)
    judged = judge(model, pack_prompt(model, batch), batch, hypotheses, with_ctc=scores_all_tokens(model.config))
    return [([text.decoded.text for text in texts], known) for texts, known in zip(hypotheses, judged)]


def score_lists(model, rows: list[Row], folder: Path) -> tuple[list[ScoredList], int]:
    """
    Score the hypotheses of recordings; several processes share the work. What `folder` has of an earlier run of the same model
    is kept. Recordings that cannot be read are left out, with a line that names them.

    Returns:
        the lists, and the number of words that were said.

    Raises:
        ValueError: when no recording is left.
    """
    processes, readable = PartialState(), {}
    scorer = f"{weights_key(model)}-{settings_key(model.config.reader_config)}"
    for row in rows:
        try:
            model.processor.load_audio(row.audio)
            readable[f"{scorer}-{audio_key(row.audio)}"] = row
        except READ_ERRORS as error:
            print_skipped(row, error)
    if not readable:
        raise ValueError("no recording of `data.dev` can be read")
    done = read_scores(folder)
    mine = [key for key in list(readable)[processes.process_index :: processes.num_processes] if key not in done]
    mine.sort(key=lambda key: readable[key].duration or 0)
    hidden = not mine or not processes.is_local_main_process
    blocks = range(0, len(mine), RECORDINGS_AT_ONCE)
    with (folder / f"scores.{processes.process_index}.jsonl").open("a") as file:
        for first in tqdm(blocks, desc="hypotheses", unit=f"{RECORDINGS_AT_ONCE} clips", disable=hidden):
            keys = mine[first : first + RECORDINGS_AT_ONCE]
            for key, (texts, known) in zip(keys, score_rows(model, [readable[key] for key in keys])):
                file.write(f"\n{json.dumps({'key': key, 'texts': texts, 'evidence': known.tolist()})}")
            file.flush()
    processes.wait_for_everyone()
    done = read_scores(folder)
    return with_errors([(row.text, *done[key]) for key, row in readable.items()])


def settings_key(settings: dict) -> str:
    """A name for all settings of a reader but the weights."""
    others = {name: value for name, value in sorted(settings.items()) if name not in GRID}
    return hashlib.sha1(json.dumps(others).encode()).hexdigest()[:8]


def read_scores(folder: Path) -> dict[str, tuple[list[str], np.ndarray]]:
    """The texts and the evidence for them by key, from all files of `score_lists`; a line that was cut off is left out."""
    found = {}
    for path in sorted(folder.glob("scores.*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                item = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[item["key"]] = (item["texts"], np.array(item["evidence"]))
    return found


def with_errors(scored: list[tuple[str, list[str], np.ndarray]]) -> tuple[list[ScoredList], int]:
    """Count the word errors of all texts, after Whisper's normaliser; references come first in each of `scored`."""
    pairs = [(reference, text) for reference, texts, _ in scored for text in texts]
    counts = np.array(score_texts(*map(list, zip(*pairs)))["utterance_errors"])
    ends = np.cumsum([len(texts) for _, texts, _ in scored])
    errors = np.split(counts[:, 0], ends[:-1])
    return [ScoredList(*parts) for parts in zip(errors, (known for _, _, known in scored))], int(
        counts[ends - 1, 1].sum()
    )


def count_errors(lists: list[ScoredList], weights: np.ndarray) -> np.ndarray:
    """Word errors `(combinations,)` of the texts that each row of `weights` `(combinations, 5)` chooses."""
    totals = np.zeros(len(weights), dtype=int)
    for scored in lists:
        totals += scored.errors[(scored.evidence @ weights.T).argmax(0)]
    return totals


def search(lists: list[ScoredList], words: int, settings: dict, with_ctc: bool) -> tuple[dict[str, float], str]:
    """
    Try all combinations of the `GRID`.

    Args:
        words (`int`): how many were said.
        settings (`dict`): `config.reader_config` as it is.
        with_ctc (`bool`): whether the frames may count.

    Returns:
        the weights of the combination with the fewest errors, its neighbours counted in; and a table of what was found.
    """
    grid = {**GRID, "ctc_weight": GRID["ctc_weight"] if with_ctc else (0.0,)}
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    weights = np.array([weights_of({**settings, **combination}) for combination in combinations])
    errors = count_errors(lists, weights)
    shape = [len(values) for values in grid.values()]
    smooth = uniform_filter(errors.reshape(shape).astype(float), NEIGHBOURS, mode="nearest").ravel()

    def best(*off: str) -> int:
        """The number of the best combination in which some weights are 0."""
        allowed = [number for number, one in enumerate(combinations) if not any(one[name] for name in off)]
        return min(allowed, key=lambda number: (smooth[number], errors[number]))

    rows = [
        ("reader", best(*grid)),
        ("reader and LLM", best("ctc_weight")),
        ("reader and frames", best("llm_weight")),
        ("all", best()),
    ]
    before = int(count_errors(lists, weights_of(settings)[None])[0])
    lines = ["| who chooses | llm_weight | ctc_weight | word_bonus | word errors | WER |", "|---|---|---|---|---|---|"]
    lines += [table_row(name, combinations[number], errors[number], words) for name, number in rows]
    lines += [
        table_row("as it was", settings, before, words),
        table_row("the best text of each list", {}, sum(scored.errors.min() for scored in lists), words),
    ]
    return combinations[best()], "\n".join([*lines, "", f"{len(lists)} recordings, {words:,} words.", ""])


def table_row(name: str, weights: dict, errors: int, words: int) -> str:
    """One row of the report's table."""
    shown = " | ".join(str(weights.get(key, "")) for key in GRID)
    return f"| {name} | {shown} | {errors} | {100 * errors / words:.2f} % |"
