"""What the documentation says can be typed: commands parse, and files, targets and versions are there."""

import argparse
import ast
import configparser
import importlib.util
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from packaging.requirements import Requirement

from alignment import config

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
PAGES += [ROOT / folder / "README.md" for folder in ("recipes", "eval", "data")]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES if path.exists()}
SCRIPTS = sorted(path for folder in ("recipes", "eval", "data") for path in (ROOT / folder).glob("*.py"))
LIBRARY = sorted((ROOT / "alignment").glob("*.py"))
YAMLS = sorted(p for d in ("recipes/presets", "accelerate_configs", "data") for p in (ROOT / d).glob("*.yaml"))
COMMAND = re.compile(
    r"(?:accelerate launch (?:-\S+ (?:[^-\s]\S* )?)*|python )(?:recipes|eval|data|benchmarks)/\w+\.py[^`\n]*"
)
IN_TREE = re.compile(r"(?:recipes|data|eval|accelerate_configs|alignment|tests|benchmarks)/[\w./-]*")
YOURS = re.compile(r"mine\b.*|.*…")  # a file of the reader: mine.yaml, mine.jsonl, recipes/presets/…


def commands(text):
    """The commands in a text that start a script of ours, without comments and what follows in a shell."""
    text = re.sub(r"\\\n\s*(?:# )?", "", text)
    text = re.sub(r"(?<!`)`([^`]+)`(?!`)", lambda code: code.group(0).replace("\n", " "), text)
    for found in COMMAND.findall(text):
        yield re.split(r"\s+(?:[|;#]|&&|>)(?:\s|$)", found)[0].rstrip(" .,;:)")


def strings(path):
    """The texts in a Python file, docstrings among them; not the pieces of f-strings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            yield node.value


def said():
    """{command: the first file that says it}."""
    texts = [*TEXTS.items(), *((path, path.read_text(encoding="utf-8")) for path in YAMLS)]
    texts += [(path, text) for path in [*SCRIPTS, *LIBRARY] for text in strings(path)]
    return {command: path for path, text in reversed(texts) for command in commands(text)}


SAID = said()


class Parsed(Exception):
    """The command line has been read; go no further."""


def stop_after_parsing(patch):
    """Let a script's main() read its command line, with all its checks, and raise Parsed."""
    parse, parse_known = config.parse, argparse.ArgumentParser.parse_known_args
    inside = []

    def parse_and_stop(*args, **kwargs):
        inside.append(True)
        parse(*args, **kwargs)
        raise Parsed

    def known_and_stop(self, *args, **kwargs):
        found, rest = parse_known(self, *args, **kwargs)
        if inside:
            return found, rest
        assert not rest, f"unknown: {rest}"
        raise Parsed

    patch.setattr(config, "parse", parse_and_stop)
    patch.setattr(config, "open_run", lambda args: None)  # a reader's outputs/ must not decide
    patch.setattr(argparse.ArgumentParser, "parse_known_args", known_and_stop)
    patch.setattr(sys, "excepthook", sys.__excepthook__)
    patch.chdir(ROOT)


def load(path):
    """Import a script by its path, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"script_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def split(command):
    """(script, its flags), the launcher's own flags checked by accelerate; a reader's --config left out."""
    words = [re.sub(r"\$\w+", "1", word) for word in shlex.split(command) if word not in ("…", "...")]
    if words[0] == "python":
        script, flags = words[1], words[2:]
    else:
        launch = launch_command_parser().parse_args(words[2:])
        script, flags = launch.training_script, launch.training_script_args
    if "--config" in flags:
        at = flags.index("--config")
        if YOURS.fullmatch(flags[at + 1]):
            del flags[at : at + 2]
    return script, flags


def check(command):
    """Fail when the script would not take this command line, or a file of ours in it is not there."""
    for word in shlex.split(command):
        path = word.rpartition("=")[2]
        if IN_TREE.fullmatch(path):
            assert (ROOT / path).exists(), f"there is no {path}"
    script, flags = split(command)
    with pytest.MonkeyPatch.context() as patch:
        stop_after_parsing(patch)
        patch.setattr(sys, "argv", [script, *flags])
        try:
            with pytest.raises(Parsed):
                load(ROOT / script).main()
        except SystemExit as end:  # --help
            assert not end.code, f"{command}: status {end.code}"


@pytest.mark.parametrize("command", SAID, ids=[f"{p.relative_to(ROOT)}: {c}" for c, p in SAID.items()])
def test_command_is_taken_by_its_script(command, capsys):
    script = split(command)[0]
    assert (ROOT / script).is_file(), f"{SAID[command]} starts {script}, which is not there"
    check(command)


def test_commands_of_the_demo_are_taken():
    steps = load(ROOT / "eval" / "demo.py").steps
    spoken = [shlex.join(words) for _, words in steps(Path("outputs/demo"), Namespace(max_steps=2, limit=4))]
    spoken = [command.replace("'accelerate launch'", "accelerate launch") for command in spoken]
    assert len(spoken) >= 4
    for command in spoken:
        check(command)


@pytest.mark.parametrize(
    "wrong",
    [
        "accelerate launch recipes/sft.py --learning_rat 1e-4",
        "accelerate launch recipes/sft.py --max_steps many",
        "accelerate launch recipes/sft.py --config recipes/presets/none.yaml",
        "accelerate launch recipes/sft.py --data data/tiny/none",
        "accelerate launch --num_proceses 2 recipes/sft.py --max_steps 2",
        "accelerate launch eval/generate.py --model a --topk 3",
        "python eval/compare.py a.json b.json --showw 3",
        "python data/make_tiny.py --quick",
    ],
)
def test_wrong_command_is_found(wrong, capsys):
    with pytest.raises((AssertionError, ValueError, SystemExit, pytest.fail.Exception)):
        check(wrong)


def test_commands_are_found_in_text():
    text = (
        "Type `accelerate launch recipes/sft.py\n--peft lora`, then (or: python eval/demo.py).\n"
        "    accelerate launch --config_file a.yaml --num_processes 2 recipes/dpo.py \\\n"
        "        --beta 0.2   # twice the default\n"
        "$ python eval/compare.py a.json b.json | head\n"
        "python is what recipes/sft.py needs\n"
    )
    assert list(commands(text)) == [
        "accelerate launch recipes/sft.py --peft lora",
        "python eval/demo.py",
        "accelerate launch --config_file a.yaml --num_processes 2 recipes/dpo.py --beta 0.2",
        "python eval/compare.py a.json b.json",
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_page_shows_commands_and_names_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    assert list(commands(text)), "no command to type"
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    assert not [link for link in links if not (path.parent / link).exists()]
    spans = [span for span in re.findall(r"`([^`\n]+)`", text) if IN_TREE.fullmatch(span)]
    missing = [span for span in spans if not ((ROOT / span).exists() or (path.parent / span).exists())]
    assert not missing


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_script_says_how_to_start_it(path):
    name = str(path.relative_to(ROOT))
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert len([command for command in commands(doc) if split(command)[0] == name]) >= 2
    if path.parent.name != "data":
        assert any(path.name in text for text in TEXTS.values()), "no page mentions it"


def test_make_targets_that_are_named_exist():
    targets = set(re.findall(r"(?m)^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    assert {"demo", "test", "test-slow", "lint"} <= targets
    text = "\n".join([*TEXTS.values(), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")])
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, re.S)) + (ROOT / ".ci/run").read_text()
    named = set(re.findall(r"(?m)^(?:\$ )?make ([a-z][a-z-]*)", blocks))
    named |= set(re.findall(r"`make ([a-z][a-z-]*)`", text))
    assert {"demo", "test"} <= named <= targets


def test_constraints_pin_the_dependencies_within_their_bounds():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    wanted = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if not line.startswith("#"))
    assert len(pins) > 60
    for requirement in map(Requirement, wanted.split("\n")[1:]):
        assert pins[requirement.name.lower().replace("_", "-")] in requirement.specifier, requirement


def test_changelog_knows_the_version():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    assert f"## {setup['metadata']['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
