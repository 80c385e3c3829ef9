"""Trains the tiny target's tokenizer; loads tokenizers and computes their fingerprints."""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, GptOssConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from pipeline.artifacts.hashing import file_sha256
from pipeline.errors import PipelineError
from pipeline.prompts.messages import EFFORTS

Tokenizer = PreTrainedTokenizerBase  # other modules import it from here, so that transformers has one owner

MASK_TOKEN = "<|reserved_200000|>"  # what the published GPT-OSS drafts use: dflash_config.mask_token_id 200000
SPECIAL_TOKENS = (  # spelled and ordered as in o200k_harmony, gaps left out
    "<|startoftext|>",
    "<|endoftext|>",
    MASK_TOKEN,
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
DEFAULT_TEMPLATE = "default"  # of several named ones
TEMPLATE_FILE = Path(__file__).with_name("tiny_chat_template.jinja")
TEMPLATE_WORDS = (
    "system",
    "Reasoning",
    *(f" {effort}" for effort in EFFORTS),
    "user",
    "assistant",
    "analysis",
    "final",
)
# each digit is a token, so that sums are learned digit by digit, and so is each letter that stands alone: with a space
# before it or without, it is the same token; words take the space before them, digits and letters do not
PATTERN = r" ?\p{L}{2,}|\p{L}|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of exactly `vocab_size` tokens, the special ones last.

    `texts` are plain (no special tokens); the words that the chat template adds to each conversation are
    included. The same texts give the same tokenizer. Raises PipelineError when `vocab_size` cannot hold
    the 256 bytes and the special tokens, or the texts cannot fill it.
    """
    smallest = NUM_BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise PipelineError(
            f"vocab_size is {vocab_size}; it must be at least {smallest}: {NUM_BYTES} bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens; 512 is a good size for the embedded corpus"
        )
    tokenizer = FastTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_template_words(texts), trainer)
    found = tokenizer.get_vocab_size() + len(SPECIAL_TOKENS)
    if found != vocab_size:
        raise PipelineError(
            f"the texts fill a vocabulary of {found} tokens, wanted {vocab_size}; give more texts or a smaller one"
        )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE_FILE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer of an HF directory without using the hub; raises PipelineError when there is none.

    Of several named chat templates it has the one called default.
    """
    try:
        # with a configuration given, transformers reads config.json neither for its sizes nor for its encoding
        tokenizer = AutoTokenizer.from_pretrained(str(directory), config=GptOssConfig(), local_files_only=True)
    except Exception as error:  # of any kind: a wrong value in a file is a KeyError, a TypeError or tokenizers' own
        raise PipelineError(
            f"{directory} holds no tokenizer that transformers opens: {type(error).__name__}: {error}; give the "
            "tokenizer.json and tokenizer_config.json that belong to the model"
        ) from error
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _default_template(tokenizer.chat_template, directory)
    return tokenizer


def fast_tokenizer(tokenizer: Tokenizer) -> FastTokenizer | None:
    """Returns what encodes for a tokenizer, of the tokenizers library; None where it is none of that library's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend if isinstance(backend, FastTokenizer) else None


def _default_template(named: Mapping[str, str], directory: Path) -> str:
    if DEFAULT_TEMPLATE not in named:
        raise PipelineError(
            f"{directory} has the chat templates {', '.join(named)}; wanted one called {DEFAULT_TEMPLATE}: rename the "
            "one to use"
        )
    return named[DEFAULT_TEMPLATE]


def special_token_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Returns the ids of control tokens; raises PipelineError that names every one the tokenizer lacks."""
    added = tokenizer.get_added_vocab()
    texts = list(texts)
    missing = [text for text in texts if text not in added]
    if missing:
        raise PipelineError(
            f"the tokenizer {tokenizer.name_or_path or '(in memory)'} lacks {', '.join(missing)}; "
            "wanted a Harmony tokenizer: GPT-OSS's own, or the one of stage=target"
        )
    return [added[text] for text in texts]


def control_token_problem(tokenizer: Tokenizer, texts: Iterable[str]) -> str | None:
    """Returns what is wrong with texts between control tokens, or None: they must not spell a control token."""
    control_tokens = tokenizer.get_added_vocab()
    found = sorted({token for text in texts for token in control_tokens if token in text})
    if not found:
        return None
    return f"a text spells the control tokens {', '.join(found)}; wanted plain text: take them out"


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """Returns the bytes of a token, which need not be whole characters."""
    piece, table = tokenizer.convert_ids_to_tokens(token_id), _byte_of_character()
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    assert isinstance(text, str), "only batches give lists"
    if "\ufffd" in text and isinstance(piece, str) and all(character in table for character in piece):
        return bytes(table[character] for character in piece)
    return text.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Returns the byte that each character stands for in a byte-level vocabulary."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def config_token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Returns the entries of a model's `config.json` for this tokenizer's begin, end and pad tokens."""
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def tokenizer_fingerprint(directory: Path) -> str:
    """Returns the sha256 (hex) of the bytes of `tokenizer.json` in `directory`; raises PipelineError without one."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise PipelineError(f"no tokenizer.json in {directory}; give a directory made by save_pretrained")
    return file_sha256(path)


def chat_template_fingerprint(directory: Path) -> str:
    """Returns the sha256 (hex) of the chat template's text; raises PipelineError when there is none.

    The text is `chat_template.jinja`, or `chat_template` in `tokenizer_config.json`; of several, the default.
    """
    path, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if path.is_file():
        return file_sha256(path)
    template = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
    if isinstance(template, list):
        template = _default_template({each["name"]: each["template"] for each in template}, directory)
    if not isinstance(template, str):
        raise PipelineError(
            f"no chat template in {directory} (neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json); copy chat_template.jinja from the target's repository"
        )
    return hashlib.sha256(template.encode()).hexdigest()


def _with_template_words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield text
        yield from TEMPLATE_WORDS


@functools.cache  # every address and contract needs it, and GPT-OSS's tokenizer takes seconds to read
def token_id(tokenizer: Path, changed_ns: int, token: str) -> int | None:
    """Returns the id of a token in a tokenizer.json, or None; a changed file has another `changed_ns`."""
    return FastTokenizer.from_file(str(tokenizer)).token_to_id(token)
