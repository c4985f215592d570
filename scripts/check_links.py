"""Find links in the Markdown files that lead nowhere: missing files, missing headings.

Web addresses are not fetched: a test that needs the network fails for the wrong reasons.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.*?)\s*#*$", re.MULTILINE)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def slug(heading: str) -> str:
    """The anchor that Markdown renderers give a heading."""
    words = re.sub(r"[^\w\- ]", "", heading.replace("`", "").strip().lower())
    return words.replace(" ", "-")


def dead_links(path: Path) -> list[str]:
    """Complaints about one file."""
    text = CODE.sub("", path.read_text())
    complaints = []
    for found in LINK.finditer(text):
        target = found[1] or found[2]
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            complaints.append(f"{path.relative_to(ROOT)}: {target}: no such file")
        elif anchor and file.suffix == ".md":
            headings = HEADING.findall(re.sub(r"```.*?```", "", file.read_text(), flags=re.DOTALL))
            if anchor not in {slug(heading) for heading in headings}:
                complaints.append(f"{path.relative_to(ROOT)}: {target}: no such heading")
    return complaints


def main() -> int:
    """Print every dead link; the exit status is 1 if there is one."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    complaints = [complaint for file in files for complaint in dead_links(file)]
    print("\n".join(complaints) or f"links: {len(files)} Markdown files, none dead")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
