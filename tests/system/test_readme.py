"""The README's commands work as they stand, in its order."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = [shlex.split(line)[1] for line in commands() if line.startswith("make ")]
    assert named == ["demo", "test"]
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_python_commands_run_in_order(tmp_path: Path) -> None:
    for name in ("configs", "tools", "soar_mega", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    lines = [line for line in commands() if not line.startswith("make ")]
    assert len(lines) >= 6
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == ".venv/bin/python", line
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    made = tmp_path / "runs" / "tiny"
    assert (made / "pictures" / "0000.png").is_file()
    assert (made / "export" / "model_index.json").is_file()
    assert (made / "pretrain" / "metrics.jsonl").read_text().count("\n") == 20
    shutil.rmtree(made)


def test_files_named_in_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
