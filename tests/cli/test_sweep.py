"""Sweeps with stages of this file, run by Hydra's own launcher and by those that start processes."""

import pytest

from tests.test_main import command, run, runs_of, stub_stages, wait_for

STAGES = """
def train(config, tracker):
    from pipeline.errors import PipelineError
    if config.seed == 9:
        raise PipelineError("this seed fails")
    rate = config.train.learning_rate
    tracker.log_metrics({"speedup": 1000 * rate, "speedup_low": 1000 * rate - 0.1, "speedup_high": 1000 * rate + 0.1})

stub("pipeline.train.stage", train)
"""
LAUNCHERS = [
    pytest.param((), id="one after the other"),
    pytest.param(("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"), id="joblib"),
    pytest.param(("hydra/launcher=submitit_local",), id="submitit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_has_one_run_that_names_the_best_and_ends_with_all_members(tmp_path, launcher):
    stub_stages(tmp_path, STAGES)
    code, out, _ = run(tmp_path, "--multirun", "stage=train", "train.learning_rate=1e-3,2e-3", "seed=0,9", *launcher)
    assert code == (1 if launcher else 2)  # the codes of other processes do not come back
    best = "train.learning_rate=0.002 seed=0"
    table = [line.split("  ") for line in out.splitlines() if line.startswith("train.learning_rate")]
    assert {line[0]: line[-1].strip() == "done" for line in table} == {
        f"train.learning_rate={rate} seed={seed}": seed == 0 for rate in (0.001, 0.002) for seed in (0, 9)
    }
    assert f"the best by speedup: {best} (2.000)\n" in out
    assert out.count("runs side by side in MLflow") == 1
    found = runs_of(tmp_path)
    (sweep,) = (one for one in found if one.data.tags["stage"] == "sweep")
    children = [one for one in found if one.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    assert sorted(one.info.status for one in children) == ["FAILED", "FAILED", "FINISHED", "FINISHED"]
    assert sweep.data.tags["sweep.best"] == best
    assert sweep.data.tags["sweep.best_run_id"] in {one.info.run_id for one in children}
    assert sweep.data.metrics["best/speedup"] == 2.0
    assert sweep.info.status == "FAILED"
    assert sweep.data.tags["mlflow.note.content"].count("| [FAILED]") == 2


def test_members_that_write_to_several_stores_have_no_run_in_common(tmp_path):
    stub_stages(tmp_path, STAGES)
    code, out, err = run(tmp_path, "--multirun", "stage=train", "output_dir=outputs,others")
    assert code == 0, err
    assert [one.data.tags["stage"] for one in runs_of(tmp_path)] == ["train"]
    assert out.splitlines()[-1] == "output_dir=others   done"


def test_an_interrupt_ends_the_sweep_and_its_run(tmp_path):
    waits = STAGES + '\nstub("pipeline.train.stage", lambda config, tracker: (Path("waits").touch(), time.sleep(60)))\n'
    stub_stages(tmp_path, waits)
    with command(tmp_path, "--multirun", "stage=train", "seed=0,1") as process:
        wait_for((tmp_path / "waits").exists)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.count("interrupted; run the same command to go on") == 1
    assert "Traceback" not in err
    assert {one.info.status for one in runs_of(tmp_path)} == {"KILLED"}
