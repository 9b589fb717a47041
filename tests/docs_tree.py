"""Write the module tree of docs/modules.md from git's files and the first sentence of each module's docstring.

python tests/docs_tree.py
"""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "modules.md"
TOP = {"llava_twophase": "", "pipelines": "the commands, DeepSpeed configurations and recipes"}
TESTS = "mirrors the package; tests/benchmarks/ measures, tests/golden/ holds what LLaVA computed"
# Files without a docstring, and folders of such files.
DESCRIPTIONS = {
    "llava_twophase/py.typed": "the package has type annotations",
    "pipelines/recipes/": "complete commands of common runs, as scripts",
    "pipelines/recipes/compare_projectors.sh": "several projectors on one cache, compared and evaluated",
    "pipelines/recipes/one_24gb_gpu.sh": "Vicuna-7B in bf16 or -13B in four bits on one GPU with 24 GB",
    "pipelines/recipes/qwen2.5.sh": "LLaVA-Pretrain with Qwen2.5 and torchrun",
    "pipelines/recipes/slurm/": "batch scripts for SLURM",
    "pipelines/recipes/slurm/extract.sbatch": "Phase one on SLURM",
    "pipelines/recipes/slurm/train.sbatch": "Phase two on SLURM, with one torchrun on each node",
    "pipelines/recipes/vicuna.sh": "LLaVA-1.5's published stage 1 with Vicuna and DeepSpeed",
    "pipelines/zero2.json": "DeepSpeed ZeRO-2, the default of stage 1",
    "pipelines/zero3.json": "DeepSpeed ZeRO-3, for GPUs that cannot hold the LLM",
    "pipelines/zero3_offload.json": "DeepSpeed ZeRO-3 with the LLM in host memory",
}
# Folders that are one line of the tree, without their files.
CLOSED = ("pipelines/demo/",)
BLOCK = re.compile(r"(?<=^```\n)(?:llava_twophase/.*?)?(?=^```$)", re.MULTILINE | re.DOTALL)
COLUMN = 36


def tracked_files():
    """Return the files of the package and of pipelines that git tracks, or would track after `git add`.

    Of a folder in CLOSED only its `__init__.py`, which describes the folder.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *TOP]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=True)
    found = {name for name in result.stdout.split("\0") if name and (ROOT / name).exists()}
    return sorted(name for name in found if not name.startswith(CLOSED) or name.endswith("/__init__.py"))


def describe(name):
    """Return the first sentence of a module's docstring, without its full stop, or the description of another file."""
    if name in DESCRIPTIONS:
        return DESCRIPTIONS[name]
    text = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
    sentence = re.match(r"(.*?)(?:[;.]\s|\.?$|\n\n)", text, re.DOTALL)[1]
    return re.sub(r"\s+", " ", sentence).replace("``", "`")


def tree_lines(folder, files, indent=""):
    """Yield (drawn path, description) for every entry of a folder, files first."""
    depth = folder.count("/") + 1
    below = [name for name in files if name.startswith(folder + "/")]
    names = [name for name in below if name.count("/") == depth]
    if depth > 1:  # the folder's own line describes a subpackage's __init__.py
        names = [name for name in names if not name.endswith("/__init__.py")]
    folders = sorted({"/".join(name.split("/")[: depth + 1]) for name in below if name.count("/") > depth})
    for entry in [*names, *folders]:
        last = entry == (folders or names)[-1]
        label = entry.rpartition("/")[2] + ("/" if entry in folders else "")
        source = f"{entry}/__init__.py" if entry in folders else entry
        text = describe(source) if source in files else DESCRIPTIONS.get(f"{entry}/", "")
        yield indent + ("└── " if last else "├── ") + label, text
        if entry in folders:
            yield from tree_lines(entry, files, indent + ("    " if last else "│   "))


def tree():
    """Return the block as text."""
    files = tracked_files()
    lines = []
    for folder, description in TOP.items():
        lines.append((f"{folder}/", description))
        lines += tree_lines(folder, files)
    lines.append(("tests/", TESTS))
    return "".join(f"{path:<{COLUMN}} # {text}\n" if text else f"{path}\n" for path, text in lines)


def main():
    """Replace the block in the page."""
    page = PAGE.read_text(encoding="utf-8")
    assert len(BLOCK.findall(page)) == 1
    PAGE.write_text(BLOCK.sub(lambda _: tree(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
