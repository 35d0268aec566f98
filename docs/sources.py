"""Puts right the links from pages of source code back to the reference.

Sphinx names what it links back to by the module where it is defined. The reference names public
objects as users import them, ``tnlm.compress`` and not ``tnlm.api.compress``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any


def right_name(name: str, known: Collection[str]) -> str:
    """Return the known name that ends as a name does, over as many parts as possible.

    Example:
        >>> right_name("tnlm.api.compress", ["tnlm.compress", "tnlm.plan"])
        'tnlm.compress'
    """
    if name in known:
        return name
    parts = name.split(".")
    for start in range(1, len(parts)):
        found = [other for other in known if other.endswith("." + ".".join(parts[start:]))]
        if found:
            return min(found, key=len)
    return name


def repair(app: Any, pagename: str, template: str, context: dict[str, Any], tree: Any) -> None:
    """Rewrite the links of a page of source code."""
    if not pagename.startswith("_modules/"):
        return
    objects = app.env.get_domain("py").objects
    known = [name for name, entry in objects.items() if not entry.aliased]
    context["body"] = re.sub(
        r'#(tnlm\.[\w.]+)"', lambda found: f'#{right_name(found[1], known)}"', context["body"]
    )
    # Sphinx lists the home of inherited built-ins, but writes no page for it.
    context["body"] = context["body"].replace('<li><a href="builtins.html">builtins</a></li>', "")
