"""Fails on words that this program no longer uses: `python -m tests.support.word_check`, a part of `make lint`.

docs/architecture.md has the word for each idea. Names are those of definitions, parameters, variables, attributes and
keyword arguments; phrases are looked for in docstrings, comments and other texts. A name that has another meaning in a
library is allowed where that library's name is written (`ALLOWED`).
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

# an old name, and what the idea is called now
NAMES = {
    "ALONE": "UNSHARDED",
    "Asking": "RequestTemplate",
    "Clock": "EngineTimes",
    "Correspondence": "EndpointClient",
    "Journal": "ReplyLog or TrainMonitor",
    "Kernels": "KernelBackend",
    "KnownRequest": "ForcedRequest",
    "LeadingEngine": "PrimaryEngine",
    "Machine": "Runtime",
    "ONE_DEVICE": "SINGLE_DEVICE",
    "Place": "StoragePath or ArraySharding",
    "Refusal": "ApiError",
    "Replies": "Responses",
    "ReplayEngine": "ForcedDecodingEngine",
    "Retake": "Recapture",
    "Room": "StageInfo",
    "ScoredText": "HeldoutText",
    "Told": "ProgramReport",
    "Transposed": "TransposedMatrix",
    "Trial": "EngineCheck",
    "WeightsForm": "WeightFormat",
    "WideWeights": "FusedExpertWeights",
    "Words": "VocabShard",
    "Yield": "StepOutput",
    "are_several": "is_multihost",
    "as_it_is": "no_gather or unchanged",
    "at_places": "take_at",
    "count_kept": "count_accepted",
    "draft_places": "draft_shardings",
    "few_tokens": "max_per_expert_tokens",
    "given": "what it is",
    "here": "what it is",
    "how": "sampling, or what it is",
    "is_first": "is_primary",
    "is_wide": "is_fused",
    "keep_waiting": "broadcast_idle",
    "kept": "accepted, stored, or what it is",
    "kept_of": "reply_fields",
    "lineage": "workspace",
    "load_ends": "read_embedding_and_head",
    "made": "what it is",
    "made_ahead": "prefetch",
    "new_state": "allocate_state",
    "num_kept": "num_accepted",
    "num_right": "num_correct",
    "on_devices": "jit_sharded",
    "on_mesh": "compile_mesh",
    "on_one_device": "compile_single",
    "on_slice": "runtime_for_slice",
    "place": "path, position, index or sharding",
    "place_of": "parse_path",
    "places": "paths, positions, indices or shardings",
    "replay": "forced decoding",
    "replay_round": "forced_round",
    "run_trial": "run_engine_check",
    "said": "what it is",
    "share_out": "shard_tables",
    "slot_positions": "entry_positions",
    "slot_weights": "position_weights",
    "target_places": "target_shardings",
    "told": "what it is",
    "told_by_first": "broadcast_from_primary",
    "weights_form": "weight_format",
}
ALLOWED: dict[str, set[str]] = {  # by file, under pipeline/
    "config/choices.py": {"given"},  # the value of teacher_cache.generator
    "config/validation.py": {"given"},
    "workspace/settings.py": {"given"},
    "prompts/everyday/passages.py": {"told"},  # in the texts of the corpus, whose bytes decide what is trained
    "prompts/everyday/requests.py": {"told"},
}
# the tokens that hold text; from Python 3.12 on, an f-string's parts are tokens of their own
TEXTS = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
# what texts no longer say, and what they say instead
PHRASES = {
    r"\btold\b": "names, reports or states",
    r"\bkept (tokens?|drafted)\b": "accepted",
    r"\bleading (host|engine|process)\b": "primary",
    r"\breplay (engine|round)s?\b": "forced decoding",
    r"\bby heart\b": "from memory",
    r"\bblock slots?\b": "block position",
    r"\bkernel matri(x|ces)\b": "matrix",
    r"\.\./shared\b": "a section of docs/",
}


def main() -> None:
    """Prints every finding as `file:line: word; use ...`, and ends with 1 when there is one."""
    findings = [one for file in sorted((ROOT / "pipeline").rglob("*.py")) for one in _findings(file)]
    print(*findings, sep="\n") if findings else print("words: nothing found")
    sys.exit(bool(findings))


def _findings(file: Path) -> Iterator[str]:
    text, name = file.read_text(), file.relative_to(ROOT / "pipeline").as_posix()
    for line, word in sorted(set(_names(ast.parse(text)))):
        if word in NAMES and word not in ALLOWED.get(name, ()):
            yield f"pipeline/{name}:{line}: the name {word}; use {NAMES[word]}"
    for line, words in _texts(text):
        for pattern, instead in PHRASES.items():
            for found in re.finditer(pattern, words, re.IGNORECASE):
                if found[0].lower() in ALLOWED.get(name, ()):
                    continue
                yield f"pipeline/{name}:{line + words[: found.start()].count(chr(10))}: {found[0]!r}; use {instead}"


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that a file gives or uses, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.alias):
            yield node.lineno, (node.asname or node.name).rpartition(".")[2]


def _texts(text: str) -> Iterator[tuple[int, str]]:
    """Comments and string literals, with their first lines."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in TEXTS:
            yield token.start[0], token.string


if __name__ == "__main__":
    main()
