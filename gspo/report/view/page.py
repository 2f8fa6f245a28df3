"""The page of `scripts/view.py`: one HTML file that needs no network and no library.

The template's script and style are named by their digests in the page's content security policy: nothing else runs in
it, whatever a completion says; and it may ask the network for nothing, or, where it is served, its own server alone.
"""

import base64
import hashlib
from pathlib import Path

SOURCES = Path(__file__).parent
SCRIPTS = ("objectives.js", "data.js", "draw.js", "choose.js", "overview.js", "tokens.js", "maps.js", "view.js")


def script() -> str:
    """The page's script: its files, one after the other."""
    return "".join((SOURCES / name).read_text(encoding="utf-8") for name in SCRIPTS)


def page(data: str, *, live: bool = False) -> str:
    """The HTML file around what `pack.packed` returned. live: it asks its server for news."""
    style, code = (SOURCES / "view.css").read_text(encoding="utf-8"), script()
    asks = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {_digest(code)}; style-src {_digest(style)}; connect-src {asks}; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "{{policy}}": policy,
        "{{style}}": style,
        "{{script}}": code,
        "{{live}}": "yes" if live else "no",
        "{{data}}": data,
    }
    text = (SOURCES / "view.html").read_text(encoding="utf-8")
    for name, value in parts.items():
        assert text.count(name) == 1, name
        text = text.replace(name, value)
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
