"""Arguments: command line > --config YAML > the recipe's DEFAULTS > the library's own default.

Every value is checked against the field's annotation, wherever it was written, and remembers where it
came from. A key that nobody knows is an error that names the nearest known key.
"""

import argparse
import dataclasses
import json
import os
import sys
import textwrap
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from alignment.coerce import accepts, coerce
from alignment.errors import InputError, nearest
from alignment.files import locate, read_yaml, roots
from alignment.opening import open_run

# Names that older tutorials use. The sentence says what took their place.
RENAMED = {
    "warmup_ratio": "write warmup_steps: a number below 1 is a share of all steps",
    "max_seq_length": "it is called max_length now",
    "max_prompt_length": "it is gone: max_length bounds prompt and answer together",
    "torch_dtype": "it is called dtype now",
    "evaluation_strategy": "it is called eval_strategy now",
    "logging_dir": "it is gone: logs go to output_dir (for TensorBoard set TENSORBOARD_LOGGING_DIR)",
    "group_by_length": 'write train_sampling_strategy: "group_by_length"',
    "no_cuda": "it is called use_cpu now",
    "tokenizer_name_or_path": "the tokenizer is read from model_name_or_path",
    "dataset_name": "write data: a hub id, a file, a folder or a data/*.yaml declaration",
    "dataset_mixer": "write data: a data/*.yaml declaration that lists the sources",
    "dataset_train_split": "write it behind the hub id: data: org/name@split",
    "dataset_test_split": "write eval_data: org/name@split",
    "dataset_config": "write it behind the hub id: data: org/name:config",
    "dataset_streaming": "it is called streaming here",
    "use_peft": "say which: peft: lora",
}
# The least a number may be, and why.
LEAST = {
    "num_generations": (2, "an advantage is what an answer has over the others to the same prompt"),
    "beta": (0, "a negative beta would push the model away from its reference"),
    "max_completion_length": (1, "an answer has tokens"),
    "reward_batch_size": (1, "the reward model reads that many answers at a time"),
    "rehearsal_prompts": (0, "it is a number of prompts"),
}
# Since transformers 5.23 the left names are deprecated aliases; TRL still sets their defaults.
ALIASES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


@dataclass
class DataArguments:
    """What to train on, and what to do with rows that do not fit."""

    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Training rows: a file, a folder, a hub id (org/name:config@split) or a data/*.yaml."},
    )
    eval_data: list[str] | None = field(
        default=None, metadata={"help": "Rows to evaluate on during training, written like --data."}
    )
    test_size: float = field(
        default=0.05,
        metadata={"help": "Held out where the data have no test split: below 1 a share, else rows; 0 for none."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read rows as they are needed; nothing is kept."})
    allow_test_split: bool = field(default=False, metadata={"help": "Train on a split that is called test."})
    on_bad_row: Literal["stop", "drop"] = field(
        default="stop", metadata={"help": "What to do with a row that cannot be trained on."}
    )
    on_long_row: Literal["cut", "drop", "stop"] = field(
        default="drop", metadata={"help": "What to do with a row longer than max_length."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, train nothing."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the earlier run in output_dir once this one has finished."}
    )

    def __post_init__(self):
        if self.test_size < 0 or (self.test_size > 1 and self.test_size != int(self.test_size)):
            raise InputError(
                f"test_size is {self.test_size}",
                fix="a share below 1, a whole number of rows, or 0 for no evaluation",
            )


@dataclass
class PeftArguments:
    """Which parameters to train."""

    peft: str = field(
        default="none",
        metadata={"help": "none (all weights), lora, qlora, dora, ia3, prefix, prompt, ptuning, …"},
    )
    peft_args: dict = field(default_factory=dict, metadata={"help": "The method's own settings, e.g. '{\"r\": 64}'."})


@dataclass
class RewardArguments:
    """What an answer is worth, for recipes that learn from rewards; `also=(RewardArguments,)` of `parse`."""

    reward_model: str | None = field(
        default=None, metadata={"help": "A folder that recipes/reward.py left: its score is added to the reward."}
    )
    verifier: str | None = field(
        default=None,
        metadata={"help": "How answers are checked where a row has no verifier of its own: number, exact, …"},
    )
    reward_batch_size: int = field(default=64, metadata={"help": "Answers the reward model reads at a time."})
    rehearsal_prompts: int = field(
        default=16, metadata={"help": "Prompts answered before the first step, to look at the rewards; 0 for none."}
    )


@dataclass
class Arguments:
    """Everything one run was told, and by whom.

    Attributes:
        sources: field name -> "library", "recipe", "file mine.yaml", "flag", or "hardware" where the
            library's own default needs an accelerator and there is none.
        recipe: the script's name, e.g. "dpo".
        also: instances of the extra dataclasses given to `parse`, in their order.
        defaults: the recipe's DEFAULTS, as they are written there.
    """

    data: DataArguments
    model: Any
    peft: PeftArguments
    train: Any
    sources: dict[str, str]
    recipe: str
    also: tuple = ()
    defaults: dict[str, Any] = field(default_factory=dict)


def parse(train_class: type, defaults: dict, argv: list[str] | None = None, also: tuple = ()) -> Arguments:
    """Read the command line, the YAML of `--config` and the recipe's DEFAULTS into one checked object.

    Args:
        train_class: the trainer's configuration, a subclass of `transformers.TrainingArguments`.
        defaults: the recipe's DEFAULTS.
        argv: the command line without the program's name. None: a real command, of `sys.argv[1:]`; then
            `output_dir` is claimed and one line says what is run (`alignment.opening`).
        also: more dataclasses whose fields are accepted; their instances are in `Arguments.also`.

    Raises:
        InputError: for an unknown key, a wrong value or an unreadable file. From here on an uncaught
            InputError is printed without a traceback and ends the program with status 2.
    """
    from trl import ModelConfig

    install_excepthook()
    recipe = Path(sys.argv[0]).stem or "recipe"
    groups = {DataArguments: "data", PeftArguments: "adapter", ModelConfig: "model", train_class: "training"}
    groups |= {extra: extra.__name__ for extra in also}
    hints = {cls: typing.get_type_hints(cls) for cls in groups}
    known = {f.name: (cls, f) for cls in groups for f in dataclasses.fields(cls) if f.init}
    known.pop("use_peft")  # it says neither which method nor with what; RENAMED has a sentence for it

    flags, config_path, wants_help = read_flags(known, hints, list(sys.argv[1:] if argv is None else argv))
    layers = [("recipe", "DEFAULTS", defaults, {})]
    if config_path:
        path, written, lines = read_config(config_path)
        layers.append((f"file {path.name}", str(path), written, lines))
    layers.append(("flag", "", flags, {}))
    values: dict[str, Any] = {"output_dir": f"outputs/{recipe}"}
    sources = dict.fromkeys(known, "library") | {"output_dir": "recipe"}
    for layer in layers:
        merge_layer(layer, values, sources, known, hints)
    if wants_help:
        print_help(recipe, known, groups, values, everything=wants_help == "--help_all")
        raise SystemExit(0)
    for name in ("model_name_or_path", "chat_template_path"):
        values |= {name: beside_recipe(values[name])} if values.get(name) else {}
    fill_aliases(values, sources, known)
    fit_hardware(values, sources)
    built = {cls: build(cls, {n: v for n, v in values.items() if known[n][0] is cls}) for cls in groups}
    args = Arguments(
        built[DataArguments],
        built[ModelConfig],
        built[PeftArguments],
        built[train_class],
        sources,
        recipe,
        tuple(built[extra] for extra in also),
        defaults,
    )
    if argv is None:
        open_run(args)
    return args


def merge_layer(layer: tuple, values: dict, sources: dict, known: dict, hints: dict) -> None:
    """Check what one place says (`layer`: its source, its path, {key: value}, {key: line}) and let it win."""
    source, place, written, lines = layer
    for key, value in written.items():
        name = str(key).replace("-", "_")
        where = "--" + name if source == "flag" else f"{place}{lines.get(key, '')}, {key}"
        check_known(name, known, where, flag=source == "flag")
        cls, fld = known[name]
        values[name] = coerce(name, value, hints[cls][name], where, choices=fld.metadata.get("choices"))
        check_least(name, values[name], where, fld.default)
        sources[name] = source
    resolve_aliases(values, sources, known, source)


def check_least(name: str, value: Any, where: str, default: Any) -> None:
    """Raise InputError when a number is below what it can be, which is no more than the trainer's own default."""
    least, why = LEAST.get(name, (None, ""))
    if least is not None and value is not None and value < least and value != default:
        raise InputError(f"{name} is {value}", where=where, why=why, fix=f"{least} or more")


def check_known(name: str, known: dict, where: str, flag: bool) -> None:
    """Raise InputError with the nearest known name when `name` is no field of this recipe."""
    if name in known:
        return
    dash = "--" if flag else ""
    if name in RENAMED:
        raise InputError(f"{dash}{name} is not an option of this recipe", where=where, fix=RENAMED[name])
    near = nearest(name, list(known))
    raise InputError(
        f"{dash}{name} is not an option of this recipe",
        where=where,
        why="a misspelt option would be ignored and the run would be another one than you meant",
        fix=f"did you mean {dash}{near}?" if near else "--help_all lists every option",
    )


def resolve_aliases(values: dict, sources: dict, known: dict, source: str) -> None:
    """Let an old name written in a later layer win over the new name of an earlier one."""
    for old, new in ALIASES.items():
        if new in known and sources.get(old) == source and sources[new] != source:
            values[new], sources[new] = values[old], source


def fill_aliases(values: dict, sources: dict, known: dict) -> None:
    """Give the new name the trainer's default of the old one: unset, transformers warns at every start."""
    for old, new in ALIASES.items():
        if old in known and new in known:
            if new not in values and known[old][1].default is not None:
                values[new] = known[old][1].default
            if new in values:
                values[old], sources[old] = values[new], sources[new]


def beside_recipe(path: str) -> str:
    """Return a local path that works from any directory; a hub id, or what is not there, unchanged."""
    found = next((root / path for root in roots() if (root / path).exists()), None)
    return path if found is None or Path(path).exists() else str(found)


def fit_hardware(values: dict, sources: dict) -> None:
    """Without an accelerator TRL's own defaults (bf16 on a GPU) refuse to start: say CPU and float32."""
    import torch

    if values.get("use_cpu") or not torch.accelerator.is_available():
        for name, value in (("use_cpu", True), ("bf16", False)):
            if sources[name] == "library":
                values[name], sources[name] = value, "hardware"


def build(cls: type, values: dict) -> Any:
    """Construct a dataclass; what its own checks refuse becomes an InputError."""
    try:
        return cls(**values)
    except InputError:
        raise
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise InputError(f"{cls.__name__} refuses these settings", why=str(error)) from error


def read_config(path_text: str) -> tuple[Path, dict, dict[str, str]]:
    """Read `--config`: the path found, its mapping, and for each key ", line n"."""
    path = locate(path_text)
    mapping, lines = read_yaml(path)
    return path, mapping, {key: f", line {line}" for key, line in lines.items()}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors."""

    def error(self, message: str) -> typing.NoReturn:
        """Raise instead of printing the usage of two hundred options."""
        raise InputError(message, where="the command line", fix="--help lists the options")


def read_flags(known: dict, hints: dict, argv: list[str]) -> tuple[dict[str, Any], str, str]:
    """Split the command line into ({field: text or list of texts}, path of --config, the help flag given)."""
    parser = Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", action="append")
    parser.add_argument("-h", "--help", "--help_all", action="count")
    for name, (cls, fld) in known.items():
        add_flag(parser, name, hints[cls][name], fld.metadata.get("aliases", []), known)
    argv = [with_underscores(word) for word in argv]
    found, rest = parser.parse_known_args(argv)
    flags = vars(found)
    wants_help = ""
    if flags.pop("help", 0):
        wants_help = "--help_all" if "--help_all" in argv else "--help"
    for word in rest:
        if word.startswith("-"):
            name = word.lstrip("-").split("=")[0]
            check_known(name, known, "the command line", flag=True)
    if rest:
        raise InputError(f"{rest[0]!r} belongs to no option", where="the command line", fix="--help lists the options")
    configs = flags.pop("config", [])
    if len(configs) > 1:
        raise InputError("--config is given more than once", where="the command line", fix="join the files into one")
    flags = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in flags.items()}
    return flags, configs[0] if configs else "", wants_help


def with_underscores(word: str) -> str:
    """Spell the name of a flag with underscores: `--learning-rate=1e-4` -> `--learning_rate=1e-4`."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def add_flag(parser: argparse.ArgumentParser, name: str, hint: Any, aliases: list[str] | str, known: dict) -> None:
    """Add `--name`; switches may stand alone or as `--no_name`, lists take several words."""
    names = [f"--{name}", *([aliases] if isinstance(aliases, str) else aliases)]
    if accepts(hint, bool):
        parser.add_argument(*names, dest=name, nargs="?", const=True)
        if f"no_{name}" not in known:
            parser.add_argument(f"--no_{name}", dest=name, action="store_const", const=False)
    else:
        parser.add_argument(*names, dest=name, nargs="+" if accepts(hint, list) else None)


def print_help(recipe: str, known: dict, groups: dict, values: dict, everything: bool) -> None:
    """Print the options and their values in this run; TrainingArguments' own only with `--help_all`."""
    from transformers import TrainingArguments

    shared = {f.name for f in dataclasses.fields(TrainingArguments)}
    print(f"usage: {recipe}.py [--config FILE.yaml] [--option value …]\n")
    print("Command line > --config > the recipe's DEFAULTS > the library; '*' marks what the first three set.")
    for cls, title in groups.items():
        print(f"\n{title}:")
        for name, (owner, fld) in known.items():
            if owner is not cls or (not everything and name in shared and name not in values):
                continue
            default = values.get(name, fld.default)
            if default is dataclasses.MISSING:
                default = fld.default_factory()
            text = str(fld.metadata.get("help", "")).replace("%%", "%")
            print(f"  --{name} {'*' if name in values else ''}[{as_written(default)}]")
            print(textwrap.fill(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8))
    if not everything:
        print("\nAll other options of transformers' TrainingArguments are accepted too: --help_all lists them.")


def as_written(value: Any) -> str:
    """Return a value as it would be written on the command line."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_written, value))
    if isinstance(value, dict):
        return json.dumps(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def install_excepthook(advice: str = "") -> None:
    """Print an uncaught InputError without a traceback, once per machine, and exit with status 2.

    With `advice` Ctrl-C prints it, and exits with status 130.
    """
    previous = sys.excepthook

    def hook(kind, error, trace):
        if advice and issubclass(kind, KeyboardInterrupt):
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"\ninterrupted: {advice}", file=sys.stderr)
            raise SystemExit(130)
        if not issubclass(kind, InputError):
            return previous(kind, error, trace)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr)
        raise SystemExit(2)

    hook.prints_input_errors = True
    if not hasattr(previous, "prints_input_errors"):
        sys.excepthook = hook
