"""The leaderboard in Markdown, as the description of its run in MLflow's pages."""

from tasks.register.leaderboard import Kind, Leaderboard, Row

TAG = "mlflow.note.content"  # which MLflow shows as the description of a run

ORDER: tuple[Kind, ...] = ("merge", "base", "expert")  # MLflow shows the first lines at once


def note(board: Leaderboard) -> str:
    """Who was best, every score, and where to read on."""
    head = ("candidate", *board.tasks, "mean", "normalised", "validation")
    ordered = [row for kind in ORDER for row in board.of(kind)]
    rows = [head, ("---", *["---:"] * (len(head) - 1)), *(_cells(row, board) for row in ordered)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return (
        f"Best on validation: **{board.best.label}**. Test scores, per cent:\n\n{table}\n\n"
        "The candidates are the runs below this one. The page about all of it is among the "
        "artifacts: `report/index.html`."
    )


def _cells(row: Row, board: Leaderboard) -> tuple[str, ...]:
    scores = [row.score(task) for task in board.tasks]
    scores += [row.mean.get("test"), row.normalised.get("test"), row.mean.get("validation")]
    return (row.label, *("" if score is None else f"{score:.1%}"[:-1] for score in scores))
