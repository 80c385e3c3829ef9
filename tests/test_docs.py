"""The documentation against the tree: links, files, names, keys, choices and commands that it states all exist."""

import ast
import copy
import functools
import itertools
import re
import shlex
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pipeline.cli.composed import typed
from pipeline.cli.mistakes import MOVED
from pipeline.cli.stages import CONF, STAGES
from pipeline.config import fields
from pipeline.config.choices import Stage
from pipeline.config.schema import ArchitectureConfig, PipelineConfig, PretrainConfig, PretrainedConfig, TargetConfig
from pipeline.config.validation import validate
from pipeline.errors import PipelineError
from tests.support.paths import ROOT

DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
LARGEST_README = 120  # lines

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)
NAMED_FILE = re.compile(r"(?<![\w./-])((?:pipeline|tests|conf|docs)/[\w./-]*[\w/])(?:::(\w+))?")
CITED = re.compile(r"(?<![\w./])(docs/[\w/]+\.md)(?:#([\w-]+))?")
OF_HARMONY = "docs/format.md"  # of github.com/openai/harmony
OVERRIDE = re.compile(r"\+?([a-z_]+(?:\.[a-z_]\w*)*)=(?!=)(.*)", re.DOTALL)
DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
COMMAND = re.compile(r"^ *python -m pipeline(?:[^\n\\]|\\\n)*", re.MULTILINE)
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.name != "hydra")
# what stands for a value that a person puts in
PLACEHOLDERS = {"$((6 * N / 32))": "100", "DIRECTORY": "a-dflash-draft"}


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose_of(document: Path) -> str:
    """A document without its blocks of code and its code between backticks, in which nothing is a link."""
    return CODE.sub("", INDENTED.sub("", FENCE.sub("", text_of(document))))


def blocks_of(document: Path) -> list[str]:
    text = text_of(document)
    return FENCE.findall(text) + INDENTED.findall(FENCE.sub("", text))


def spans_of(document: Path) -> list[str]:
    return CODE.findall(INDENTED.sub("", FENCE.sub("", text_of(document))))


@functools.cache
def anchors_of(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in HEADING.findall(FENCE.sub("", text_of(document))):
        plain = LINK.sub("", heading) if "](" in heading else heading
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


@functools.cache
def names_in(file: Path) -> set[str]:
    """What a module defines at its top level."""
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


@functools.cache
def keys() -> set[str]:
    """Every dotted name of the schema, of its groups too."""
    target = TargetConfig(
        architecture=ArchitectureConfig(), pretrain=PretrainConfig(), pretrained=PretrainedConfig()
    )  # the parts that not every target has
    names = {leaf.name for leaf in fields.leaves(PipelineConfig(target=target))}
    return names | {prefix for name in names for prefix in itertools.accumulate(name.split("."), "{}.{}".format)}


def tracked_files() -> list[Path]:
    """The text files of the repository, and those that are new in it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [file for file in found if file.is_file() and b"\0" not in file.read_bytes()]


@functools.cache
def schema() -> DictConfig:
    return OmegaConf.structured(PipelineConfig)


def problem_of_choice(group: str, choice: str) -> str | None:
    """What is wrong with a choice in a group of conf/, or with a stage."""
    known = {stage.value for stage in Stage} if group == "stage" else {file.stem for file in (CONF / group).iterdir()}
    return None if choice in known else f"{group}={choice}: there are {sorted(known)}"


def problem_of_override(key: str, value: str) -> str | None:
    """What is wrong with an override, or None. A value may be left out."""
    if key in (*GROUPS, "stage"):
        return problem_of_choice(key, value) if value else None
    if key not in keys() and not any(key.startswith(f"{name}.") for name in ("teacher_cache.openai.extra",)):
        return f"{key}: no such key"
    if not value:
        return None
    try:
        OmegaConf.merge(schema(), OmegaConf.from_dotlist([f"{key}={value}"]))
    except OmegaConfBaseException as error:
        return f"{key}={value}: {error}"
    return None


def overrides_of(document: Path) -> list[tuple[str, str]]:
    """Keys and values that stand between backticks as overrides; `stage=<name>` stands for any."""
    words = [word for span in spans_of(document) if "<" not in span for word in shlex.split(span.replace("\\", ""))]
    return [found.groups() for word in words if (found := OVERRIDE.fullmatch(word))]


def commands_of(document: Path) -> list[str]:
    return [command for block in blocks_of(document) for command in COMMAND.findall(block)]


def overrides_in(command: str) -> list[str]:
    """The overrides of a command as Hydra gets them; of a sweep the first values."""
    for placeholder, value in PLACEHOLDERS.items():
        command = re.sub(rf"{re.escape(placeholder)}(?!\w)", value, command)
    words = shlex.split(command.replace("\\\n", " "), comments=True)[3:]
    overrides = [word for word in words if not word.startswith("-")]
    if "--multirun" in words:
        return [re.sub(r"=([^,\[{]+),.*", r"=\1", word) for word in overrides]
    return overrides


def test_no_file_cites_what_a_clone_does_not_have():
    outside = "../" + "shared"
    assert [name_of(file) for file in tracked_files() if outside in file.read_text(encoding="utf-8")] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings_that_exist(document):
    wrong = []
    for link in LINK.findall(prose_of(document)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        found = (document.parent / path).resolve() if path else document
        if not found.exists() or (anchor and anchor not in anchors_of(found)):
            wrong.append(link)
        elif not found.is_relative_to(ROOT):
            wrong.append(f"{link} leads out of the repository")
    assert wrong == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_and_names_that_are_stated_exist(document):
    wrong = []
    for path, name in NAMED_FILE.findall(text_of(document)):
        file = ROOT / path
        if not file.exists() or (name and name not in names_in(file)):
            wrong.append(f"{path}::{name}" if name else path)
    for name, path in re.findall(r"`(\w+)` in \[(pipeline/[\w/]+\.py)\]", text_of(document)):
        if name not in names_in(ROOT / path):
            wrong.append(f"{path} has no {name}")
    assert wrong == []


def test_sources_cite_sections_that_exist():
    wrong = []
    for file in tracked_files():
        if file in DOCUMENTS or file == Path(__file__):
            continue
        for path, anchor in CITED.findall(file.read_text(encoding="utf-8")):
            cited = ROOT / path
            if path != OF_HARMONY and (not cited.is_file() or (anchor and anchor not in anchors_of(cited))):
                wrong.append(f"{name_of(file)}: {path}#{anchor}")
    assert wrong == []


def test_the_readme_is_short_and_has_every_stage():
    readme = text_of(ROOT / "README.md")
    assert len(readme.splitlines()) <= LARGEST_README
    table = "\n".join(line for line in readme.splitlines() if line.startswith("| `"))
    assert [stage.value for stage in (*STAGES, Stage.all) if f"`{stage.value}`" not in table] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_keys_and_choices_that_are_stated_exist(document):
    spans = spans_of(document)
    problems = [problem for one in overrides_of(document) if (problem := problem_of_override(*one)) is not None]
    known = {*keys(), *(MOVED if document.name == "CHANGELOG.md" else ())}
    dotted = [span for span in spans if DOTTED.fullmatch(span) and span.split(".")[0] in keys()]
    problems += [f"{span}: no such key" for span in dotted if span not in known and not is_file_name(span)]
    assert problems == []


def is_file_name(span: str) -> bool:
    return span.rpartition(".")[2] in ("json", "jsonl", "py", "md", "toml", "yaml", "html")


@functools.cache
def composed(choices: tuple[str, ...]) -> DictConfig:
    """The configuration with choices in groups."""
    ConfigStore.instance().store(name="schema", node=PipelineConfig)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(choices))


def require_a_configuration(overrides: list[str]) -> None:
    """Raises as the command line would: Hydra reads the words, the schema types the values, rules are checked."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    choices = [one for one in parsed if one.key_or_group in GROUPS or one.is_hydra_override()]
    config = copy.deepcopy(composed(tuple(one.input_line for one in choices)))
    for one in parsed:
        if one not in choices:
            OmegaConf.update(config, one.key_or_group, one.value(), force_add=one.is_add())
    settings = typed(config)
    if settings.stage is not None:
        validate(settings)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_compose_and_break_no_rule(document):
    wrong = []
    for command in commands_of(document):
        try:
            require_a_configuration(overrides_in(command))
        except (HydraException, OmegaConfBaseException, PipelineError, ValueError) as error:
            wrong.append(f"{command}: {error}")
    assert wrong == []


def test_there_are_commands_to_check():
    """A rule about commands that finds none would pass on everything."""
    assert sum(len(commands_of(document)) for document in DOCUMENTS) > 30
    assert sum(len(overrides_of(document)) for document in DOCUMENTS) > 80


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_make_targets_that_are_stated_exist(document):
    phony = re.search(r"^\.PHONY: (.*)$", text_of(ROOT / "Makefile"), re.MULTILINE)
    named = re.findall(r"\bmake ([a-z-]+)", "\n".join([*spans_of(document), *blocks_of(document)]))
    assert sorted(set(named) - set(phony[1].split())) == []


BROKEN = {
    "a link to no file": (test_links_lead_to_files_and_headings_that_exist, "[here](docs/nowhere.md)"),
    "a link to no heading": (test_links_lead_to_files_and_headings_that_exist, "[here](README.md#no-such-heading)"),
    "a file that is not there": (test_files_and_names_that_are_stated_exist, "`pipeline/engine/nothing.py`"),
    "a name that is not there": (test_files_and_names_that_are_stated_exist, "`pipeline/engine/steps.py::nothing`"),
    "a key that is not there": (test_keys_and_choices_that_are_stated_exist, "`serve.prefill_chunk=64`"),
    "a bare key that is not there": (test_keys_and_choices_that_are_stated_exist, "`serve.prefill_chunk`"),
    "a value that is none": (test_keys_and_choices_that_are_stated_exist, "`train.optimizer=sgd`"),
    "a choice that is not there": (test_keys_and_choices_that_are_stated_exist, "`experiment=nothing`"),
    "a stage that is not there": (test_keys_and_choices_that_are_stated_exist, "`stage=nothing`"),
    "a command with a key too many": (
        test_commands_compose_and_break_no_rule,
        "\n    python -m pipeline stage=train train.nothing=1\n",
    ),
    "a command that breaks a rule": (
        test_commands_compose_and_break_no_rule,
        "\n```\npython -m pipeline stage=all \\\n  train.steps=0\n```\n",
    ),
    "a make target that is not there": (test_make_targets_that_are_stated_exist, "`make nothing`"),
}


@pytest.mark.parametrize(("rule", "text"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_page_breaks_its_rule(rule, text, monkeypatch):
    page = ROOT / "page.md"  # in no file: relative links of it begin here
    read = text_of
    monkeypatch.setattr(f"{__name__}.text_of", lambda document: text if document == page else read(document))
    with pytest.raises(AssertionError):
        rule(page)
