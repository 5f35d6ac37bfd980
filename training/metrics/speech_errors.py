"""Error rates of transcripts as a module of the `evaluate` library: `evaluate.load("training/metrics/speech_errors.py")`."""

import datasets
import evaluate

from voxlm_training.evaluate import score_texts


class SpeechErrors(evaluate.Metric):
    """Pooled word and character error rates after Whisper's English normaliser; see `score_texts` in voxlm_training.evaluate."""

    def _info(self):
        texts = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="",
            inputs_description="predictions and references: lists of texts",
            features=datasets.Features({"predictions": texts, "references": texts}),
        )

    def _compute(self, predictions, references):
        scores = score_texts(references, predictions)
        return {name: value for name, value in scores.items() if name != "utterance_errors"}
