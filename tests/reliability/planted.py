"""Secrets of the tests: drawn by number, or planted under a name."""

import random

LETTERS = "abcdefghijkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789"
VARIABLES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "POEMERGE_NOTIFY",
    "PREFECT_API_KEY",
)
PLANTED = {
    name: f"planted{number}x{name.replace('_', '')}"
    for number, name in enumerate(
        (*VARIABLES, "mlflow-uri", "mlflow-wrong", "dvc-remote", "git-remote", "set", "source")
    )
}


def secret(number: int) -> str:
    drawn = random.Random(number)
    return "".join(drawn.choices(LETTERS, k=drawn.randint(8, 60)))
