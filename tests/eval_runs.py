"""Run a script of eval/ in this process, as a user would."""

import json
import runpy
import sys

from conftest import ROOT


def run_script(monkeypatch, name, *words):
    """Run eval/<name>.py with these words on its command line."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    runpy.run_path(str(ROOT / "eval" / f"{name}.py"), run_name="__main__")


def write_rows(path, rows):
    """Write rows as jsonl and return the path."""
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def save_reward_model(toy, folder, labels=1):
    """Save the toy with a score head, as recipes/reward.py leaves one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(toy, num_labels=labels)
    torch.nn.init.normal_(model.score.weight, std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(toy).save_pretrained(folder)
    return folder
