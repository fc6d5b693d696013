"""The command that tells who merges now."""

import click


@click.command()
def queue() -> None:
    """Show who holds each device of this machine, and who waits for it."""
    from flows.queue_table import show_queue

    show_queue()
