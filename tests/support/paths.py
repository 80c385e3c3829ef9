"""Where the tests and their programs lie."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
PROGRAMS = TESTS / "support" / "programs"
