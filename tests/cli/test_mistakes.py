"""Error texts of the command line that tell how to write what was meant."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from pipeline.cli import mistakes


def parse(override):
    return OverridesParser.create().parse_overrides([override])[0]


@pytest.mark.parametrize(
    "value",
    ["~/x", "a(b", "a{b", "a=b", "it's", 'say "no"', "C:\\(new)", "a(\\", 'a\\"(', "'(", "[a b", "$(id) {", "`id`)"],
)
def test_a_value_with_special_characters_is_shown_quoted_for_hydra_and_for_the_shell(value, capsys):
    with pytest.raises(SystemExit) as ended, mistakes.report_mistakes():
        parse(f"prompts.path={value}")
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip()
    _, _, hint = message.partition("; quote the value, for Hydra and for the shell: ")
    (override,) = shlex.split(hint)
    found = parse(override)
    assert (found.key_or_group, found.value()) == ("prompts.path", value)


@pytest.mark.parametrize(("old", "new"), mistakes.MOVED.items(), ids=list(mistakes.MOVED))
def test_a_key_of_version_0_1_names_the_key_that_it_is_now(old, new):
    names = mistakes._names(mistakes.PipelineConfig)
    assert old not in names
    assert new in names
    assert mistakes._unknown_key(old) == f"{old} is called {new} since version 0.2; write {new}=..."


def test_a_single_value_where_a_list_is_wanted_is_shown_as_a_list(capsys):
    with pytest.raises(SystemExit) as ended, mistakes.report_mistakes():
        OmegaConf.merge(OmegaConf.structured(mistakes.PipelineConfig), {"bench": {"prompt_sets": "gsm8k"}})
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: bench.prompt_sets is 'gsm8k'; it must be a list: write bench.prompt_sets=[gsm8k]\n"
