"""Merge a trained adapter into its base and measure that nothing was lost; the result needs no PEFT.

    python recipes/merge.py outputs/sft --out outputs/sft-merged
    python recipes/merge.py outputs/dpo/checkpoint-200 --out merged

Works for LoRA and its kin and IA3; prompt learning (prefix, prompt, ptuning) has no merge.
"""

import argparse

from alignment.config import install_excepthook


def main() -> None:
    """Read the command line and merge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="the folder of the adapter")
    parser.add_argument("--out", required=True, help="the new folder for the merged model")
    options = parser.parse_args()
    install_excepthook()

    from alignment.models import merge  # after the command line: it costs seconds

    merge(options.adapter, options.out)
    print(f"{options.out}: a full model, load it like any other")


if __name__ == "__main__":
    main()
