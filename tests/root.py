"""The folder of the repository, which subprocesses of tests run in or import from."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
