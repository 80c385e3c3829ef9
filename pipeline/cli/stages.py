"""The door: composes the configuration, types it, opens the tracker and runs one stage, or `all` of them."""

import contextlib
import dataclasses
import difflib
import importlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import dotenv
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from pipeline.artifacts import PipelineError, git_commit
from pipeline.config import MeshConfig, PipelineConfig, Stage, plain, uses_hosts
from pipeline.config_rules import validate
from pipeline.tracking import Run, SilentRun, open_run, ui_command

log = logging.getLogger("pipeline")

PARENT_RUN_ID = "PIPELINE_PARENT_RUN_ID"  # environment variable: set by `all` for the stages that it starts
MISTAKE, INTERRUPTED = 2, 130  # exit codes
CONF_PLACES = (Path(__file__).resolve().parent / "conf", Path(__file__).resolve().parent.parent / "conf")
CONF = next((place for place in CONF_PLACES if place.is_dir()), CONF_PLACES[0])  # installed, else a checkout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Where a stage lives, and what it needs and makes."""

    module: str
    needs: str
    makes: str


ROOMS = {
    Stage.target: Room(
        module="pipeline.target.stage",
        needs="nothing, or a GPT-OSS directory",
        makes="the target as an HF directory",
    ),
    Stage.teacher_cache: Room(
        module="pipeline.teacher_cache.stage",
        needs="target",
        makes="the target's responses and their features",
    ),
    Stage.train: Room(module="pipeline.train.stage", needs="target, teacher_cache", makes="checkpoints of the draft"),
    Stage.export: Room(module="pipeline.export.stage", needs="target, train", makes="the draft as an HF directory"),
    Stage.serve: Room(module="pipeline.serve.stage", needs="target, export", makes="an OpenAI-style HTTP server"),
    Stage.bench: Room(
        module="pipeline.bench.stage",
        needs="target, export",
        makes="acceptance and speedup against plain decoding",
    ),
    Stage.compile: Room(
        module="pipeline.compile.stage",
        needs="nothing; the tpu extra",
        makes="what the programs need and cost on a TPU slice, without one",
    ),
    Stage.roofline: Room(
        module="pipeline.bench.roofline_stage",
        needs="nothing",
        makes="the target's own speed at its sizes, against the machine's bandwidth",
    ),
    Stage.peer: Room(
        module="pipeline.bench.peer_stage",
        needs="target",
        makes="plain decoding against another program's, on the same prompts",
    ),
    Stage.train_peer: Room(
        module="pipeline.train.peer_stage",
        needs="target, teacher_cache",
        makes="training steps and drafts against another trainer's, on the same batches",
    ),
    Stage.smoke: Room(
        module="pipeline.bench.smoke",
        needs="nothing",
        makes="a random draft taken through export, serve and bench",
    ),
}
STAGES_OF_ALL = (Stage.target, Stage.teacher_cache, Stage.train, Stage.export, Stage.bench)


class StageFailed(Exception):
    """A stage that `all` started ended with `code`; it has told why itself."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """Run the command line. Mistakes end with one `error:` line and exit code 2, an interrupt with 130."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would advise to install torch
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's errors come to us, instead of an excerpt of a traceback and exit 1
    signal.signal(signal.SIGTERM, _interrupt)
    if PARENT_RUN_ID in os.environ:
        _live_and_die_with_parent()
    ConfigStore.instance().store(name="schema", node=PipelineConfig)
    with _mistakes_told():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")(_run)()


def _run(composed: DictConfig) -> None:
    with _mistakes_told():  # inside Hydra's job, where an exception would have Hydra's own line printed above ours
        config = _typed(composed)
        if config.stage is None:
            print(_stage_table())
            return
        validate(config)
        _export_hf_token()
        if uses_hosts(config.mesh) and not _is_first_host(config.mesh):
            logging.getLogger().setLevel(logging.WARNING)
            with contextlib.redirect_stdout(None):  # the first host speaks for all
                _run_stage(config, SilentRun())
            return
        parent = os.environ.get(PARENT_RUN_ID)
        with open_run(
            config.stage.value,
            uri=config.tracking.uri,
            experiment=config.tracking.experiment,
            output_dir=Path(config.output_dir),
            parent_run_id=parent,
            config=plain(config),
            git_commit=git_commit(),
        ) as tracker:
            if config.stage is Stage.all:
                _run_all(tracker)
            else:
                _run_stage(config, tracker)
        if parent is None:
            tell = print if config.stage is Stage.all else log.info
            tell(f"runs side by side in MLflow: {ui_command(config.tracking.uri, Path(config.output_dir))}")


def _is_first_host(config: MeshConfig) -> bool:
    from pipeline import hosts  # imports JAX, which most commands do later

    hosts.join(config.coordinator, config.num_processes, config.process_id)
    return hosts.is_first()


def _run_stage(config: PipelineConfig, tracker: Run) -> None:
    started = time.monotonic()
    log.info("stage=%s", config.stage.value)
    importlib.import_module(ROOMS[config.stage].module).run(config, tracker)  # late: a stage pays for its own imports
    log.info("stage=%s: done in %.1f s", config.stage.value, time.monotonic() - started)


def _run_all(tracker: Run) -> None:
    """Run the stages one after the other, each in a process of its own.

    Of its own, because importing EasyDeL rewrites XLA_FLAGS and other variables of its process, and because a
    GPU or TPU belongs to one process at a time, which gives its memory back only when it ends.
    """
    seconds: dict[str, float] = {}
    for stage in STAGES_OF_ALL:
        started = time.monotonic()
        code = _run_in_process(stage, tracker.run_id)
        if code:
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed (exit code {code})"
            raise StageFailed(
                f"stage={stage.value} {ended}; the stages after it did not run; the same command goes on from there",
                128 - code if code < 0 else code,
            )
        seconds[stage.value] = time.monotonic() - started
        tracker.log_metrics({f"all/{stage.value}_seconds": seconds[stage.value]})
    widths = max(map(len, seconds)) + 2
    print("\n".join(f"{name:<{widths}}{value:8.1f} s" for name, value in seconds.items()))
    print(f"{'all':<{widths}}{sum(seconds.values()):8.1f} s")


def _run_in_process(stage: Stage, parent_run_id: str) -> int:
    """Run one stage with this command's overrides; its exit code, negative when a signal killed it.

    The stage holds the read end of our pipe as its stdin and ends when that closes, so that it never outlives us.
    """
    sources = HydraConfig.get().runtime.config_sources
    folders = [f"--config-dir={source.path}" for source in sources if source.provider == "command-line"]
    overrides = [text for text in HydraConfig.get().overrides.task if text.split("=", 1)[0].lstrip("+") != "stage"]
    command = [sys.executable, "-m", "pipeline", *folders, f"stage={stage.value}", *overrides]
    sys.stdout.flush()
    environment = os.environ | {PARENT_RUN_ID: parent_run_id}
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise


def _live_and_die_with_parent() -> None:
    """As a stage of `all`: leave Ctrl-C to the parent, which sends SIGTERM, and end when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        os._exit(1)  # like kill -9, which every stage withstands: two of them must never write the same artifact

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def _export_hf_token() -> None:
    token = os.environ.get("HF_TOKEN") or dotenv.dotenv_values(".env").get("HF_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token


def _typed(composed: DictConfig) -> PipelineConfig:
    """The configuration as dataclasses; keys that the schema lacks (`+key=`) and values still missing raise."""
    values = OmegaConf.to_container(composed, resolve=True)
    config = OmegaConf.merge(OmegaConf.structured(PipelineConfig), values)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing and config.stage is not None:
        raise PipelineError(
            f"no value for {', '.join(missing)}; add to the command: {' '.join(f'{key}=...' for key in missing)}"
        )
    if missing:
        return PipelineConfig()
    return OmegaConf.to_object(config)


def _stage_table() -> str:
    rows = [("stage", "needs", "makes")]
    rows += [(stage.value, room.needs, room.makes) for stage, room in ROOMS.items()]
    rows.append(("all", "nothing", f"{', '.join(stage.value for stage in STAGES_OF_ALL)}, in this order"))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{name:<{widths[0]}}  {needs:<{widths[1]}}  {makes}" for name, needs, makes in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(
        [
            *lines,
            "",
            "run one:         python -m pipeline stage=all",
            "change a value:  python -m pipeline stage=train train.steps=1000 train.learning_rate=1e-3",
            "several runs:    python -m pipeline --multirun stage=train train.learning_rate=1e-3,2e-3",
            f"choose:          experiment={'|'.join(_choices('experiment'))}  target={'|'.join(_choices('target'))}",
            "all values:      python -m pipeline --cfg job",
        ]
    )


def _choices(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@contextlib.contextmanager
def _mistakes_told() -> Iterator[None]:
    """Turn what a person can mend into one message on stderr and an exit code; everything else is a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if PARENT_RUN_ID in os.environ:  # the parent tells it
            raise SystemExit(INTERRUPTED) from None
        _leave("interrupted; run the same command to go on", INTERRUPTED)
    except StageFailed as failed:
        _leave(str(failed), failed.code)
    except PipelineError as error:
        _leave(f"error: {error}", MISTAKE)
    except (HydraException, OmegaConfBaseException) as error:
        _leave(f"error: {_explained(error)}", MISTAKE)


def _leave(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr)
    raise SystemExit(code) from None


def _explained(error: BaseException) -> str:
    """What was given, what exists and what was probably meant."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"{group} is {name!r}; it must be one of {', '.join(error.options)}{_meant(name, error.options)}"
    if isinstance(error, OverrideParseException):
        stages = [stage.value for stage in Stage]
        given = error.override
        hint = f"; did you mean stage={given}?" if given in stages else "; write key=value"
        reasons = [line for line in str(error).splitlines() if not line.startswith(("Error parsing", "See http"))]
        return f"cannot read the override {given!r}: {' '.join(reasons)}{hint}"
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return _unknown_key(cause.full_key)
    if isinstance(cause, ValidationError) and cause.full_key:
        rule = str(cause).splitlines()[0]
        choices = re.search(r"expected one of \[(.*)\]", rule)
        if choices:
            options = choices[1].split(", ")
            rule = f"it must be one of {', '.join(options)}{_meant(str(cause.value), options)}"
        return f"{cause.full_key} is {cause.value!r}; {rule}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _unknown_key(key: str) -> str:
    names = _names(PipelineConfig)
    parent = max((name for name in names if key.startswith(f"{name}.")), key=len, default="")
    siblings = [name for name in names if name.rpartition(".")[0] == parent]
    namesakes = [name for name in names if name.rpartition(".")[2] == key.rpartition(".")[2]]
    if not parent:
        siblings.append("experiment")
    there = ", ".join(sorted(name.rpartition(".")[2] for name in siblings))
    return (
        f"unknown key {key}; {parent or 'the configuration'} has: {there}"
        f"{_meant(key, [*names, 'experiment'], namesakes)}"
    )


def _names(schema: type, prefix: str = "") -> list[str]:
    """Every dotted name in the schema, inner nodes too."""
    found = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        found.append(name)
        for kind in (field.type, *getattr(field.type, "__args__", ())):
            if dataclasses.is_dataclass(kind):
                found += _names(kind, f"{name}.")
    return found


def _meant(given: str, options: Iterable[str], namesakes: Iterable[str] = ()) -> str:
    close = list(dict.fromkeys([*namesakes, *difflib.get_close_matches(given, list(options), n=2, cutoff=0.7)]))
    return f"; did you mean {' or '.join(close)}?" if close else ""


if __name__ == "__main__":
    main()
