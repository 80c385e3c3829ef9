"""Writes how the published benchmark asks rows of its sets: {set: [rows]} to {set: [what `format` returns]}."""

import argparse
import json
from pathlib import Path

from dflash.benchmark import DATASETS

parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
arguments = parser.parse_args()

rows = json.loads(arguments.rows.read_text(encoding="utf-8"))
found = {}
for name, one in DATASETS.items():
    address, *subset = one["load_args"]
    where = {"dataset": address, "subset": subset[0] if subset else None, "split": one["load_kwargs"]["split"]}
    found[name] = where | {"asked": [one["format"](row) for row in rows[name]]}
arguments.out.write_text(json.dumps(found), encoding="utf-8")
