"""GPT-OSS's tokenizer out of a GGUF file: the official one byte by byte, and refused where it cannot be."""

import hashlib
import json

import gguf
import pytest
from tokenizers import AddedToken, Tokenizer

from pipeline.errors import PipelineError
from pipeline.target.gguf_file import GgufFile
from pipeline.target.o200k import generation_config_of, tokenizer_of
from tests.oracles.harmony_assets import SHA256, TEMPLATE, TOKENIZER
from tests.support import gpt_oss_gguf as tiny
from tests.support.oracles import oracle_assets

TEXTS = (
    tiny.TEXT,
    "In 2023 I paid 1234.50 euros, and  7 more.",
    "isn't it? I'LL say THEY'VE gone; camelCase HTTPServer",
    "  two spaces,\n\n  a list:\n\t- tab \r\n",
    "naïve café 東京 👩‍👩‍👧 ½ Ⅷ ٣ हिन्दी",
    "Ġ stays itself, [PAD331] too",
    "",
    " ",
)


def file_of(path, fast=None, rows=tiny.TOKENS + tiny.PADS, **changes):
    """A GGUF of a tokenizer alone; changes go over `tokenizer.ggml.*`."""
    writer = gguf.GGUFWriter(path, "gpt-oss")
    writer.add_context_length(256)
    tiny.add_tokenizer(writer, rows, fast or tiny.tokenizer(), tiny.TEMPLATE)
    for name, value in changes.items():
        key = f"tokenizer.ggml.{name}"
        writer.kv_data[0].pop(key, None)
        add = {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return file_of(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.conformance
def test_the_official_tokenizer_and_template_come_back_byte_by_byte(tmp_path):
    official = oracle_assets()
    fast, template = Tokenizer.from_file(str(official / TOKENIZER)), (official / TEMPLATE).read_text()
    writer = gguf.GGUFWriter(tmp_path / "official.gguf", "gpt-oss")
    writer.add_context_length(131072)
    tiny.add_tokenizer(writer, 201088, fast, template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer_of(GgufFile(tmp_path / "official.gguf")).save_pretrained(tmp_path / "saved")
    for name in (TOKENIZER, TEMPLATE):
        assert hashlib.sha256((tmp_path / "saved" / name).read_bytes()).hexdigest() == SHA256[name], name


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_tokens_are_those_of_the_tokenizer_that_the_file_was_made_of(file, text):
    tokenizer = tokenizer_of(file)
    assert tokenizer.encode(text) == tiny.tokenizer().encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_tokens_are_one_token_each_and_fill_is_none(file):
    tokenizer, fast = tokenizer_of(file), tiny.tokenizer()
    assert tokenizer.encode("<|start|>a<|call|>") == fast.encode("<|start|>a<|call|>").ids
    assert sorted(tokenizer.get_added_vocab()) == sorted(tiny.CONTROL_TOKENS)
    assert len(tokenizer) == tiny.TOKENS
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
    )


def test_tokens_that_a_trainer_added_and_gaps_before_the_control_tokens_keep_their_numbers(tmp_path):
    fast = tiny.tokenizer()
    fast.add_tokens([AddedToken("@tool@", special=False, normalized=False)])
    tokens = [fast.id_to_token(index) for index in range(tiny.TOKENS + 1)]
    kinds = [3 if token in tiny.CONTROL_TOKENS else 1 for token in tokens]
    kinds[-1] = 4
    gap = tiny.TOKENS - len(tiny.CONTROL_TOKENS)  # what was cut out of a vocabulary
    tokens, kinds = [*tokens[:gap], f"[PAD{gap}]", *tokens[gap:]], [*kinds[:gap], 5, *kinds[gap:]]
    tokenizer = tokenizer_of(file_of(tmp_path / "x.gguf", tokens=tokens, token_type=kinds, eos_token_id=gap + 4))
    assert tokenizer.eos_token == "<|return|>"
    for index, token in enumerate(tokens):
        if index != gap:
            assert tokenizer.convert_tokens_to_ids(token) == index
    found = tokenizer.encode("a@tool@<|end|>b")
    assert tokenizer.decode(found) == "a@tool@<|end|>b"
    assert tokenizer.decode(found, skip_special_tokens=True) == "a@tool@b"
    assert found[1:3] == [len(tokens) - 1, tokens.index("<|end|>")]


def test_all_tokens_that_end_an_answer_are_named(tmp_path, file):
    assert generation_config_of(file) == {"bos_token_id": 320, "eos_token_id": [323], "pad_token_id": 321}
    more = file_of(tmp_path / "x.gguf", eot_token_id=329, eom_token_id=323)
    assert generation_config_of(more)["eos_token_id"] == [323, 329]


def changed(number, token):
    """The tokens with one that is another."""
    fast = tiny.tokenizer()
    tokens = [fast.id_to_token(index) for index in range(tiny.TOKENS)]
    tokens += [f"[PAD{index}]" for index in range(tiny.TOKENS, tiny.TOKENS + tiny.PADS)]
    tokens[number] = token
    return tokens


def kinds(number, kind):
    found = [1] * (tiny.TOKENS - len(tiny.CONTROL_TOKENS)) + [3] * len(tiny.CONTROL_TOKENS) + [5] * tiny.PADS
    found[number] = kind
    return found


REFUSED = {
    "another model": ({"model": "llama"}, "tokenizer.ggml.model: found 'llama', wanted 'gpt2'"),
    "another pre-tokenizer": ({"pre": "llama-bpe"}, "tokenizer.ggml.pre: found 'llama-bpe', wanted 'gpt-4o'"),
    "a token before each text": ({"add_bos_token": True}, "tokenizer.ggml.add_bos_token: found True, wanted False"),
    "a type for too few": ({"token_type": [1, 3]}, "token_type: found 2, wanted one for each of 336 tokens"),
    "a token twice": ({"tokens": changed(300, "a")}, "tokens: found 1 token(s) twice, wanted each once"),
    "a byte that is missing": ({"tokens": changed(0, "aaaaa")}, "tokens: found 255 of the 256 bytes, wanted all"),
    "letters of no byte": ({"tokens": changed(300, "東京")}, "tokens: found letters that no byte is written as"),
    "an unused token of another name": (
        {"tokens": changed(331, "zzz")},
        "tokens: found unused tokens such as ['zzz'], wanted [PAD] with their number",
    ),
    "a type that this kind has not": ({"token_type": kinds(280, 6)}, "token_type: found [6], wanted 1 (normal), 3"),
    "an end beyond the tokens": ({"eos_token_id": 999}, "eos_token_id: found 999, wanted a token below 336"),
    "merges of other tokens": ({"merges": ["a zz"]}, "tokenizer.ggml.merges do not belong to its tokens"),
    "tokens that are text": ({"tokens": "abc"}, "tokenizer.ggml.tokens: found a str, wanted a list"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_rebuilt_exactly_is_refused(tmp_path, changes, message):
    with pytest.raises(PipelineError) as error:
        tokenizer_of(file_of(tmp_path / "x.gguf", **changes))
    assert message in str(error.value)


def test_a_file_without_a_chat_template_is_refused_by_the_key_that_is_missing(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gpt-oss")
    writer.add_context_length(256)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(PipelineError, match=r"x.gguf has no tokenizer.ggml.model, .*, tokenizer.chat_template, token"):
        tokenizer_of(GgufFile(tmp_path / "x.gguf"))


def test_the_saved_tokenizer_says_what_the_first_one_said(tmp_path, file):
    tokenizer_of(file).save_pretrained(tmp_path)
    found, wanted = json.loads((tmp_path / "tokenizer.json").read_text()), json.loads(tiny.tokenizer().to_str())
    assert found["model"] == wanted["model"]
    assert found["added_tokens"] == wanted["added_tokens"]
