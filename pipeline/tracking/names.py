"""Holds the limits of MLflow's names and values, and keeps the Hugging Face token out of them."""

import os
import re
from collections.abc import Mapping
from typing import Any

from pipeline.errors import PipelineError

KEY_CHARACTERS, VALUE_CHARACTERS, PARAMS_PER_BATCH = 250, 6000, 100  # the limits of MLflow's stores
TAG_CHARACTERS, DIGEST_CHARACTERS = 5000, 36

UNUSABLE = re.compile(r"[^0-9A-Za-z_\-. /]")  # in a metric's or parameter's name


def usable_name(name: str) -> str:
    """Returns the name with characters that MLflow refuses replaced by `_`."""
    return re.sub(r"/{2,}", "/", UNUSABLE.sub("_", name)).strip("/")[:KEY_CHARACTERS]


def refuse_token(values: Mapping[str, Any]) -> None:
    """Raises PipelineError when a name or a value carries the Hugging Face token."""
    token = os.environ.get("HF_TOKEN")
    carrying = [key for key, value in values.items() if token and (token in str(value) or token in key)]
    if carrying:
        names = ", ".join(without_token(key) for key in carrying)
        raise PipelineError(f"the value of HF_TOKEN is in {names}; it is never logged: take it out")


def without_token(text: str) -> str:
    """Returns a text with the Hugging Face token replaced by its name."""
    token = os.environ.get("HF_TOKEN")
    return text.replace(token, "HF_TOKEN") if token else text
