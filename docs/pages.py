"""A MkDocs hook for pictures and tables that are wider than the page."""

from __future__ import annotations

import re
from typing import Any

PICTURE = re.compile(r'<img [^>]*?src="([^"]+)"[^>]*>')
SHORT_CELL = re.compile(r"<td( style=[^>]*)?>([^<]{0,32})</td>")
CODE_IN_CELL = re.compile(r"(?<=<code>)[^<]*(?=</code>)")
CELL = re.compile(r"<td[ >].*?</td>", re.DOTALL)


def _breakable(cell: re.Match[str]) -> str:
    return CODE_IN_CELL.sub(lambda code: re.sub(r"([/(])", r"\1<wbr>", code[0]), cell[0])


def on_page_content(html: str, **kwargs: Any) -> str:
    """Link pictures to their files, mark short cells for site.css, and let code in cells break after "/" and "("."""
    html = PICTURE.sub(r'<a href="\1">\g<0></a>', html)
    html = SHORT_CELL.sub(r'<td class="short"\1>\2</td>', html)
    return CELL.sub(_breakable, html)
