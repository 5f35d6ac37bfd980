"""Gates against nonsense: which signs of a text that nobody said a result shows."""

import zlib


# Length in words of the longest phrase that is looked for in loops, and how often in a row it may come.
LOOP_WORDS, LOOP_TIMES = 8, 8
# Shorter texts than this (bytes) say nothing by their compression; shorter activity than this (seconds) is a word or two.
COMPRESSION_FROM, NO_SPEECH_FROM_S = 100, 5.0
# Fewer frames than this that carry a token are a word or two, which may be one token.
LEFT_OUT_FROM = 8


def fired_gates(
    text: str,
    mean_logprob: float | None,
    active_s: float,
    heard: float | None,
    num_tokens: int,
    out_of_tokens: bool,
    gates: dict[str, float],
) -> list[str]:
    """
    The names of the gates that a text does not pass.

    - "token_budget": the budget, which follows the audio generously, ended the text.
    - "loop": a phrase of up to 8 words comes more than 8 times in a row *and* the text compresses too well or is too fast;
      people do say "no, no, no, no".
    - "compression_ratio", "mean_logprob": as Whisper has them (Radford et al. 2022), bytes by compressed bytes and the mean
      log-probability of the tokens.
    - "words_per_second": more words than anybody says in the time in which the voice activity detector heard something.
    - "no_speech": less than `heard_per_second` frames for each second that is active carry a token, and five seconds or more are
      active or the text fires "mean_logprob" too: music or noise.

    Args:
        text (`str`): without white space at its ends.
        mean_logprob (`float`, *optional*): of its tokens, raw, in nats.
        active_s (`float`): seconds in which voice activity was found.
        heard (`float`, *optional*): number of frames that carry a token, for models with a frame gate.
        num_tokens (`int`): of the text.
        out_of_tokens (`bool`): whether the budget ended the text.
        gates (`dict`): thresholds, `config.quality_gates`; a gate that is not named there never fires, and without
            any none does.
    """
    fired = ["token_budget"] if out_of_tokens and gates else []
    words, size = text.split(), len(text.encode())
    if heard is not None and heard >= LEFT_OUT_FROM and num_tokens < gates.get("tokens_per_frame", 0) * heard:
        fired.append("left_out")
    if not words:
        return fired
    if size >= COMPRESSION_FROM and size / len(zlib.compress(text.encode())) > gates.get("compression_ratio", 1e9):
        fired.append("compression_ratio")
    if mean_logprob is not None and mean_logprob < gates.get("mean_logprob", -1e9):
        fired.append("mean_logprob")
    # A second of grace: words are longer than the frames in which they are loud.
    if len(words) > gates.get("words_per_second", 1e9) * (active_s + 1):
        fired.append("words_per_second")
    sparse = heard is not None and heard < gates.get("heard_per_second", 0) * active_s
    if sparse and (active_s >= NO_SPEECH_FROM_S or "mean_logprob" in fired):
        fired.append("no_speech")
    if fired and loops(words) > LOOP_TIMES:
        fired.append("loop")
    return fired


def loops(words: list[str]) -> int:
    """How often in a row a phrase of one to `LOOP_WORDS` words is said at most."""
    most = 1
    for length in range(1, min(LOOP_WORDS, len(words) // 2) + 1):
        same = 0
        for first in range(len(words) - length):
            same = same + 1 if words[first] == words[first + length] else 0
            most = max(most, same // length + 1)
    return most
