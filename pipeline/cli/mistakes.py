"""Turns errors that a person can mend into one line: what was written, what exists, what was probably meant."""

import contextlib
import dataclasses
import difflib
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from pipeline.cli.run_all import PARENT_RUN_ID, StageFailed
from pipeline.config.choices import Stage
from pipeline.config.schema import PipelineConfig
from pipeline.errors import PipelineError

MISTAKE, INTERRUPTED = 2, 130  # exit codes
MOVED = {  # keys of version 0.1
    "serve.prefill_chunk": "engine.prefill_chunk",
    "serve.max_length": "engine.max_length",
    "teacher_cache.batch_size": "teacher_cache.slots",
    "topology": "compile.topology",
    "train.data": "train.mesh.data",
    "train.fsdp": "train.mesh.fsdp",
    "train.tensor": "train.mesh.tensor",
}


@contextlib.contextmanager
def report_mistakes() -> Iterator[None]:
    """Turns what a person can mend into one message on stderr and an exit code; everything else is a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if PARENT_RUN_ID in os.environ:  # the parent says it
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
    """Returns what was written, what exists and what was probably meant."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group} is {name!r}; it must be one of {', '.join(error.options)}{_meant(name, error.options)}"
    if isinstance(error, OverrideParseException):
        stages = [stage.value for stage in Stage]
        override = error.override
        hint = f"; did you mean stage={override}?" if override in stages else _quoting(override)
        reasons = [line for line in str(error).splitlines() if not line.startswith(("Error parsing", "See http"))]
        return f"cannot read the override {override!r}: {' '.join(reasons)}{hint}"
    if isinstance(cause, (ConfigAttributeError, ConfigKeyError)):
        return _unknown_key(str(cause.full_key))
    if isinstance(cause, ValidationError) and cause.full_key:
        rule = str(cause).splitlines()[0]
        choices = re.search(r"expected one of \[(.*)\]", rule)
        if choices:
            options = choices[1].split(", ")
            rule = f"it must be one of {', '.join(options)}{_meant(str(cause.value), options)}"
        if "is not a ListConfig" in rule:
            rule = f"it must be a list: write {cause.full_key}=[{cause.value}]"
        return f"{cause.full_key} is {cause.value!r}; {rule}"
    if isinstance(cause, OmegaConfBaseException):
        return f"{cause.full_key}: {str(cause).splitlines()[0]}"
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())


def _quoting(override: str) -> str:
    """Returns how to write an override whose value Hydra cannot read as it is."""
    key, separator, value = override.partition("=")
    if not separator:
        return "; write key=value"
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    quoted = re.sub(r'(\\*)("|$)', _escaped, value)
    written = shlex.quote(f'{key}="{quoted}"')
    return f"; quote the value, for Hydra and for the shell: {written}"


def _escaped(found: re.Match[str]) -> str:
    """Escapes a quote, or the end of a value, and the backslashes before it; elsewhere Hydra takes them as they are."""
    return found[1] * 2 + found[2].replace('"', '\\"')


def _unknown_key(key: str) -> str:
    if key in MOVED:
        return f"{key} is called {MOVED[key]} since version 0.2; write {MOVED[key]}=..."
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
    """Returns every dotted name in the schema, inner nodes too."""
    found = []
    for field in dataclasses.fields(schema):
        name = f"{prefix}{field.name}"
        found.append(name)
        for kind in (field.type, *getattr(field.type, "__args__", ())):
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found += _names(kind, f"{name}.")
    return found


def _meant(name: str, options: Iterable[str], namesakes: Iterable[str] = ()) -> str:
    close = list(dict.fromkeys([*namesakes, *difflib.get_close_matches(name, list(options), n=2, cutoff=0.7)]))
    return f"; did you mean {' or '.join(close)}?" if close else ""
