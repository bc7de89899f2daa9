"""A table of text on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kd.deploy import text_table


def printed(table: text_table.Table) -> Table:
    """Make what rich prints; words of strangers are no markup."""
    made = Table(title=escape(table.title), caption=escape(table.caption) or None)
    for place, name in enumerate(table.head):
        made.add_column(escape(name), justify="left" if place < table.text else "right")
    for row in table.rows:
        made.add_row(*map(Text, row))
    return made
