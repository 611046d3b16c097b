"""The house: what runs, what is imported, what the README says."""
import ast
import contextlib
import io
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

import action_guidance
import causal_attention
import causal_conv
import diffusion_forcing
import sample
import unet
from support.options import parse
from temporal import norm
from testing.commands import folder
from testing.faults import FAULTS
from training.settings import parse_arguments

HERE = Path(__file__).parent.parent


# --------------------------------------------------------------------------------------------------
# The house: what runs, what is imported, what the README says


def demonstration(module) -> str:
    """What a file prints when it is run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.no_grad():
        module.demo()
    return printed.getvalue()


def test_every_idea_runs_and_prints_what_it_says():
    kernels = demonstration(causal_conv)
    for row in ("centred        ( 1,  2,  3)   3, 4, 5      26",
                "shift          ( 1,  2,  3)   2, 3, 4      20  one frame late",
                "masked         ( 0,  1,  2)   2, 3, 4      11",
                "mixed          ( 2,  1,  2)   2, 3, 4      15",
                "extrapolative  ( 0, -2,  8)   2, 3, 4      26  exact on anything linear"):
        assert row in kernels, row
    attention = demonstration(causal_attention)
    assert re.search(r"^ +0 .* 1.00  0.00  0.00  0.00$", attention, re.M)
    assert "they differ by 0.0" in attention
    forcing = demonstration(diffusion_forcing)
    assert "0000000000000009" in forcing and re.search(r" 999 +0.00000   0.700 +0.0000", forcing)
    assert "199 ->   0   0.000" in forcing and re.search(r"  39 +0.96026   0.971 +22.7696", forcing)
    guidance = demonstration(action_guidance)
    assert all(f"guidance {n}: v = {v}" in guidance for n, v in enumerate((1, 3, 5, 7)))
    assert re.search(r"1110 in training +10.\d% .*= 10.2%", guidance)
    leaks = demonstration(unet)
    assert re.search(r"clip  +[1-9]\d*\.\d\d %", leaks) and leaks.count("  0.00 %") == 6
    norms = demonstration(norm)
    assert "frames [0, 1, 2, 3]" in norms and norms.count("frames [3]") == 2
    done = subprocess.run([sys.executable, "-m", "temporal.norm"], cwd=HERE, capture_output=True,
                          text=True)
    assert done.stdout == norms, done.stderr


LAYERS = (  # a folder or file imports what stands on lines below its own, or in the same folder
    "test_all", "testing", "play", "bundled", "evaluation", "baselines", "train", "training",
    "sample", "data", "model", "unet", "causal_attention causal_conv action_guidance",
    "dynamicrafter temporal diffusion_forcing", "episodes", "support")


def test_imports_run_down_only():
    # a command that no other file imports may use what it likes
    text = "\n".join(path.read_text(encoding="utf-8") for path in HERE.rglob("*.py")
                     if "testing" not in path.parts and path.name != "test_all.py")
    level = {name: i for i, names in enumerate(LAYERS) for name in names.split()}
    for name in level:
        file, room_of = HERE / f"{name}.py", HERE / name
        for path in [file] if file.exists() else room_of.glob("*.py"):
            imports = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                       if isinstance(node, (ast.Import, ast.ImportFrom))]
            command = room_of.is_dir() and f"from {name}.{path.stem} import" not in text and not (
                re.search(rf"from {name} import .*\b{path.stem}\b", text))
            for node in imports:
                modules = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    modules = [node.module]
                for room in {module.split(".")[0] for module in modules} & set(level):
                    assert room == name or command or level[room] > level[name], (
                        f"{path} imports {room}")
                    assert node.col_offset == 0, f"{path} imports {room} inside a function"


def test_the_readmes_code_is_the_projects_and_its_files_exist():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    excerpts = re.findall(r"<!-- from ([\w/]+\.py) -->\n```python\n(.*?)```", readme, re.S)
    assert len(excerpts) == 5
    for name, code in excerpts:
        lines = [line.strip() for line in (HERE / name).read_text(encoding="utf-8").splitlines()]
        quoted = [line.strip() for line in code.splitlines() if line.strip()]
        assert len(quoted) <= 6 and all(line in lines for line in quoted), (name, quoted)
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (HERE / target).exists(), target
    prose = re.sub(r"```.*?```|^    .*?$|<!--.*?-->", "", readme, flags=re.S | re.M)
    words = re.findall(r"[^\s|]*\w[^\s|]*", prose)
    assert len(words) <= 1500, len(words)


def test_every_fault_can_be_planted():
    for (file, _), faults in FAULTS.items():
        text = (HERE / file).read_text(encoding="utf-8")
        for before, after, effect in faults:
            assert text.count(before) == 1 and before != after, (file, effect)


def test_the_readmes_commands_are_understood():
    modules = {"train.py": parse_arguments, "sample.py": partial(parse, sample.Settings, "")}
    commands = re.findall(r"^    .*?python (\w+\.py) ?(.*?)(?:  +.*)?$",
                          (HERE / "README.md").read_text(encoding="utf-8"), re.M)
    assert ("sample.py", "--guidance 2.0") in commands and ("train.py", "--data rt1") in commands
    for words in commands:
        if words[0] in modules and "--resume" not in words[1] and "--base" not in words[1]:
            modules[words[0]](words[1].split())
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for module in set(re.findall(r"python -m ([a-z_.]+)", readme)):
        path = HERE / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module


def test_every_file_is_utf8_whatever_the_code_page():
    unsaid = re.compile(r"(?<![\w.])open\(|\.read_text\(\)|\.write_text\(")
    for path in [*HERE.glob("*.py"), *HERE.glob("*/*.py")]:
        source = path.read_text(encoding="utf-8")
        for call in unsaid.finditer(source):
            words = source[call.start() : call.start() + 400]
            allowed = re.match(r'[^\n]*"[rwa]b"', words) or "encoding=" in words
            defined = source[: call.start()].endswith("def ")
            assert allowed or defined, f"{path}: {words[:60]}"
    out = folder()
    odd = os.fsencode(out) + b"/\xff.npy"
    for words in (["diffusion_forcing.py"], ["action_guidance.py"],
                  ["sample.py", "--steps", "1", "--frames", "2", "--out", out],
                  ["sample.py", "--actions", odd]):
        done = subprocess.run([sys.executable, *words], cwd=HERE, capture_output=True,
                              env=os.environ | {"PYTHONIOENCODING": "cp1252"})
        assert done.returncode == (2 if odd in words else 0), done.stderr.decode()
        assert b"Traceback" not in done.stderr
    assert rb"\udcff.npy" in done.stderr
