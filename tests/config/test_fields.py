import pytest

from pipeline.config.fields import expand_paths
from pipeline.config.schema import PipelineConfig


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("~/models/tiny", "/home/me/models/tiny"),
        ("~", "/home/me"),
        ("models/~tiny", "models/~tiny"),
        ("gs://bucket/~tiny", "gs://bucket/~tiny"),
        ("openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        (None, None),
    ],
)
def test_a_tilde_at_the_beginning_of_a_path_is_the_home_directory(monkeypatch, written, wanted):
    monkeypatch.setenv("HOME", "/home/me")
    config = PipelineConfig()
    config.target.name = "tiny"
    for group in (config.target, config.prompts, config.teacher_cache, config.train, config.export):
        group.path = written
    config.train.init = config.target.gguf = config.prompts.dataset = written
    found = expand_paths(config)
    groups = (found.target, found.prompts, found.teacher_cache, found.train, found.export)
    assert {group.path for group in groups} == {wanted}
    assert (found.train.init, found.target.gguf, found.prompts.dataset) == (wanted, wanted, wanted)
    assert (found.output_dir, found.prompts.column) == ("outputs", "prompt")


def test_a_tilde_in_what_is_no_path_stays():
    config = PipelineConfig()
    config.target.name = "tiny"
    config.prompts.column = config.serve.host = "~"
    found = expand_paths(config)
    assert (found.prompts.column, found.serve.host) == ("~", "~")
