"""VoxLMProcessor: audio and prompts to model inputs, token ids to text and words."""

import re
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, AutoTokenizer, BatchFeature
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin

from .audio_voxlm import is_batch, read_audio, to_waveform
from .checkpoint_voxlm import TOKENIZER_FILE, check_side_files, read_object
from .collator_voxlm import check_rows, word_time_targets
from .configuration_voxlm import saved_with_code
from .subwords_voxlm import encode_subwords, subword_tokenizer
from .words_voxlm import Word, decode_tokens, encode_words, split_words


# What `from_base_models` adds to a tokenizer. Converted checkpoints may have other tokens, which their processor names.
AUDIO_TOKEN, PAD_TOKEN = "<|audio|>", "<|pad|>"
# A chat template that takes a list as the content of a message goes through it or picks an item.
TAKES_LISTS = re.compile(r"""\bin\s+\w+(\.content|\[['"]content['"]\])|(\.content|\[['"]content['"]\])\s*\[""")
# What makes lists of contents strings, in front of a chat template that takes strings alone.
JOIN_CONTENT = """{%- set joined = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- if message.content is defined and message.content is not string and message.content is iterable -%}
{%- set found = namespace(parts=[]) -%}
{%- for item in message.content -%}
{%- set found.parts = found.parts + ["AUDIO_TOKEN" if item.type == "audio" else item.text] -%}
{%- endfor -%}
{%- set joined.messages = joined.messages + [dict(message, content=found.parts | join("\\n"))] -%}
{%- else -%}
{%- set joined.messages = joined.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = joined.messages -%}
"""
# One analysis window of 25 ms (Whisper, Kaldi) is the shortest input that every feature extractor accepts.
ANALYSIS_WINDOW_S = 0.025


def affine_lengths(length_of, limit: int) -> tuple[int, int]:
    """
    Describe a stack of strided convolutions by two integers: `length_of(n) == max(0, (n + offset) // stride)`.

    Every composition of `floor((n + a) / s) + b` has that form, so the processor can count frames without an encoder.

    Args:
        length_of: function of a tensor of input lengths.
        limit (`int`): largest length to check.

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
        raise ValueError("The encoder's number of frames is not an affine function of its input length")
    return stride, offset


def one_for_each(prompt: str | list | None, count: int, name: str = "prompt") -> list:
    """A prompt (or another text, `name`) for each of `count` recordings, from one for all or a list of them.

    Raises:
        ValueError: for a list of another length, and for what is neither a string nor a list.
    """
    if prompt is not None and not isinstance(prompt, (str, list, tuple)):
        raise ValueError(f"The {name} must be a string, or a list with one for each recording, got {prompt!r}")
    prompts = [prompt] * count if prompt is None or isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"Got {len(prompts)} {name}s for {count} recordings")
    return prompts


def audio_token_id(tokenizer, token: str) -> int:
    """
    The id of the token that stands for a projected frame.

    Raises:
        ValueError: for one that the tokenizer does not know as a single token, or that has another meaning already.
    """
    if not isinstance(token, str) or not token:
        raise ValueError(f"`audio_token` must be a token of the tokenizer, got {token!r}")
    token_id = tokenizer.convert_tokens_to_ids(token)
    ids = tokenizer(2 * token, add_special_tokens=False)["input_ids"]
    if token_id is None or ids != [token_id, token_id]:
        raise ValueError(
            f"The audio token {token!r} is no special token of the tokenizer, which splits two of them into the ids {ids}; add "
            "it with `add_special_tokens`, or give the one that the tokenizer has as `audio_token`"
        )
    for name in ("eos_token", "pad_token", "bos_token", "unk_token"):
        if token == getattr(tokenizer, name, None):
            raise ValueError(f"The audio token {token!r} is the tokenizer's {name} too; it needs a token of its own")
    return token_id


def context_length(config) -> int | None:
    """Most tokens that the LLM of a [`VoxLMConfig`] can see, `None` where its config does not say."""
    return getattr(config.text_config, "max_position_embeddings", None)


def check_context(context: int | None, prompt_length: int, new_tokens: int = 1):
    """
    Check that a prompt leaves room for a text in the LLM's context.

    Args:
        context (`int`, *optional*): most tokens that the LLM can see.
        prompt_length (`int`): tokens of the prompt.
        new_tokens (`int`): how many tokens have to fit behind it.

    Raises:
        ValueError: for a prompt that is too long.
    """
    if context and prompt_length + new_tokens > context:
        raise ValueError(
            f"The prompt has {prompt_length} tokens (its audio included), which leaves no room for {new_tokens} new ones in the "
            f"LLM's context of {context}; shorten the prompt or the audio"
        )


def is_text(value) -> bool:
    """Whether a value is a string or a list that begins with one (an empty list is taken for texts)."""
    return isinstance(value, str) or isinstance(value, (list, tuple)) and (not value or isinstance(value[0], str))


def check_text(text, name: str):
    """
    Raises:
        ValueError: for what is no string, or holds half a character (a lone surrogate), which no tokenizer can encode.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a string, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name} holds a lone surrogate ({half!r} at position {error.start}), which is half a character; read it as UTF-8"
        ) from error


class VoxLMProcessorKwargs(ProcessingKwargs, total=False):
    """Defaults for the feature extractor and the tokenizer, unless the caller or the saved tokenizer overrides them."""

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
        tokenizer: of the LLM, with the audio token and a pad token of its own.
        chat_template (`str`, *optional*): Jinja template for `apply_chat_template`.
        prompt (`str`), prompt_template (`str`), audio_window_s (`float`), pad_audio_to_window (`bool`):
            as in [`VoxLMConfig`].
        audio_token (`str`): the placeholder of a projected frame, a special token of the tokenizer.
        text_prefix (`str`): what the transcript begins with after the prompt.
        samples_per_feature (`int`): waveform samples per input feature (1 for encoders of raw audio).
        samples_per_frame (`int`): waveform samples per encoder frame.
        audio_token_stride (`int`), audio_token_offset (`int`): an audio of `n` input features has
            `(n + offset) // stride` placeholders.
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
        audio_token=AUDIO_TOKEN,
    ):
        self.audio_token = audio_token
        self.audio_token_id = audio_token_id(tokenizer, audio_token)
        self.prompt = prompt
        self.prompt_template = prompt_template
        self.text_prefix = text_prefix
        self.audio_window_s = audio_window_s
        self.pad_audio_to_window = pad_audio_to_window
        self.samples_per_feature = samples_per_feature
        self.samples_per_frame = samples_per_frame
        self.audio_token_stride = audio_token_stride
        self.audio_token_offset = audio_token_offset
        # Most tokens that the LLM can see, where the model is known; not saved.
        self.context_length, self.projector_merges, self._spelling = None, None, None
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        [`ProcessorMixin.from_pretrained`], which names a damaged file of a local folder.

        Raises:
            ValueError: see `checkpoint_voxlm.check_side_files`; also for a tokenizer.json that is no JSON.
        """
        folder = Path(pretrained_model_name_or_path) / (kwargs.get("subfolder") or "")
        if folder.is_dir():
            check_side_files(folder)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception:  # tokenizers raises just that
            if (folder / TOKENIZER_FILE).is_file():
                read_object(folder / TOKENIZER_FILE)
            raise

    @classmethod
    def from_base_models(cls, audio: str, text: str, **kwargs) -> "VoxLMProcessor":
        """Processor for two base models. Adds the tokens VoxLM needs: `<|audio|>`, and a pad token that is not eos."""
        feature_extractor = AutoFeatureExtractor.from_pretrained(audio)
        tokenizer = AutoTokenizer.from_pretrained(text)
        tokenizer.add_special_tokens({"additional_special_tokens": [AUDIO_TOKEN]}, replace_extra_special_tokens=False)
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
            tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        # The library's pipelines refuse a tokenizer and a feature extractor that pad on different sides.
        tokenizer.padding_side = "right"
        return cls(feature_extractor, tokenizer, **kwargs)

    def configure(self, model) -> "VoxLMProcessor":
        """Copy prompt and window from a model's config and derive the frame rates from its encoder; returns `self`."""
        config = model.config
        self.prompt, self.prompt_template = config.prompt, config.prompt_template
        self.audio_window_s, self.pad_audio_to_window = config.audio_window_s, config.pad_audio_to_window
        self.context_length, self.projector_merges = context_length(config), config.projector_merges
        rate = self.sampling_rate
        silence = np.zeros(2 * rate, dtype=np.float32)
        one, two = (self._extract(silence[: seconds * rate]).shape[self.time_axis] for seconds in (1, 2))
        self.samples_per_feature = rate // (two - one)
        limit = 4 * rate // self.samples_per_feature
        self.audio_token_stride, self.audio_token_offset = affine_lengths(model.audio_lengths, limit)
        self.samples_per_frame = self.audio_token_stride * self.samples_per_feature // config.projector_stride
        return self

    def save_pretrained(self, save_directory, *args, **kwargs):
        """[`ProcessorMixin.save_pretrained`]; the code travels along, and no file names a folder of this machine."""
        for name in ("is_local", "local_files_only", "name_or_path"):
            self.tokenizer.init_kwargs.pop(name, None)
        try:
            with saved_with_code(type(self), "AutoProcessor"):
                return super().save_pretrained(save_directory, *args, **kwargs)
        finally:  # the library leaves in the processor and its parts what it writes to the file
            for part in (self, self.feature_extractor):
                vars(part).pop("auto_map", None)

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the encoder, in Hz."""
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
        """Ids of control tokens, which are not text."""
        return {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}

    @property
    def special_tokens(self) -> list[str]:
        """Control tokens, which are not text."""
        return [*self.tokenizer.all_special_tokens, *map(str, self.tokenizer.added_tokens_decoder.values())]

    @property
    def feature_name(self) -> str:
        """`input_features` or `input_values`, whichever the encoder takes."""
        return self.feature_extractor.model_input_names[0]

    @property
    def time_axis(self) -> int:
        """Axis of time in the features of one clip: Whisper's extractor alone returns `(mels, time)`."""
        return 1 if "Whisper" in type(self.feature_extractor).__name__ else 0

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", self.feature_name, f"{self.feature_name}_mask"]

    def load_audio(self, audio, sampling_rate: int | None = None) -> np.ndarray:
        """
        Any supported kind of audio (see `read_audio`) as a mono float32 waveform `(samples,)` at the encoder's rate.

        Args:
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz, by default the encoder's.
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

    def extract_features(self, waveforms: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """
        The encoder's inputs for waveforms at its rate: features padded to the longest of them, and their mask.

        Raises:
            ValueError: for audio that is longer than the model's window, or too short for one projected frame.
        """
        return self.pad_clips(self.extract_clips(waveforms))

    def extract_clips(self, waveforms: list[np.ndarray]) -> list[np.ndarray]:
        """
        Features of each waveform at its own length, `(mels, time)` for Whisper, else `(time, features)` or `(samples,)`; errors
        as in `extract_features`.
        """
        window = round(self.audio_window_s * self.sampling_rate)
        features = []
        for waveform in waveforms:
            if len(waveform) > window:
                raise ValueError(
                    f"The audio is {len(waveform) / self.sampling_rate:.1f} s long, the model's window is "
                    f"{self.audio_window_s} s; use `model.transcribe`, which splits long audio at pauses"
                )
            if self.pad_audio_to_window:
                waveform = np.pad(waveform, (0, window - len(waveform)))
            features.append(self._extract_or_raise(waveform))
        return features

    def pad_clips(self, clips: list[np.ndarray]) -> dict[str, torch.Tensor]:
        """Clips of `extract_clips` as the encoder's inputs: padded to the longest of them, with their mask."""
        lengths = [clip.shape[self.time_axis] for clip in clips]
        padded, mask = [], torch.zeros(len(clips), max(lengths), dtype=torch.long)
        for row, (clip, length) in enumerate(zip(clips, lengths)):
            widths = [(0, 0)] * clip.ndim
            widths[self.time_axis] = (0, max(lengths) - length)
            padded.append(np.pad(clip, widths))
            mask[row, :length] = 1
        return {self.feature_name: torch.from_numpy(np.stack(padded)), f"{self.feature_name}_mask": mask}

    def unpad_features(self, features: dict[str, torch.Tensor]) -> list[np.ndarray]:
        """The clips that `pad_clips` made a batch of."""
        values = features[self.feature_name].float().cpu().numpy()
        lengths = features[f"{self.feature_name}_mask"].sum(-1).tolist()
        return [clip[:, :length] if self.time_axis == 1 else clip[:length] for clip, length in zip(values, lengths)]

    def _extract_or_raise(self, waveform: np.ndarray) -> np.ndarray:
        """`_extract`, checked to give at least one projected frame."""
        if len(waveform) >= ANALYSIS_WINDOW_S * self.sampling_rate:
            clip = self._extract(waveform)
            if self.num_audio_tokens(clip.shape[self.time_axis]) >= 1:
                return clip
        missing = (self.audio_token_stride - self.audio_token_offset) * self.samples_per_feature
        shortest = max(ANALYSIS_WINDOW_S, missing / self.sampling_rate)
        raise ValueError(
            f"The audio is {len(waveform) / self.sampling_rate:.3f} s long; at least {shortest:.3f} s are needed"
        )

    def _extract(self, waveform: np.ndarray) -> np.ndarray:
        """Features of one clip at its own length: padding inside the extractor would change the last frames."""
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
        length = features.shape[self.time_axis]
        if mask is not None:
            length = min(length, int(np.asarray(mask[0]).sum()))
        return features[:, :length] if self.time_axis == 1 else features[:length]

    def _process_audio(self, audio: list[np.ndarray], **kwargs):
        """[`ProcessorMixin`]'s hook: the encoder's inputs, and the placeholders of each audio."""
        features = self.extract_features(audio)
        return features, [self.audio_token * count for count in self.count_audio_tokens(features)]

    def check_length(self, num_samples: int):
        """Raise a `ValueError` when audio of so many samples is too short for one projected frame."""
        if num_samples < self.sampling_rate:
            self.extract_features([np.zeros(num_samples, dtype=np.float32)])

    def num_audio_tokens(self, num_features: int) -> int:
        """Number of placeholders for an audio of `num_features` input features (or samples)."""
        return max(0, (num_features + self.audio_token_offset) // self.audio_token_stride)

    def count_audio_tokens(self, features: dict[str, torch.Tensor]) -> list[int]:
        """Number of placeholders for each row of `extract_features`."""
        return [self.num_audio_tokens(length) for length in features[f"{self.feature_name}_mask"].sum(-1).tolist()]

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if audio is not None:
            rate = kwargs.get("sampling_rate", kwargs.get("audio_kwargs", {}).get("sampling_rate"))
            if is_batch(audio) and any(is_batch(item) for item in audio):
                audio = [one for item in audio for one in (item if is_batch(item) else [item])]
            audio = self.load_batch(audio, rate)
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)  # a copy: placeholders are expanded in place
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None and audio is not None and all(isinstance(sample, str) for sample in text):
            counts = [sample.count(self.audio_token) for sample in text]
            if sum(counts) != len(audio):
                raise ValueError(
                    f"Each audio needs one {self.audio_token} in the texts, in order: got {len(text)} texts with {counts} of "
                    f"them and {len(audio)} audios"
                )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def __call__(self, text=None, audio=None, **kwargs) -> BatchFeature:
        r"""
        Args:
            text (`str` or `list[str]`, *optional*): prompts. Each audio token in them stands for one recording, in order, and
                becomes one placeholder per projected frame. What is neither a string nor a list of them is the audio, as the
                first argument of Whisper's processor is.
            audio: one or many recordings, of any kind `read_audio` takes; a list for each prompt is taken as well.
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz, by default the encoder's.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` (padded on the left unless `padding_side` is given) and
            `input_features` (or `input_values`) with its mask, as torch tensors unless `return_tensors` is given; without texts,
            the features alone, for which `generate` has the trained prompt.
        """
        if audio is None and text is not None and not is_text(text):
            text, audio = None, text
        if text is not None and isinstance(text, (list, tuple)) and not text:
            raise ValueError("`text` is an empty list")
        for item in [text] if isinstance(text, str) else text if isinstance(text, (list, tuple)) else []:
            if isinstance(item, str):  # the library says what is wrong with the rest
                check_text(item, "The text")
        text_kwargs = dict(kwargs.pop("text_kwargs", {}))
        if "padding_side" not in kwargs:
            # Not a default of the class: the side that the tokenizer was saved with would override it.
            text_kwargs.setdefault("padding_side", "left")
        return super().__call__(text=text, audio=audio, text_kwargs=text_kwargs, **kwargs)

    def apply_chat_template(self, conversation, chat_template=None, **kwargs):
        """
        [`ProcessorMixin.apply_chat_template`] for any LLM's template. Where the template wants a string as the content of a
        message, items of a list of `{"type": "audio"}` (with "audio", "path" or "url" to load) and `{"type": "text", "text"}` are
        joined by newlines, with an `<|audio|>` for each audio.
        """
        template = self.tokenizer.chat_template if self.chat_template is None else self.chat_template
        if isinstance(template, dict):
            template = template.get(chat_template or "default")
        elif chat_template is not None:
            template = chat_template
        if template is not None and not TAKES_LISTS.search(template):
            template = JOIN_CONTENT.replace("AUDIO_TOKEN", self.audio_token) + template
        return super().apply_chat_template(self._with_waveforms(conversation), chat_template=template, **kwargs)

    def _with_waveforms(self, conversation):
        """A conversation, or a list of them, with the audio in it read as everywhere else in the processor."""
        if isinstance(conversation, (list, tuple)):
            return [self._with_waveforms(item) for item in conversation]
        if not isinstance(conversation, dict) or not isinstance(conversation.get("content"), (list, tuple)):
            return conversation
        content = []
        for item in conversation["content"]:
            item = {"type": "text", "text": item} if isinstance(item, str) else item
            found = [item[key] for key in ("audio", "path", "url") if item.get(key) is not None]
            web = bool(found) and isinstance(found[0], str) and found[0].startswith(("http://", "https://", "data:"))
            if item.get("type") == "audio" and found and not web:  # the library fetches what is in the web
                item = {"type": "audio", "audio": self.load_audio(found[0])}
            content.append(item)
        return {**conversation, "content": content}

    def render_prompt(self, prompt: str | None = None, context: str = "") -> str:
        """
        The text of one request, with one audio token.

        Args:
            prompt (`str`, *optional*): instruction for the LLM; by default the one used in training.
            context (`str`): what the recording is about, or the text before it; in front of the instruction.

        Raises:
            ValueError: for what is no string or longer than the LLM's context, and when the prompt contains a special token,
                which would be taken as control and not as text.
        """
        prompt = self.prompt if prompt is None else prompt
        check_text(prompt, "The prompt")
        if context:
            check_text(context, "The context")
            prompt = f"{context}\n{prompt}"
        specials = [token for token in self.special_tokens if token in prompt]
        if specials:
            raise ValueError(
                f"The {'context' if specials[0] in context else 'prompt'} contains the special token {specials[0]!r}, which the "
                "model would take as control; remove it"
            )
        if self.context_length and len(prompt) >= self.context_length:  # a token may be a character
            check_context(self.context_length, len(self.tokenizer(prompt)["input_ids"]))
        before, after = self.prompt_template.split("{audio}")
        text = before.replace("{prompt}", prompt) + self.audio_token + after.replace("{prompt}", prompt)
        if text.count(self.audio_token) != 1:
            raise ValueError(f"The request must hold {self.audio_token} once, where the audio goes, got {text!r}")
        return text

    def apply_transcription_request(self, audio, prompt=None, text=None, sampling_rate=None) -> BatchFeature:
        """
        Model inputs for transcribing one or many recordings or, with `text`, for training on them.

        Args:
            audio: one or many recordings, of any kind `read_audio` takes.
            prompt (`str` or `list`, *optional*): instruction or context for all recordings, or a list with one for
                each; `None` stands for the trained prompt.
            text (`str` or `list[str]`, *optional*): the reference transcripts. Adds `labels`, which are -100 on prompt
                and padding and end with eos.
            sampling_rate (`int`, *optional*): rate of bare arrays in Hz.

        Returns:
            [`BatchFeature`] of torch tensors, padded on the left.
        """
        waveforms = self.load_batch(audio, sampling_rate)
        prompts = [self.render_prompt(item) for item in one_for_each(prompt, len(waveforms))]
        texts = [text] if isinstance(text, str) else text
        if texts is not None and len(texts) != len(waveforms):
            raise ValueError(f"Got {len(texts)} texts for {len(waveforms)} recordings")
        features = self.extract_features(waveforms)
        counts = self.count_audio_tokens(features)
        if texts is None:
            return BatchFeature({**self.prompt_ids(prompts, counts), **features})
        return BatchFeature({**self.training_ids(prompts, counts, texts), **features})

    def prompt_ids(self, prompts: list[str], audio_tokens: list[int]) -> dict[str, torch.Tensor]:
        """
        `input_ids` and `attention_mask` of prompts, padded on the left.

        Args:
            prompts (`list[str]`): of `render_prompt`.
            audio_tokens (`list[int]`): number of placeholders of each.
        """
        padding = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
        encoded = self.tokenizer(self._expand(prompts, audio_tokens), **padding)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def training_ids(self, prompts: list[str], audio_tokens: list[int], texts: list[str]) -> dict[str, torch.Tensor]:
        """
        `input_ids`, `attention_mask` and `labels` of prompts with their answers, padded on the left.

        Args:
            prompts, audio_tokens: as in `prompt_ids`.
            texts (`list[str]`): the reference transcripts.
        """
        prompt_ids = self.tokenizer(self._expand(prompts, audio_tokens))["input_ids"]
        rows = list(zip(prompt_ids, self._answer_ids(texts)))
        longest = max(len(prompt) + len(text) for prompt, text in rows)
        output = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for prompt, text in rows:
            padding = longest - len(prompt) - len(text)
            output["input_ids"].append([self.tokenizer.pad_token_id] * padding + prompt + text)
            output["attention_mask"].append([0] * padding + [1] * (len(prompt) + len(text)))
            output["labels"].append([-100] * (padding + len(prompt)) + text)
        return {name: torch.tensor(values) for name, values in output.items()}

    def _answer_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of reference transcripts, each with its prefix and eos."""
        for text in texts:
            check_text(text, "A transcript")
        ids = self.tokenizer([self.text_prefix + text for text in texts], add_special_tokens=False)["input_ids"]
        return [row + [self.tokenizer.eos_token_id] for row in ids]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text as an answer has them, without eos; none of an empty one."""
        return self._answer_ids([text])[0][:-1] if text else []

    def answer_labels(self, texts: list[str], prompt_length: int) -> torch.Tensor:
        """
        Labels `(batch, answer)` of reference transcripts alone, padded on the right with -100.

        Args:
            texts (`list[str]`)
            prompt_length (`int`): of the prompts beside them. The labels have another length: that is what tells answers alone
                from labels at the positions of `input_ids`.
        """
        rows = [torch.tensor(row) for row in self._answer_ids(texts)]
        labels = pad_sequence(rows, batch_first=True, padding_value=-100)
        return torch.nn.functional.pad(labels, (0, int(labels.shape[1] == prompt_length)), value=-100)

    def _expand(self, prompts: list[str], audio_tokens: list[int]) -> list[str]:
        """Prompts with one placeholder per projected frame."""
        return [
            prompt.replace(self.audio_token, self.audio_token * count) for prompt, count in zip(prompts, audio_tokens)
        ]

    def collate(self, rows: list[dict], for_generation: bool = False) -> dict[str, torch.Tensor]:
        """
        Data collator for [`Trainer`] (with `remove_unused_columns=False`): rows of speech to a padded batch.

        The prompt is the trained one. [`Seq2SeqTrainer`] with `predict_with_generate` may use either form: `generate` takes the
        references out of training batches before it writes, and returns the new ids alone.

        Args:
            rows (`list[dict]`): each with "text" and one of "audio" (any kind `read_audio` takes) and "states" (encoder
                states `(frames, audio_size)`). With "words", a list of `{"word", "start", "end"}` in seconds, the
                alignment head learns too; that needs rapidfuzz.
            for_generation (`bool`): the form for evaluation: `input_ids` are the prompts alone, and `labels` the answers alone,
                padded on the right. The model's `forward` computes the same loss of it.

        Returns:
            `input_ids`, `attention_mask` and `labels` of shape `(batch, length)`, the audio as the encoder's inputs or as
            `audio_states` with their mask and, when a row has words, `token_words`, `spelling`, `spelling_words`, `word_times` and `frame_times`; see
            the model's `forward`.

        Raises:
            ValueError: without rows, for a row without text or audio, and for rows of which some have audio and some states.
        """
        check_rows(rows)
        texts = [row["text"] for row in rows]
        if "states" in rows[0]:
            states = [row["states"] for row in rows]
            masks = [torch.ones(len(item), dtype=torch.long) for item in states]
            audio = {
                "audio_states": pad_sequence(states, batch_first=True),
                "audio_states_mask": pad_sequence(masks, batch_first=True),
            }
            counts = [-(-len(item) // self.frames_per_token) for item in states]
        else:
            audio = self.extract_features([self.load_audio(row["audio"]) for row in rows])
            counts = self.count_audio_tokens(audio)
        prompts = [self.render_prompt()] * len(rows)
        if for_generation:
            batch = self.prompt_ids(prompts, counts)
            return {**batch, **audio, "labels": self.answer_labels(texts, batch["input_ids"].shape[1])}
        batch = self.training_ids(prompts, counts, texts)
        if any(row.get("words") for row in rows):
            answers = [labels[labels != -100].tolist() for labels in batch["labels"]]
            words, timed = [self.split_words(ids) for ids in answers], [row.get("words") for row in rows]
            batch |= word_time_targets(words, timed, batch["labels"], self.frame_s)
        return {**batch, **audio}

    def spell_words(self, words: list[str]) -> tuple[list[int], np.ndarray]:
        """The tokens in which a projector with `projector_merges` spells plain words, and the index of the word of each."""
        if self._spelling is None or self._spelling[0] != self.projector_merges:
            self._spelling = self.projector_merges, subword_tokenizer(self.tokenizer, self.projector_merges)
        spelt = [encode_subwords(self._spelling[1], word) for word in words]
        return [token for ids in spelt for token in ids], np.repeat(np.arange(len(words)), list(map(len, spelt)))

    def decode_text(self, token_ids) -> str:
        """The text of token ids, without special tokens and with white space as it is."""
        return decode_tokens(self.tokenizer, token_ids)

    def split_words(self, token_ids) -> list[Word]:
        """The words of token ids, each with the positions of its tokens; see `words_voxlm.split_words`."""
        return split_words(self.tokenizer, token_ids, self.special_ids)

    def encode_words(self, text: str, words: list[str], spellings: list[str]) -> tuple[list[int], np.ndarray]:
        """Token ids of an answer with its words respelt, and each token's word; see `words_voxlm.encode_words`."""
        return encode_words(self.tokenizer, text, words, spellings, self.text_prefix)


__all__ = ["VoxLMProcessor"]
