"""Harmony's channels read from a whole answer at once: the reference for the reader that takes it in pieces."""

STOP_TOKENS = ("<|return|>", "<|call|>", "<|endoftext|>")
HEADER_TOKENS = ("<|start|>", "<|channel|>")


def _channel_of(tokenizer, header: list[int] | None) -> str:
    words = tokenizer.decode(header or [], skip_special_tokens=True).split()
    return "final" if not words or words[0] == "final" else "analysis"


def _decode(tokenizer, token_ids: list[int], *, cut_off: bool) -> str:
    text = tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd") if cut_off else text  # a character cut in the middle is not shown


def split_channels(tokenizer, token_ids: list[int]) -> tuple[str, str]:
    """The analysis and the final text in a completion, whole or cut off anywhere.

    No token is lost silently: channels other than final (commentary) count as analysis, and text outside of
    any message as final. A header cut off before its `<|message|>` is no text. Reading ends at a stop token.
    """
    names = [*STOP_TOKENS, *HEADER_TOKENS, "<|end|>", "<|message|>"]
    spelled = dict(zip(tokenizer.convert_tokens_to_ids(names), names, strict=True))
    texts: dict[str, list[str]] = {"analysis": [], "final": []}
    header: list[int] | None = None  # the tokens of the header being read; None inside a body
    channel, body = "final", []

    for token_id in [*token_ids, None]:
        name = spelled.get(token_id)
        if token_id is not None and name is None:
            (body if header is None else header).append(token_id)
            continue
        if body:
            texts[channel].append(_decode(tokenizer, body, cut_off=token_id is None))
            body = []
        if name in HEADER_TOKENS:
            header = []
        elif name == "<|message|>":
            channel, header = _channel_of(tokenizer, header), None
        elif name == "<|end|>":
            channel, header = "final", None
        else:  # a stop token, or the end
            break
    return "\n".join(texts["analysis"]), "\n".join(texts["final"])
