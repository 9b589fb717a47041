"""Write the tables of docs/towers.md and the list of towers in README.md from the table of families.

python tests/docs_towers.py
"""

import re
from pathlib import Path

from llava_twophase.cache.format import row_bytes
from llava_twophase.vision.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
STORAGES = ("float32", "bfloat16", "int8", "int4")


def table(header, rows):
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def prefix(family):
    """Return the tokens before the patches in words."""
    fixed = {0: "none", 1: "CLS", 2: "CLS, distillation"}[family.leading_tokens]
    return f"{fixed}, registers (`{family.registers}`)" if family.registers else fixed


def families_table():
    """Return one row per family: what the tower knows about it."""
    rows = [
        (family.title, f"`{name}`", f"`{family.model_class}`", prefix(family), f"`{family.norm}`", family.positions,
         f"`{family.processor}`")
        for name, family in FAMILIES.items()
    ]  # fmt: skip
    return table(("family", "`model_type`", "class", "prefix tokens", "last norm", "positions", "processor"), rows)


def storage_table():
    """Return one row per published model: bytes per image for each storage dtype."""
    rows = []
    for family in FAMILIES.values():
        for model in family.published:
            shape = (model.grid**2, model.width)
            sizes = [f"{row_bytes(storage, shape) / 1e6:.3f}" for storage in STORAGES]
            rows.append((f"`{model.name}`", model.image_size, f"{shape[0]} x {shape[1]}", *sizes))
    return table(("model", "crop in px", "features", *STORAGES), rows)


def readme_list():
    """Return the README's list of towers."""
    names = [family.title for family in FAMILIES.values()]
    return f"- **Vision towers:** {', '.join(names[:-1])} and {names[-1]} ([table](docs/towers.md))\n"


# Page: name of each generated block, what makes it, and the pattern of its text.
BLOCKS = {
    "docs/towers.md": {
        "families": (families_table, r"(?<=<!-- families -->\n).*?(?=<!-- end of families -->)"),
        "storage": (storage_table, r"(?<=<!-- storage -->\n).*?(?=<!-- end of storage -->)"),
    },
    "README.md": {"towers": (readme_list, r"(?m:^- \*\*Vision towers:\*\*[^\n]*\n)")},
}


def with_blocks(page, text):
    """Return a page's text with its generated blocks."""
    for name, (make, pattern) in BLOCKS[page].items():
        found = re.findall(pattern, text, re.DOTALL)
        assert len(found) == 1, f"{page} has no block {name}"
        text = text.replace(found[0], make())
    return text


def main():
    """Replace the blocks in their pages."""
    for page in BLOCKS:
        path = ROOT / page
        path.write_text(with_blocks(page, path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
