"""SmolLM2's tokenizer out of a GGUF file, here a tiny one's: its tokens are those of the definition, spelled out."""

import json

import pytest
from transformers import AutoTokenizer

from pipeline.errors import PipelineError
from pipeline.prompts.everyday.requests import request
from pipeline.target.gguf_file import GgufFile
from pipeline.target.smollm import tokenizer_of
from tests.support import gguf as tiny_gguf
from tests.support.oracles import run_oracle

TEXTS = (
    "In 2023 I paid 1234.50 euros, and  7 more.",
    "abc12 3d x=42;",
    "isn't it? I'll say they've gone; WE'RE here",
    "  two spaces,\n\n  a list:\n\t- tab \n",
    "naïve café 東京 👩‍👩‍👧 ½ Ⅷ ٣",
    "▁ stays itself, Ġ too",
    "",
    " ",
    *(request(7, index) for index in range(60)),
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return GgufFile(tiny_gguf.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf"))


@pytest.fixture(scope="module")
def tokenizer(file):
    return tokenizer_of(file)


@pytest.mark.conformance
def test_tokens_are_those_of_the_definition_written_out(file, tokenizer, tmp_path):
    (tmp_path / "in.json").write_text(json.dumps({"texts": TEXTS}))
    run_oracle("smollm_tokens", gguf=file.path, inputs=tmp_path / "in.json", outputs=tmp_path / "out.json")
    wanted = json.loads((tmp_path / "out.json").read_text())["token_ids"]
    assert [tokenizer.encode(text) for text in TEXTS] == wanted


@pytest.mark.parametrize("text", TEXTS[:8], ids=repr)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_digit_never_shares_a_token_with_what_stands_before_or_behind_it(tokenizer):
    assert [token for token in tokenizer.tokenize("a 12, 3b  4") if any(map(str.isdigit, token))] == list("1234")


def test_ids_are_places_in_the_files_list_and_control_tokens_are_one_token_each(tokenizer):
    tokens = tiny_gguf.vocabulary()[0]
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(tiny_gguf.VOCABULARY)) == list(range(len(tokenizer)))
    assert tokenizer.encode("<|im_start|>a<gh_stars>") == [1, *tokenizer.encode("a"), 3]
    assert sorted(tokenizer.get_added_vocab()) == sorted(tiny_gguf.CONTROL_TOKENS)
    assert tokenizer.decode([1, *tokenizer.encode("a"), 3], skip_special_tokens=True) == "a"


def test_named_tokens_and_the_greatest_length_are_the_files(tokenizer):
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == tiny_gguf.POSITIONS


def test_nothing_is_put_around_a_text(tokenizer):
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special_tokens=False)


def test_the_chat_template_is_the_files(tokenizer):
    assert tokenizer.chat_template == tiny_gguf.CHATML


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_another_kind_of_vocabulary_is_refused(tmp_path):
    other = tiny_gguf.write(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.model": "llama"})
    with pytest.raises(PipelineError, match=r"tokenizer.ggml.model: found 'llama', wanted 'gpt2'"):
        tokenizer_of(GgufFile(other))
