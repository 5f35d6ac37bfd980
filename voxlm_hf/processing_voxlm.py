"""VoxLMProcessor: audio and prompt to model inputs, token ids to text and words."""

import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .audio_voxlm import is_batch, one_for_each, read_audio, to_waveform


AUDIO_TOKEN, PAD_TOKEN = "<|audio|>", "<|pad|>"
NO_SPACE_SCRIPTS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def affine_lengths(length_of, limit: int) -> tuple[int, int]:
    """
    Describe a stack of strided convolutions by two integers: `length_of(n) == max(0, (n + offset) // stride)`.

    Every composition of `floor((n + a) / s) + b` has that form, so the processor needs no encoder to count frames.

    Args:
        length_of: function of a tensor of input lengths; limit: largest length to look at.

    Raises:
        ValueError: when the function has another form.
    """
    inputs = torch.arange(1, limit + 1)
    outputs = length_of(inputs).clamp(min=0)
    least = int(outputs[0])
    first = [int(torch.searchsorted(outputs, least + more)) + 1 for more in (1, 2)]
    stride = first[1] - first[0]
    offset = stride * (least + 1) - first[0]
    if stride < 1 or not torch.equal(outputs, ((inputs + offset) // max(stride, 1)).clamp(min=0)):
        raise ValueError("The encoder's number of frames is no affine function of its input length")
    return stride, offset


@dataclass
class Word:
    """A word of the decoded text and the positions of its tokens in the ids it came from."""

    text: str
    tokens: list[int]


class VoxLMProcessorKwargs(ProcessingKwargs, total=False):
    """What [`VoxLMProcessor`] asks of its parts unless the caller, or the tokenizer as it was saved, says otherwise."""

    _defaults = {
        "text_kwargs": {"padding": True},
        "audio_kwargs": {"padding": "longest", "truncation": False},
        "common_kwargs": {"return_tensors": "pt"},
    }


class VoxLMProcessor(ProcessorMixin):
    r"""
    Feature extractor and tokenizer of a VoxLM model.

    Args:
        feature_extractor: of the audio encoder, of any kind.
        tokenizer: of the LLM, with the tokens `<|audio|>` and a pad token of its own.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
        prompt (`str`), prompt_template (`str`), audio_window_s (`float`), pad_audio_to_window (`bool`):
            as in [`VoxLMConfig`].
        text_prefix (`str`): what the transcript begins with after the prompt.
        samples_per_feature (`int`): waveform samples per input feature (1 for encoders of raw audio).
        samples_per_frame (`int`): waveform samples per encoder frame.
        audio_token_stride (`int`), audio_token_offset (`int`): `(features + offset) // stride` placeholders per audio.
    """

    valid_processor_kwargs = VoxLMProcessorKwargs

    def __init__(
        self,
        feature_extractor,
        tokenizer,
        chat_template=None,
        prompt="Transcribe the audio.",
        prompt_template="{audio}\n{prompt}\n",
        text_prefix="",
        audio_window_s=30.0,
        pad_audio_to_window=False,
        samples_per_feature=160,
        samples_per_frame=320,
        audio_token_stride=8,
        audio_token_offset=7,
    ):
        self.audio_token = AUDIO_TOKEN
        self.audio_token_id = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self.prompt = prompt
        self.prompt_template = prompt_template
        self.text_prefix = text_prefix
        self.audio_window_s = audio_window_s
        self.pad_audio_to_window = pad_audio_to_window
        self.samples_per_feature = samples_per_feature
        self.samples_per_frame = samples_per_frame
        self.audio_token_stride = audio_token_stride
        self.audio_token_offset = audio_token_offset
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_base_models(cls, audio: str, text: str, **kwargs) -> "VoxLMProcessor":
        """Processor for two base models, with the tokens added that VoxLM needs: `<|audio|>`, and a pad that is not eos."""
        feature_extractor = AutoFeatureExtractor.from_pretrained(audio)
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]}, replace_extra_special_tokens=False)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        # The library's pipelines refuse a tokenizer and a feature extractor that pad on different sides.
        tokenizer.padding_side = "right"
        return cls(feature_extractor, tokenizer, **kwargs)

    def configure(self, model) -> "VoxLMProcessor":
        """Take over what the model knows: prompt, window, and the frame rates, measured on its feature extractor and encoder."""
        config = model.config
        self.prompt, self.prompt_template = config.prompt, config.prompt_template
        self.audio_window_s, self.pad_audio_to_window = config.audio_window_s, config.pad_audio_to_window
        rate = self.sampling_rate
        silence = np.zeros(2 * rate, dtype=np.float32)
        one, two = (self._extract(silence[: seconds * rate]).shape[self._time_axis] for seconds in (1, 2))
        self.samples_per_feature = rate // (two - one)
        limit = 4 * rate // self.samples_per_feature
        self.audio_token_stride, self.audio_token_offset = affine_lengths(model.audio_lengths, limit)
        self.samples_per_frame = self.audio_token_stride * self.samples_per_feature // config.projector_stride
        return self

    @property
    def sampling_rate(self) -> int:
        """Rate in Hz that the encoder works at."""
        return self.feature_extractor.sampling_rate

    @property
    def frame_s(self) -> float:
        """Seconds per encoder frame."""
        return self.samples_per_frame / self.sampling_rate

    @property
    def frames_per_token(self) -> int:
        """Encoder frames per placeholder, the projector's stride."""
        return self.audio_token_stride * self.samples_per_feature // self.samples_per_frame

    @property
    def special_ids(self) -> set[int]:
        """Ids of tokens that are control and no text."""
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    @property
    def feature_name(self) -> str:
        """`input_features` or `input_values`, whichever the encoder takes."""
        return self.feature_extractor.model_input_names[0]

    @property
    def _time_axis(self) -> int:
        # Whisper's extractor alone gives (mels, time); the others (time, features) or (samples,).
        return 1 if "Whisper" in type(self.feature_extractor).__name__ else 0

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", self.feature_name, f"{self.feature_name}_mask"]

    def load_audio(self, audio, sampling_rate: int | None = None) -> np.ndarray:
        """
        Any supported kind of audio (see `read_audio`) as a mono float32 waveform at the encoder's rate.

        Args:
            sampling_rate (`int`, *optional*): rate of bare arrays, by default the encoder's.
        """
        samples, rate = read_audio(audio, sampling_rate)
        return to_waveform(samples, self.sampling_rate if rate is None else rate, self.sampling_rate)

    def load_batch(self, audio, sampling_rate: int | None = None) -> list[np.ndarray]:
        """One recording or a list of them as a list of waveforms.

        Raises:
            ValueError: for an empty list.
        """
        items = list(audio) if is_batch(audio) else [audio]
        if not items:
            raise ValueError("No audio was given: the list is empty")
        return [self.load_audio(item, sampling_rate) for item in items]

    def _extract(self, waveform: np.ndarray) -> np.ndarray:
        """Features of one clip at its own length: padding in the extractor would change the last frames."""
        output = self.feature_extractor(
            waveform,
            sampling_rate=self.sampling_rate,
            padding="longest",
            truncation=False,
            return_attention_mask=True,
            return_tensors="np",
        )
        features = np.asarray(output[self.feature_name][0], dtype=np.float32)
        mask = output.get("attention_mask", output.get("padding_mask"))
        length = features.shape[self._time_axis]
        if mask is not None:
            length = min(length, int(np.asarray(mask[0]).sum()))
        return features[:, :length] if self._time_axis == 1 else features[:length]

    def _process_audio(self, audio: list[np.ndarray], **kwargs):
        """Waveforms to padded features with a mask, and the placeholder text of each."""
        window = round(self.audio_window_s * self.sampling_rate)
        features = []
        for waveform in audio:
            if len(waveform) > window:
                raise ValueError(
                    f"The audio is {len(waveform) / self.sampling_rate:.1f} s long, the model's window {self.audio_window_s} s; "
                    "use `model.transcribe`, which cuts long audio at quiet points"
                )
            if self.pad_audio_to_window:
                waveform = np.pad(waveform, (0, window - len(waveform)))
            # One analysis window is the least that every extractor can take.
            clip = self._extract(waveform) if len(waveform) >= 0.025 * self.sampling_rate else None
            length = 0 if clip is None else clip.shape[self._time_axis]
            if self.num_audio_tokens(length) < 1:
                missing = (self.audio_token_stride - self.audio_token_offset) * self.samples_per_feature
                shortest = max(0.025, missing / self.sampling_rate)
                raise ValueError(
                    f"The audio is {len(waveform) / self.sampling_rate:.3f} s long; at least {shortest:.3f} s are needed"
                )
            features.append(clip)
        lengths = [clip.shape[self._time_axis] for clip in features]
        padded, mask = [], torch.zeros(len(features), max(lengths), dtype=torch.long)
        for row, (clip, length) in enumerate(zip(features, lengths)):
            widths = [(0, 0)] * clip.ndim
            widths[self._time_axis] = (0, max(lengths) - length)
            padded.append(np.pad(clip, widths))
            mask[row, :length] = 1
        inputs = {self.feature_name: torch.from_numpy(np.stack(padded)), f"{self.feature_name}_mask": mask}
        return inputs, [self.audio_token * self.num_audio_tokens(length) for length in lengths]

    def check_length(self, num_samples: int):
        """Raise a `ValueError` for audio of so few samples that the encoder makes no frame of it."""
        if num_samples < self.sampling_rate:
            self._process_audio([np.zeros(num_samples, dtype=np.float32)])

    def num_audio_tokens(self, num_features: int) -> int:
        """Placeholders for an audio of `num_features` input features (or samples)."""
        return max(0, (num_features + self.audio_token_offset) // self.audio_token_stride)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if audio is not None:
            rate = kwargs.get("sampling_rate", kwargs.get("audio_kwargs", {}).get("sampling_rate"))
            audio = self.load_batch(audio, rate)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)  # a copy: placeholders are expanded in place
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and audio is not None and all(isinstance(sample, str) for sample in text):
            counts = [sample.count(self.audio_token) for sample in text]
            if len(text) != len(audio) or any(count != 1 for count in counts):
                raise ValueError(
                    f"Each text needs exactly one {self.audio_token}: got {len(text)} texts with {counts} of them and "
                    f"{len(audio)} audios"
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`): prompts with one `<|audio|>` each, which becomes one placeholder per frame.
            audio: one or many recordings, of any kind `read_audio` takes.
            sampling_rate (`int`, *optional*): of bare arrays, by default the encoder's.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` (padded on the left unless `padding_side` says otherwise) and
            `input_features` (or `input_values`) with its mask, as torch tensors unless `return_tensors` says otherwise.
        """
        if text is not None and isinstance(text, (list, tuple)) and not text:
            raise ValueError("`text` is an empty list")
        text_kwargs = dict(kwargs.pop("text_kwargs", {}))
        if "padding_side" not in kwargs:
            # No default of the class: the side the tokenizer was saved with would win over it.
            text_kwargs.setdefault("padding_side", "left")
        return super().__call__(text=text, audio=audio, text_kwargs=text_kwargs, **kwargs)

    def render_prompt(self, prompt: str | None = None) -> str:
        """
        The text of one request, with one `<|audio|>`.

        Args:
            prompt (`str`, *optional*): instruction or context for the LLM; by default the one used in training.

        Raises:
            ValueError: when the prompt holds a special token, which would be taken for control, not text.
        """
        prompt = self.prompt if prompt is None else prompt
        if not isinstance(prompt, str):
            raise ValueError(f"The prompt must be a string, got {type(prompt).__name__}")
        specials = [token for token in self.tokenizer.all_special_tokens if token in prompt]
        if specials:
            raise ValueError(
                f"The prompt holds the special token {specials[0]!r}, which would be read as control; remove it"
            )
        before, after = self.prompt_template.split("{audio}")
        return before.replace("{prompt}", prompt) + self.audio_token + after.replace("{prompt}", prompt)

    def apply_transcription_request(self, audio, prompt=None, text=None, sampling_rate=None) -> BatchFeature:
        """
        Model inputs for transcribing one or many recordings, or, with `text`, for training on them.

        Args:
            audio: one or many recordings, of any kind `read_audio` takes.
            prompt (`str` or `list`, *optional*): instruction or context for all, or one for each; `None` is the config's.
            text (`str` or `list[str]`, *optional*): the reference transcripts; adds `labels`, which are -100 on the prompt and
                the padding, and end with eos.
            sampling_rate (`int`, *optional*): of bare arrays.

        Returns:
            [`BatchFeature`] of torch tensors, padded on the left.
        """
        waveforms = self.load_batch(audio, sampling_rate)
        prompts = one_for_each(prompt, len(waveforms))
        texts = [text] if isinstance(text, str) else text
        if texts is not None and len(texts) != len(waveforms):
            raise ValueError(f"Got {len(texts)} texts for {len(waveforms)} recordings")
        rendered = [self.render_prompt(item) for item in prompts]
        if texts is None:
            return self(text=rendered, audio=waveforms)
        inputs, replacements = self._process_audio(waveforms)
        rows = [prompt.replace(self.audio_token, audio) for prompt, audio in zip(rendered, replacements)]
        return BatchFeature({**self.training_ids(rows, texts), **inputs})

    def training_ids(self, prompts: list[str], texts: list[str]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `labels`, padded on the left, from expanded prompts and reference texts."""
        prompt_ids = self.tokenizer(prompts)["input_ids"]
        text_ids = self.tokenizer([self.text_prefix + text for text in texts], add_special_tokens=False)["input_ids"]
        rows = [(prompt, text + [self.tokenizer.eos_token_id]) for prompt, text in zip(prompt_ids, text_ids)]
        longest = max(len(prompt) + len(text) for prompt, text in rows)
        output = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for prompt, text in rows:
            padding = longest - len(prompt) - len(text)
            output["input_ids"].append([self.tokenizer.pad_token_id] * padding + prompt + text)
            output["attention_mask"].append([0] * padding + [1] * (len(prompt) + len(text)))
            output["labels"].append([-100] * (padding + len(prompt)) + text)
        return {name: torch.tensor(values) for name, values in output.items()}

    def decode_text(self, token_ids) -> str:
        """The text of some token ids: no special tokens, spaces untouched."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def split_words(self, token_ids) -> list[Word]:
        """
        The words of a sequence of token ids, each with the positions of its tokens.

        Words end at white space; in scripts that write none (Chinese, Japanese, Thai, ...) they end where a token ends.
        Punctuation belongs to the word before it. Characters split over several tokens are kept whole, special tokens
        belong to no word.
        """
        special = self.special_ids
        kept = [(position, int(token)) for position, token in enumerate(token_ids) if int(token) not in special]
        ids = [token for _, token in kept]
        full = self.decode_text(ids)
        # Tokens and the end of the text they complete; a token that ends inside a character waits for the next ones.
        units, waiting, start = [], [], 0
        for count, (position, _) in enumerate(kept, 1):
            waiting.append(position)
            prefix = self.decode_text(ids[:count])
            if full.startswith(prefix) and len(prefix) > start or count == len(kept):
                end = len(full) if count == len(kept) else len(prefix)
                units.append((full[start:end], waiting))
                waiting, start = [], end
        words: list[Word] = []
        open_word = False
        for text, tokens in units:
            for piece_number, piece in enumerate(_split_keeping_spaces(text)):
                positions = tokens if piece_number == 0 else tokens[-1:]
                if piece.isspace():
                    open_word = False
                elif open_word and not _starts_new_word(words[-1].text, piece):
                    words[-1].text += piece
                    words[-1].tokens.extend(position for position in positions if position not in words[-1].tokens)
                else:
                    words.append(Word(piece, list(positions)))
                    open_word = True
        return words

    def encode_words(self, text: str, words: list[str], written: list[str]) -> tuple[list[int], np.ndarray]:
        """
        Token ids of `text` with its `words` written as `written`, as the answer to a prompt begins, and `(tokens,)` the number of
        the word that each token belongs to.

        Args:
            text (`str`): holds the words in order; what is between them stays only where it is white space.
        """
        if not words:
            return [], np.zeros(0, dtype=int)
        answer, ends, position = self.text_prefix, [], 0
        for word, new in zip(words, written):
            place = text.index(word, position)
            answer += "".join(char for char in text[position:place] if char.isspace()) + new
            ends.append(len(answer))
            position = place + len(word)
        encoded = self.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
        # A token belongs to the word in which its last character lies; one of white space alone to the word after it.
        places = np.searchsorted(ends, [max(end, 1) for _, end in encoded["offset_mapping"]])
        return encoded["input_ids"], np.minimum(places, len(words) - 1)


def plain_words(words: list[str]) -> list[str]:
    """
    Words as a model writes them that knows no capitals, punctuation and hyphens: in lower case, without punctuation and symbols at
    their ends. Words of nothing else stay as they are.
    """
    plain = []
    for word in words:
        kept = [index for index, char in enumerate(word) if unicodedata.category(char)[0] not in "PS"]
        bare = word[kept[0] : kept[-1] + 1].lower() if kept else word
        plain.append(bare.replace("-", " ").replace("’", "'") if kept else word)
    return plain


def joined_text(texts: list[str]) -> str:
    """Texts one after the other, with spaces between them except in scripts that write none."""
    whole = ""
    for text in texts:
        if whole and text and not (_writes_no_spaces(whole[-1]) and _writes_no_spaces(text[0])):
            whole += " "
        whole += text
    return whole


def _split_keeping_spaces(text: str) -> list[str]:
    """Runs of white space and runs of anything else, in order."""
    runs: list[str] = []
    for char in text:
        if runs and runs[-1][-1].isspace() == char.isspace():
            runs[-1] += char
        else:
            runs.append(char)
    return runs


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


def _starts_new_word(word: str, piece: str) -> bool:
    """Whether `piece`, which follows `word` without a space, is a word of its own: only in scripts without spaces."""
    first = piece[0]
    if _is_punctuation(first) or unicodedata.category(first).startswith("M"):
        return False
    return _writes_no_spaces(first) or _writes_no_spaces(word[-1])


def _writes_no_spaces(char: str) -> bool:
    return unicodedata.name(char, "").startswith(NO_SPACE_SCRIPTS)


__all__ = ["VoxLMProcessor"]
