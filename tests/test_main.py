import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
import yaml

from pipeline.artifacts import provenance
from pipeline.cli import run_all, stages
from pipeline.cli.run_all import StageFailed
from pipeline.config.choices import Stage
from tests.support.paths import ROOT

TOKEN = "hf_aSecretThatNobodyMayRead"

STUBS = """
import os, sys, time, types
from pathlib import Path

def stub(name, run):
    sys.modules[name] = module = types.ModuleType(name)
    module.run = run
"""


@contextlib.contextmanager
def command(folder, *arguments, **options):
    """`python -m pipeline ...` in `folder`, a directory that is not the checkout; killed where the test ends early."""
    environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    with subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


def run(folder, *arguments):
    with command(folder, *arguments) as process:
        out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def stub_stages(folder, text):
    """Stages for the processes of `command`: Python imports sitecustomize before everything else."""
    (folder / "sitecustomize.py").write_text(STUBS + text)


def runs_of(folder):
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/outputs/mlflow.db")
    return client.search_runs([client.get_experiment_by_name("dflash").experiment_id])


def runs_by_stage(folder):
    return {run.data.tags["stage"]: run for run in runs_of(folder)}


def wait_for(condition):
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_without_a_stage_the_stages_are_listed(tmp_path):
    code, out, err = run(tmp_path)
    assert (code, err) == (0, "")
    for stage in Stage:
        assert any(line.split()[:1] == [stage.value] for line in out.splitlines())
    assert "python -m pipeline stage=all" in out
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_the_programs_and_not_hydras(tmp_path):
    code, out, err = run(tmp_path, "--version")
    assert (code, err) == (0, "")
    assert out == f"gpt-oss-dflash {provenance.version()} (commit {provenance.git_commit()})\n"
    assert list(tmp_path.iterdir()) == []


def test_every_stage_has_its_row():
    assert {*stages.STAGES, Stage.all} == set(Stage)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["stage=trian"], ["stage is 'trian'", "teacher_cache", "did you mean train?"], id="unknown stage"),
        pytest.param(["train"], ["'train'", "did you mean stage=train?"], id="stage without its key"),
        pytest.param(
            ["stage=train", "train.stepz=3"],
            ["unknown key train.stepz", "eval_steps", "did you mean train.steps"],
            id="unknown key",
        ),
        pytest.param(["learning_rate=1"], ["unknown key learning_rate", "train.learning_rate"], id="key of a room"),
        pytest.param(["stage=train", "+train.foo=1"], ["unknown key train.foo"], id="added key"),
        pytest.param(["train.steps=many"], ["train.steps is 'many'"], id="not a number"),
        pytest.param(["experiment=qick"], ["experiment is 'qick'", "did you mean quick?"], id="unknown experiment"),
        pytest.param(["target=20b"], ["target is '20b'", "local, smollm2, tiny"], id="unknown target"),
        pytest.param(["stage=target", "target=local"], ["target.name=..."], id="missing value"),
        pytest.param(["stage=train", "train.steps=-1"], ["train.steps is -1; it must be positive"], id="broken rule"),
        pytest.param(["train.data=2"], ["train.data is called train.mesh.data since version 0.2"], id="old key"),
        pytest.param(
            ["prompts.path=a(b"],
            ["""quote the value, for Hydra and for the shell: 'prompts.path="a(b"'"""],
            id="unquoted",
        ),
    ],
)
def test_a_mistake_is_one_error_with_what_was_given_and_what_exists(tmp_path, arguments, words):
    code, out, err = run(tmp_path, *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert all(text in err for text in words), err


def test_cfg_job_prints_the_configuration_with_experiment_and_overrides(tmp_path):
    code, out, err = run(tmp_path, "--cfg", "job", "experiment=quick", "stage=train", "train.steps=7")
    values = yaml.safe_load(out)
    assert (code, err) == (0, "")
    assert (values["stage"], values["train"]["steps"], values["bench"]["repeats"]) == ("train", 7, 1)
    assert values["target"]["name"] == "tiny"


def test_every_experiment_and_target_fits_the_schema(tmp_path):
    for group in ("experiment", "target"):
        for name in stages.choices(group):
            code, _, err = run(tmp_path, f"{group}={name}", "stage=train", "--cfg", "job")
            assert (code, err) == (0, ""), (group, name)
    tiny = yaml.safe_load((ROOT / "conf" / "target" / "tiny.yaml").read_text())["target"]["architecture"]
    axes = [tiny[key] for key in tiny if key.startswith(("vocab", "hidden", "intermediate", "num_", "head", "sliding"))]
    assert len(set(axes)) == len(axes)


def test_multirun_runs_every_combination_and_leaves_nothing_in_the_working_directory(tmp_path):
    code, out, _ = run(tmp_path, "--multirun", "seed=0,1", "train.steps=1,2")
    assert code == 0
    assert out.count("run one:") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_a_member_of_a_sweep_that_fails_does_not_end_the_others(tmp_path):
    probe = ("stage=feasibility", "target=gpt_oss_20b", "tracking.enabled=false", "feasibility.chips=[v6e]")
    code, out, err = run(tmp_path, "--multirun", *probe, "seed=0,1", "feasibility.context=64,0")
    assert code == 2
    assert err.count("feasibility.context is 0; it must be positive") == 2
    table = out.splitlines()[-4:]
    assert [line.split("  ")[-1].strip() for line in table] == ["done", "exit code 2", "done", "exit code 2"]
    assert "seed=0 feasibility.context=0 " in table[1]


def test_all_nests_its_stages_and_stops_at_the_first_that_fails(tmp_path):
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    stub_stages(
        tmp_path,
        f"""
def target(config, tracker):
    print("target runs with seed", config.seed)
    tracker.log_metrics({{"accept_length": 4.5}})
    tracker.log_json("contract.json", {{"block_size": 8}})
    assert os.environ["HF_TOKEN"] == {TOKEN!r}

def teacher_cache(config, tracker):
    from pipeline.errors import PipelineError
    raise PipelineError(f"the cache is broken near {TOKEN}")

stub("pipeline.target.stage", target)
stub("pipeline.teacher_cache.stage", teacher_cache)
stub("pipeline.train.stage", lambda config, tracker: print("train runs"))
""",
    )
    code, out, err = run(tmp_path, "stage=all", "seed=5")
    assert code == 2
    assert "target runs with seed 5" in out
    assert "train runs" not in out
    assert [line for line in err.splitlines() if line.startswith("error:")] == [
        f"error: the cache is broken near {TOKEN}"
    ]
    assert "stage=teacher_cache failed (exit code 2)" in err
    assert "Traceback" not in err

    runs = runs_by_stage(tmp_path)
    assert {name: run.info.status for name, run in runs.items()} == {
        "all": "FAILED",
        "target": "FINISHED",
        "teacher_cache": "FAILED",
    }
    assert runs["target"].data.tags["mlflow.parentRunId"] == runs["all"].info.run_id
    assert "mlflow.parentRunId" not in runs["all"].data.tags
    assert runs["target"].data.metrics == {"accept_length": 4.5}
    assert runs["target"].data.params["seed"] == "5"
    assert runs["all"].data.metrics["all/target_seconds"] > 0
    assert "the cache is broken" in runs["teacher_cache"].data.tags["error"]
    contract = tmp_path / "outputs" / "mlartifacts" / runs["target"].info.run_id / "artifacts" / "contract.json"
    assert json.loads(contract.read_text()) == {"block_size": 8}
    stored = [path for path in (tmp_path / "outputs").rglob("*") if path.is_file()]
    assert stored
    assert not [path for path in stored if TOKEN.encode() in path.read_bytes()]


def test_nothing_is_tracked_where_nobody_wants_it(tmp_path):
    stub_stages(
        tmp_path,
        """
def target(config, tracker):
    tracker.log_metrics({"accept_length": 4.5})
    tracker.log_json("contract.json", {})
    print("target runs", "mlflow" in sys.modules)

stub("pipeline.target.stage", target)
""",
    )
    code, out, err = run(tmp_path, "stage=target", "tracking.enabled=false")
    assert code == 0, err
    assert "target runs False" in out
    assert "MLflow" not in out + err
    assert not (tmp_path / "outputs" / "mlflow.db").exists()


STAGE_THAT_WAITS = """
def target(config, tracker):
    Path("pid.tmp").write_text(str(os.getpid()))
    os.rename("pid.tmp", "pid")
    while True:
        time.sleep(0.02)

stub("pipeline.target.stage", target)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_ends_all_and_its_stage_and_says_how_to_go_on(tmp_path, number):
    stub_stages(tmp_path, STAGE_THAT_WAITS)
    with command(tmp_path, "stage=all", start_new_session=True) as process:
        wait_for((tmp_path / "pid").exists)
        if number is signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted; run the same command to go on"
    assert err.count("interrupted") == 1
    assert "Traceback" not in err
    assert {name: run.info.status for name, run in runs_by_stage(tmp_path).items()} == {
        "all": "KILLED",
        "target": "KILLED",
    }


def test_a_stage_does_not_outlive_a_killed_all(tmp_path):
    stub_stages(tmp_path, STAGE_THAT_WAITS)
    with command(tmp_path, "stage=all") as process:
        wait_for((tmp_path / "pid").exists)
        process.kill()
    stage = int((tmp_path / "pid").read_text())

    def gone():
        with contextlib.suppress(FileNotFoundError):
            return Path(f"/proc/{stage}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        return True

    wait_for(gone)


class Tracker:
    run_id = "parent"

    def __init__(self):
        self.metrics = {}

    def log_metrics(self, metrics, step=None):
        self.metrics |= metrics


@pytest.fixture
def finished(monkeypatch):
    """The stages that `all` starts, with the exit code of each."""
    codes = {}
    started = []

    def run_in_process(stage, parent_run_id):
        started.append(stage.value)
        return codes.get(stage.value, 0)

    monkeypatch.setattr(run_all, "_run_in_process", run_in_process)
    return started, codes


def test_all_runs_target_teacher_cache_train_export_and_bench_in_this_order(finished, capsys):
    tracker = Tracker()
    started, _ = finished
    _unchecked(run_all.run_all)(tracker)
    assert started == ["target", "teacher_cache", "train", "export", "bench"]
    assert set(tracker.metrics) == {f"all/{name}_seconds" for name in started}
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*started, "all"]


def test_a_killed_stage_is_reported_with_its_signal(finished):
    started, codes = finished
    codes["train"] = -signal.SIGKILL
    with pytest.raises(StageFailed, match=r"stage=train was killed by SIGKILL.*goes on from there") as raised:
        _unchecked(run_all.run_all)(Tracker())
    assert raised.value.code == 137
    assert started == ["target", "teacher_cache", "train"]


def _unchecked(function):
    """The function without the type check of tests/conftest.py, so that it takes our stand-in for a run."""
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function
