import hashlib
import json

import pytest
from transformers import AutoTokenizer

from pipeline.errors import PipelineError
from pipeline.prompts.corpus import conversation
from pipeline.prompts.tokenizer import (
    MASK_TOKEN,
    SPECIAL_TOKENS,
    chat_template_fingerprint,
    load_tokenizer,
    special_token_ids,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXTS = [text for index in range(400) for text in (conversation(0, index).prompt, conversation(0, index).final)]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What is 2 + 2?\n"},
    {"role": "assistant", "content": "4", "thinking": "2 + 2 = 4."},
    {"role": "user", "content": "And 3 + 3?"},
]


@pytest.mark.parametrize("vocab_size", [400, 512])
def test_the_special_tokens_are_the_last_of_a_vocabulary_of_the_size_asked_for(vocab_size):
    tokenizer = train_tokenizer(TEXTS, vocab_size)
    assert len(tokenizer) == vocab_size
    first = vocab_size - len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(first, vocab_size))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|startoftext|>", "<|return|>")
    assert (tokenizer.pad_token, MASK_TOKEN) == ("<|endoftext|>", "<|reserved_200000|>")


def test_training_twice_gives_the_same_tokenizer():
    first, second = (train_tokenizer(TEXTS, 512).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    "text",
    ["Mia has 12 pens.", "  def f(x):\n    return x\n\n", "naïve 東京 🙂", "\t| a | 1,234.5 |"],
    ids=["sentence", "code", "unicode", "table"],
)
def test_any_text_survives_encoding_and_decoding(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert [token for token in tokenizer.tokenize("1984 + 27") if token.isdigit()] == list("198427")
    assert not [
        token
        for token in tokenizer.get_vocab()
        if sum(character.isdigit() for character in token) > 1 and token not in SPECIAL_TOKENS
    ]


def test_words_of_the_chat_template_are_single_tokens(tokenizer):
    lengths = {len(tokenizer.tokenize(word)) for word in ("system", "user", "assistant", "analysis", "final")}
    assert lengths == {1}
    assert {len(tokenizer.tokenize(effort)) for effort in (" low", " medium", " high")} == {1}


def test_the_chat_template_writes_harmony(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, reasoning_effort="low")
    assert text == (
        "<|start|>system<|message|>Reasoning: low<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
        "<|start|>user<|message|> What is 2 + 2?\n<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|end|>"
        "<|start|>user<|message|>And 3 + 3?<|end|>"
        "<|start|>assistant"
    )


def test_the_chat_template_keeps_the_analysis_of_a_complete_last_turn_and_ends_it_with_return(tokenizer):
    text = tokenizer.apply_chat_template(MESSAGES[1:3], tokenize=False)
    assert text == (
        "<|start|>system<|message|>Reasoning: medium<|end|>"
        "<|start|>user<|message|> What is 2 + 2?\n<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>2 + 2 = 4.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


def test_the_chat_template_writes_tools_calls_and_results_as_the_official_one_does_but_for_the_schema(tokenizer):
    function = {"name": "now", "description": "The time.", "parameters": {"type": "object"}}
    call = {"function": {"name": "now", "arguments": {"zone": "é"}}}
    calling = {"role": "assistant", "thinking": "Look.", "tool_calls": [call]}
    turns = [*MESSAGES[:2], calling, {"role": "tool", "content": '"noon"'}]
    options = {"tools": [{"function": function}], "tokenize": False, "add_generation_prompt": True}
    call_and_result = (
        '<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{"zone": "é"}<|call|>'
        '<|start|>functions.now to=assistant<|channel|>commentary<|message|>"\\"noon\\""<|end|>'
    )
    assert tokenizer.apply_chat_template(turns, **options) == (
        "<|start|>system<|message|>Reasoning: medium<|end|>"
        "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n# Tools\n\nnamespace functions {\n\n"
        '// The time.\ntype now = (_: {"type": "object"}) => any;\n\n} // namespace functions<|end|>'
        "<|start|>user<|message|> What is 2 + 2?\n<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>Look.<|end|>" + call_and_result + "<|start|>assistant"
    )
    answered = tokenizer.apply_chat_template([*turns, *MESSAGES[2:]], **options)
    assert "Look." not in answered
    assert call_and_result in answered


def test_a_saved_tokenizer_loads_as_it_was(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").is_file()
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    options = {"tokenize": False, "add_generation_prompt": True}
    assert loaded.apply_chat_template(MESSAGES, **options) == tokenizer.apply_chat_template(MESSAGES, **options)
    for text in [*TEXTS[:50], "<|start|>user<|message|> 12<|end|>"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"added_tokens": [], "model": {"type": "none"}}'),
        ("tokenizer.json", "none"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("chat_template.jinja", None),
    ],
)
def test_a_tokenizer_whose_files_are_wrong_is_one_clear_error(tokenizer, tmp_path, file, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(b"\xff\xfe" if content is None else content.encode())
    with pytest.raises(PipelineError, match=f"^{tmp_path} holds no tokenizer that transformers opens: [A-Za-z]+: "):
        load_tokenizer(tmp_path)


def test_fingerprints_are_the_sha256_of_the_saved_files_and_survive_a_second_save(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "first")
    AutoTokenizer.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    expected = hashlib.sha256((tmp_path / "first" / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer_fingerprint(tmp_path / "first") == tokenizer_fingerprint(tmp_path / "second") == expected
    expected = hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()
    assert chat_template_fingerprint(tmp_path / "first") == chat_template_fingerprint(tmp_path / "second") == expected


def test_a_template_inside_tokenizer_config_has_the_fingerprint_of_the_same_template_in_a_file(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert chat_template_fingerprint(tmp_path) == hashlib.sha256(b"{{ messages }}").hexdigest()


NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages[0].content }}"}]


def test_of_several_named_templates_the_default_is_taken(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": NAMED}))
    assert load_tokenizer(tmp_path).chat_template == NAMED[1]["template"]
    assert chat_template_fingerprint(tmp_path) == hashlib.sha256(NAMED[1]["template"].encode()).hexdigest()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": NAMED[:1]}))
    for read in (load_tokenizer, chat_template_fingerprint):
        with pytest.raises(PipelineError, match="has the chat templates tool_use; wanted one called default"):
            read(tmp_path)


def test_fingerprints_of_an_empty_directory_are_refused(tmp_path):
    with pytest.raises(PipelineError, match=r"no tokenizer\.json in .*save_pretrained"):
        tokenizer_fingerprint(tmp_path)
    with pytest.raises(PipelineError, match=r"no chat template in .*copy chat_template\.jinja"):
        chat_template_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (TEXTS, 265, "vocab_size is 265; it must be at least 266"),
        (["ab"], 2000, "the texts fill a vocabulary of .* wanted 2000"),
    ],
    ids=["no room for the special tokens", "too few texts"],
)
def test_a_vocabulary_that_cannot_be_had_is_refused(texts, vocab_size, message):
    with pytest.raises(PipelineError, match=message):
        train_tokenizer(texts, vocab_size)


def test_a_tokenizer_without_harmony_tokens_is_refused_with_all_that_it_lacks(tokenizer):
    with pytest.raises(PipelineError, match=r"lacks <\|a\|>, <\|b\|>; wanted a Harmony tokenizer"):
        special_token_ids(tokenizer, ["<|a|>", "<|end|>", "<|b|>"])
