"""What `make demo` left: the artifacts of the default configuration, and its held-out prompts as tokens."""

import os

import pytest

from pipeline.config.fields import DRAFT
from pipeline.errors import MissingArtifact
from pipeline.prompts import chat_format
from pipeline.prompts.split import split_by_hash
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed
from tests.support.paths import ROOT


class Demo:
    """Holds the paths of target and draft, and what both answer; fails the test where `make demo` has not run.

    More `num_generated` prompts hold out more of them, and those of the demo are among them.
    """

    def __init__(self, num_generated=None):
        self.config = composed()
        self.config.output_dir = os.environ.get("PIPELINE_OUTPUT_DIR", str(ROOT / "outputs"))
        try:
            workspace = Workspace(self.config)
            self.target_path, self.draft_path = workspace.target.path, workspace.open(DRAFT).path
        except MissingArtifact as error:
            pytest.fail(f"run `make demo` first: {error}", pytrace=False)
        self.stop_token_ids = [int(token) for token in chat_format.stop_token_ids(workspace.tokenizer)]
        if num_generated is not None:
            self.config.prompts.count = num_generated
        prompts = Workspace(self.config).prompts.prompts
        _, held_out = split_by_hash(prompts, self.config.prompts.heldout_fraction)
        self.prompts = [
            chat_format.render_prompt(workspace.tokenizer, [one.as_dict() for one in prompt.messages], prompt.effort)
            for prompt in held_out
        ]
