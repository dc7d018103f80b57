"""What tests/releasing.py makes, as fixtures of these tests."""

from tests.releasing import candidate, evidence, key, needs_triton, repository, run_directory, served, trust, trust_file

__all__ = [
    "candidate",
    "evidence",
    "key",
    "needs_triton",
    "repository",
    "run_directory",
    "served",
    "trust",
    "trust_file",
]
