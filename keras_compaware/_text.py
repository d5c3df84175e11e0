"""Tables in plain text (private)."""


def text_table(header, rows):
    """Returns rows of text as a table with a rule under its header; the last column is free."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in list(zip(*lines, strict=True))[:-1]]
    lines = [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]
        )
        for line in lines
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
