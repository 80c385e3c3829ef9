"""Puts a trained tiny target into the package: `python -m tests.support.ship_target OUTPUT_DIR`.

It was trained by `python -m pipeline stage=target target.pretrain.from_scratch=true output_dir=OUTPUT_DIR`.
"""

import json
import re
import shutil
import sys

from pipeline.artifacts import artifact
from pipeline.artifacts.files import write_json
from pipeline.artifacts.hashing import file_sha256
from pipeline.config.fields import TARGET
from pipeline.target import shipped
from pipeline.workspace import settings
from pipeline.workspace.workspace import Workspace
from tests.support.configuration import composed
from tests.support.paths import ROOT

CHOICE = ROOT / "conf" / "target" / "tiny.yaml"


def main() -> None:
    """Copies the target's files with a record of their sha256, and sets that of the weights in conf/."""
    config = composed("target=tiny", "target.pretrain.from_scratch=true", f"output_dir={sys.argv[1]}")
    trained = artifact.read(Workspace(config).address(TARGET), TARGET, make_with="the command above", verify=True)
    shutil.rmtree(shipped.DIRECTORY, ignore_errors=True)
    shipped.DIRECTORY.mkdir()
    names = sorted(trained.files.keys() - {artifact.CONTRACT})  # every artifact gets its own
    for name in names:
        shutil.copyfile(trained.path / name, shipped.DIRECTORY / name)
    sha256s = {name: file_sha256(shipped.DIRECTORY / name) for name in names}
    record = {"settings": settings.pretrain_recipe(config), "files": sha256s}
    write_json(shipped.DIRECTORY / shipped.RECORD, record)
    text, count = re.subn(r"(?m)^  sha256: .*$", f"  sha256: {sha256s[shipped.WEIGHTS]}", CHOICE.read_text())
    assert count == 1, f"{CHOICE} has {count} lines of a sha256"
    CHOICE.write_text(text)
    print(json.dumps(sha256s, indent=2))


if __name__ == "__main__":
    main()
