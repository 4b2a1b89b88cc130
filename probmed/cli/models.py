"""`probmed models`: the zoo."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probmed.models import ZOO, entry


def models() -> None:
    """List the models: name, equation, sites, reference.

    [bold]Example[/bold]

        probmed models
    """
    table = Table(show_lines=True)
    for column in ("name", "equation", "what", "sites", "reference"):
        table.add_column(column, overflow="fold")
    for name in ZOO:
        found = entry(name)
        table.add_row(
            *(
                escape(text)
                for text in (
                    found.name,
                    found.equation,
                    found.summary,
                    ", ".join(found.sites),
                    found.reference,
                )
            )
        )
    Console(highlight=False).print(table)
