"""Versions, champions and claims in MLflow's own registry."""

import json
import threading

import pytest

from pipeline.errors import PipelineError
from pipeline.tracking import registry
from pipeline.tracking.registry import CHAMPION, PREVIOUS, Registry, resolve


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One store for this file."""
    return tmp_path_factory.mktemp("outputs")


@pytest.fixture
def model(folder, request):
    return Registry(request.node.name.replace("[", " "), uri=None, output_dir=folder)


def draft(tmp_path, name):
    directory = tmp_path / name
    directory.mkdir()
    (directory / "README.md").write_text(f"the card of {name}")
    return directory


def test_a_draft_is_one_version_however_often_it_is_registered(model, tmp_path):
    one = model.register(draft(tmp_path, "a"), "fa", run_id=None, record={"speedup": 1.0})
    again = model.register(tmp_path / "a", "fa", run_id=None, record={"speedup": 2.0})
    other = model.register(draft(tmp_path, "b"), "fb", run_id=None, record={"speedup": 3.0})
    assert (one.number, again.number, other.number) == ("1", "1", "2")
    assert model.of_number("1").record == {"speedup": 2.0}
    assert model.of_number("2").fingerprint == "fb"


def test_the_champion_is_an_alias_and_an_address(model, folder, tmp_path):
    assert model.of_alias(CHAMPION) is None
    made = model.register(draft(tmp_path, "a"), "fa", run_id=None, record={})
    assert model.of_alias(CHAMPION) is None
    model.move(CHAMPION, made.number)
    assert model.of_alias(CHAMPION) == made
    for address in (f"models:/{model.name}@champion", f"models:/{model.name}/1"):
        assert resolve(address, uri=None, output_dir=folder).source == str(tmp_path / "a")
    assert model.of_alias(PREVIOUS) is None


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("tiny@champion", "is no address of a model"),
        ("models:/nothing@champion", "has no such alias"),
        ("models:/nothing/3", "models:/nothing/3: "),
    ],
)
def test_an_address_that_leads_nowhere_is_one_clear_error(folder, address, problem):
    with pytest.raises(PipelineError, match=problem):
        resolve(address, uri=None, output_dir=folder)


def test_a_draft_of_another_machine_is_said(model, folder, tmp_path):
    directory = draft(tmp_path, "a")
    model.move(CHAMPION, model.register(directory, "fa", run_id=None, record={}).number)
    directory.rename(tmp_path / "b")
    with pytest.raises(PipelineError, match="which is not on this machine"):
        resolve(f"models:/{model.name}@champion", uri=None, output_dir=folder)


def test_of_two_that_promote_at_once_one_wins_and_the_other_says_so(model, folder, tmp_path):
    model.register(draft(tmp_path, "a"), "fa", run_id=None, record={})
    together, won, lost = threading.Barrier(2), [], []

    def promote(name):
        own = Registry(model.name, uri=None, output_dir=folder)
        together.wait()
        try:
            with own.claimed(name):
                won.append(name)
        except PipelineError as error:
            lost.append(str(error))

    threads = [threading.Thread(target=promote, args=(name,)) for name in ("run a", "run b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(lost) == 1
    assert won[0] in lost[0]


def test_a_claim_that_was_left_behind_blocks_nobody_for_long(model, tmp_path, monkeypatch):
    model.register(draft(tmp_path, "a"), "fa", run_id=None, record={})
    stale = json.dumps(["run of yesterday", 0.0])
    model._client.set_registered_model_tag(model.name, registry.CLAIM, stale)
    with model.claimed("run b"):
        pass
    model._client.set_registered_model_tag(model.name, registry.CLAIM, json.dumps(["run c", 9e12]))
    with pytest.raises(PipelineError, match="run c moves the champion"), model.claimed("run d"):
        pass
