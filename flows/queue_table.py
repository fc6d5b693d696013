"""`poemerge queue` as people see it."""

from rich.table import Table

from flows.console import board_table, console
from flows.turns import devices, tickets


def show_queue() -> None:
    """Device by device: who holds it, and who waits."""
    found = [ticket for device in devices() for ticket in tickets(device)]
    if not found:
        console.print("Nobody merges on this machine, and nobody waits.")
        return
    table: Table = board_table("Queue of each device", "the first of a device holds it")
    for column in ("device", "place", "process", "since", "command", "folder"):
        table.add_column(column, overflow="fold")
    place, last = 0, ""
    for ticket in found:
        place, last = (place + 1 if ticket.device == last else 0), ticket.device
        stands = str(place) if place else "holds it"
        row = (ticket.device, stands, str(ticket.pid), ticket.since, ticket.command, ticket.folder)
        table.add_row(*row)
    console.print(table)
