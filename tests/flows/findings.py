"""A finding of the doctor, alone and without the secret that it was given."""

from collections.abc import Iterator

from flows.doctor.finding import Finding

SECRET = "s3cret"


def only(findings: Iterator[Finding]) -> Finding:
    (found,) = findings
    assert SECRET not in f"{found.said}{found.advice}"
    return found
