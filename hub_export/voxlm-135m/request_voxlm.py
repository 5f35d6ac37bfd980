"""Requests: what the caller of `transcribe` says about each recording: prompt, context, hotwords, language."""

from dataclasses import dataclass, field

from transformers.utils import logging

from .biasing_voxlm import Hotwords, ReaderVocabulary, most_like
from .language_voxlm import language_code, language_prompt
from .processing_voxlm import VoxLMProcessor, check_text, one_for_each


logger = logging.get_logger(__name__)

# What `transcribe` takes for the language of the checkpoint, since `None` stands for detection.
OWN_LANGUAGE = "default"
# Characters at the end of a context that are used: more than the half of Whisper's window can hold, and a few hundred tokens of
# an LLM.
CONTEXT_CHARACTERS = 1000
# Most hotwords that are sought in one segment; of a longer list, those that are spelt most like what is heard without any. Wrong
# ones among them take the places of right ones. Chosen by hand.
MOST_SOUGHT = 40
# More hotwords than this for one recording are refused, and longer ones (characters): they are texts, and belong into `context`.
MOST_HOTWORDS, LONGEST_HOTWORD = 2000, 100


@dataclass
class Request:
    """
    What is asked for one recording.

    Args:
        prompt (`str`): of `VoxLMProcessor.render_prompt`, with the context.
        context (`str`): text before, names, subject; empty for none.
        context_ids (`list[int]`): the same and a line break as the LLM's tokens.
        language (`str`, *optional*): code of the language; `None` while it has to be detected, and without a reader.
        language_probability (`float`, *optional*): of the language, where it was detected.
        own_language (`bool`): whether it is the language that LLM and projector were trained on.
        hotwords (`list[str]`)
        vocabulary ([`ReaderVocabulary`], *optional*): of the reader, where there is a context or hotwords.
    """

    prompt: str = ""
    context: str = ""
    context_ids: list[int] = field(default_factory=list)
    language: str | None = None
    language_probability: float | None = None
    own_language: bool = True
    hotwords: list[str] = field(default_factory=list)
    vocabulary: ReaderVocabulary | None = None

    def reader_prompt(self, settings: dict, room: int, hotwords: list[str] | None = None) -> list[int]:
        """
        What the reader's decoder starts from: as many whole hotwords as fit into half of the room, the end of the context, and the
        language.

        Args:
            settings (`dict`): `config.reader_config`.
            room (`int`): most tokens for hotwords and context.
            hotwords (`list[str]`, *optional*)
        """
        start = language_prompt(settings, self.language)
        if not hotwords and not self.context:
            return start
        glossary: list[int] = []
        for word in hotwords or []:
            ids = self.vocabulary.encode((", " if glossary else " ") + word)
            if len(glossary) + len(ids) > room // 2:
                break
            glossary += ids
        if glossary:  # which ends, or the decoder goes on with the list
            glossary += self.vocabulary.encode(".")
        text = self.vocabulary.encode(" " + self.context)[-(room - len(glossary)) :] if self.context else []
        return [settings["previous_id"], *glossary, *text, *start]

    def hotword_search(self, settings: dict, room: int, heard: list[int]) -> tuple[Hotwords, list[int]]:
        """
        The hotwords that are sought in a segment, and what the search for them starts from.

        Args:
            settings (`dict`), room (`int`): see `reader_prompt`.
            heard (`list[int]`): the text that the reader finds without hotwords.
        """
        words = most_like(self.hotwords, self.vocabulary.decode(heard), MOST_SOUGHT)
        return Hotwords(words, self.vocabulary), self.reader_prompt(settings, room, words)

    def set_language(self, code: str, settings: dict, probability: float | None = None):
        """Set the language, in place; `settings` as above."""
        self.language, self.language_probability = code, probability
        self.own_language = code == settings["language"]

    def judging(self, settings: dict) -> dict:
        """The settings with the weights that LLM and projector have in this language; `settings` as above."""
        if self.own_language:
            return settings
        return {**settings, "llm_weight": settings["llm_weights"].get(self.language, 0.0), "ctc_weight": 0.0}

    @property
    def spoken(self) -> dict:
        """The language and its probability as results have them."""
        probability = self.language_probability
        rounded = None if probability is None else round(probability, 4)
        return {"language": self.language, "language_probability": rounded}


def make_requests(
    model,
    processor: VoxLMProcessor,
    count: int,
    prompt=None,
    context=None,
    hotwords=None,
    language=OWN_LANGUAGE,
    use_reader: bool = True,
) -> list[Request]:
    """
    The requests for `count` recordings; one request object for each.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        prompt, context, hotwords, language, use_reader: see `transcribe`.

    Raises:
        ValueError: for what cannot be used, and for what only a reader can do where there is none or the LLM writes alone.
    """
    prompts, contexts = one_for_each(prompt, count), one_for_each(context, count, "context")
    languages = [language] * count if not isinstance(language, (list, tuple)) else list(language)
    if len(languages) != count:
        raise ValueError(f"Got {len(languages)} languages for {count} recordings")
    lists = hotwords_for_each(hotwords, count)
    for_reader = any(lists) or not all(is_own_language(model, item) for item in languages)
    if for_reader and (model.reader is None or not use_reader):
        without = "this model does not have" if model.reader is None else "`use_reader=False` turns off"
        raise ValueError(
            f"`hotwords` and `language` are for the reader, which {without}: the LLM alone writes the language it was trained on"
        )
    return [request_for(model, processor, *row) for row in zip(prompts, contexts, lists, languages)]


def is_own_language(model, language) -> bool:
    """Whether what the caller says of the language is, by default or by name, the one that the LLM was trained on."""
    if language is None or language == OWN_LANGUAGE or model.reader is None:
        return language == OWN_LANGUAGE
    settings = model.config.reader_config
    return language_code(language, settings) == settings["language"]


def request_for(
    model, processor: VoxLMProcessor, prompt=None, context=None, hotwords: list[str] = (), language=OWN_LANGUAGE
) -> Request:
    """The request for one recording, see `make_requests`."""
    context = "" if context is None else checked_text(context, "The context")
    if len(context) > CONTEXT_CHARACTERS:
        logger.warning_once(f"A context has {len(context)} characters; the last {CONTEXT_CHARACTERS} are used")
        context = context[-CONTEXT_CHARACTERS:]
    rendered = processor.render_prompt(prompt, context)
    context_ids = processor.tokenizer(f"{context}\n", add_special_tokens=False)["input_ids"] if context else []
    request = Request(rendered, context, context_ids, hotwords=list(hotwords))
    if model.reader is None:
        return request
    settings = model.config.reader_config
    if language == OWN_LANGUAGE or language is None and not settings["languages"]:
        language = settings["language"]
    if language is not None:
        request.set_language(language_code(language, settings), settings)
    if context or hotwords:
        if settings["previous_id"] is None:
            raise ValueError(
                "`reader_config['previous_id']` is missing, the token in front of context and hotwords; add the reader anew"
            )
        request.vocabulary = model.reader.vocabulary(processor.tokenizer)
    return request


def check_search(model, requests: list[Request], searching: dict):
    """
    Check that what is asked of the reader does not meet options with which it cannot search.

    Args:
        model ([`VoxLMForSpeechSeq2Seq`])
        searching (`dict`): of `decoding_voxlm.search_options`.

    Raises:
        ValueError: for hotwords and other languages with such options.
    """
    reading = any(request.hotwords or request.language is None or not request.own_language for request in requests)
    if searching and reading and model.reader is not None:
        raise ValueError(
            f"`hotwords` and `language` are for the reader, which cannot search with {', '.join(sorted(searching))}"
        )


def checked_text(text, name: str) -> str:
    """A text with single spaces for its white space.

    Raises:
        ValueError: for what is no string, or no text.
    """
    check_text(text, name)
    return " ".join(text.split())


def hotwords_for_each(hotwords, count: int) -> list[list[str]]:
    """
    The hotwords of each of `count` recordings, from one list for all or a list with a list (or `None`) for each.

    Raises:
        ValueError: for what is no list, has another length, or holds what is no word.
    """
    if hotwords is None:
        return [[]] * count
    if isinstance(hotwords, (str, bytes, dict)) or not isinstance(hotwords, (list, tuple, set)):
        raise ValueError(f"`hotwords` must be a list of words or terms, got {hotwords!r:.100}")
    if not any(item is None or isinstance(item, (list, tuple, set)) for item in hotwords):
        return [checked_hotwords(hotwords)] * count
    if len(hotwords) != count:
        raise ValueError(f"Got {len(hotwords)} lists of hotwords for {count} recordings")
    return [checked_hotwords(item or []) for item in hotwords]


def checked_hotwords(words) -> list[str]:
    """Hotwords without doubles and with single spaces for white space.

    Raises:
        ValueError: for an item that is no string, empty or longer than a term, and for too many of them.
    """
    if not isinstance(words, (list, tuple, set)):
        raise ValueError(f"Each recording's `hotwords` must be a list of words or terms, got {words!r:.100}")
    checked = list(
        dict.fromkeys(checked_text(word, f"Hotword {place}").replace("’", "'") for place, word in enumerate(words))
    )
    if "" in checked:
        raise ValueError("A hotword is empty; leave it out")
    longest = max(map(len, checked), default=0)
    if longest > LONGEST_HOTWORD:
        raise ValueError(
            f"A hotword has {longest} characters, more than {LONGEST_HOTWORD}; texts about the recording belong into `context`"
        )
    if len(checked) > MOST_HOTWORDS:
        raise ValueError(
            f"Got {len(checked)} hotwords for one recording, more than {MOST_HOTWORDS}; leave out the common ones"
        )
    return checked
